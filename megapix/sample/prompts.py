"""Prompts from files: lines of text, GenEval's and DPG-Bench's own, or the captions of a shard folder."""

from __future__ import annotations

import json
from pathlib import Path

from megapix.conditioning.text_source import read_prompts
from megapix.errors import InputError
from megapix.sample.options import Layout
from megapix.sample.rows import Row


def rows_of(path: Path, layout: Layout, count: int) -> list[Row]:
    """The prompts at `path`.

    Args:
        path: for `grid` a text file with one prompt per line, or a shard folder for its samples' first captions;
            for `geneval` its evaluation_metadata.jsonl; for `dpg` its folder of .txt files.
        count: the first so many; 0 is all.

    Raises:
        InputError: it is not there or cannot be read, or holds no prompt.
    """
    if layout == "grid":
        prompts = read_prompts(path, "--prompts")
        return [Row(prompt, f"{n:04d}") for n, prompt in enumerate(prompts[: count or None])]
    rows = (_geneval if layout == "geneval" else _dpg)(path)
    return rows[: count or None]


def _geneval(path: Path) -> list[Row]:
    rows = []
    for n, line in enumerate(read_prompts(path, "--prompts")):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'--prompts {str(path)!r}, line {n + 1}: expected JSON with a "prompt", as in GenEval\'s '
                "evaluation_metadata.jsonl"
            ) from error
        rows.append(Row(str(prompt), f"{n:05d}", line))
    return rows


def _dpg(path: Path) -> list[Row]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt") if path.is_dir() else []
    if not files:
        raise InputError(f"--prompts {str(path)!r}: expected DPG-Bench's folder of prompts, one .txt file each")
    return [Row(" ".join(read_prompts(file, "--prompts")), file.stem) for file in files]

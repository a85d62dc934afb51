"""The plan of an output folder: which sample goes where, a function of the source's list and the options alone.

It is recorded in `plan.json` before the first shard is written. The same command finds it and goes on; a command with
another source or other options is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.source import Item, Source
from megapix.errors import InputError
from megapix.shards import write_atomic

PLAN_NAME = "plan.json"
ADM_CROP = "ADM centre crop: box halving, bicubic, crop; transparency on white"


@dataclass(frozen=True)
class Options:
    """What the written bytes depend on, beside the source."""

    size: int
    extension: str = "png"
    quality: int = 95
    samples_per_shard: int = 1000
    seed: int = 0
    min_side: int = 1

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        for name in ("size", "samples_per_shard", "min_side"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} = {getattr(self, name)}: expected at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality = {self.quality}: expected 1 to 100")


class Job(NamedTuple):
    """One shard to write; its samples are numbered from `first`."""

    number: int
    first: int
    items: tuple[Item, ...]


def jobs(items: Sequence[Item], options: Options) -> Iterator[Job]:
    """Shuffle by seed (in the order of a hash of seed and name, the same everywhere) and cut into shards."""

    def place(number: int) -> bytes:
        return hashlib.sha256(f"{options.seed}/{items[number].name}".encode()).digest()[:16]

    shuffled = sorted(range(len(items)), key=place)
    for number, first in enumerate(range(0, len(items), options.samples_per_shard)):
        chosen = shuffled[first : first + options.samples_per_shard]
        yield Job(number, first, tuple(items[i] for i in chosen))


def describe(source: Source, options: Options) -> dict[str, Any]:
    """What is recorded of source and options; equal records mean equal bytes.

    Raises:
        InputError: two samples of the same name, or a name that is not UTF-8.
    """
    digest, seen = hashlib.sha256(), set()
    for item in source.items:
        if item.name in seen:
            raise InputError(f"the source holds {item.name!r} twice; names must be unique")
        seen.add(item.name)
        try:
            digest.update(f"{item.name}\t{item.label}\t{item.caption}\n".encode())
        except UnicodeEncodeError as error:
            raise InputError(f"image {item.name!a} has a name that is not UTF-8; rename it") from error
    return {
        **source.about,
        **asdict(options),
        "policy": ADM_CROP,
        "classes": list(source.classes),
        "samples": len(source.items),
        "list_sha256": digest.hexdigest(),
    }


def settle(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan into a new folder, or find the same one there.

    Raises:
        InputError: the folder was begun with another plan (names the first difference and both values), or holds
            something else.
    """
    path = out / PLAN_NAME
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is not a folder")
    if not path.is_file():
        if out.exists() and (strangers := sorted(entry.name for entry in out.iterdir() if not _temporary(entry.name))):
            raise InputError(f"{str(out)!r} holds {strangers[0]!r}, which is not ours; give an empty or new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    for key in sorted(plan.keys() | there.keys()):
        if there.get(key) != plan.get(key):
            what = {"list_sha256": "another list of samples (names, classes or captions)"}.get(key)
            both = what or f"{key} = {there.get(key)!r}, this command has {plan.get(key)!r}"
            raise InputError(f"{str(out)!r} was begun with {both}; give another folder, or the old value")


def _temporary(name: str) -> bool:
    """Whether it is a temporary file of `write_atomic` for the plan itself: all that can be there before the plan."""
    return re.fullmatch(rf"\.{re.escape(PLAN_NAME)}\.\d+\.tmp", name) is not None

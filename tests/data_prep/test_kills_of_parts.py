"""SIGKILL to the parts of a work while they are at it: started again, they end in the bytes of one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import cli
from megapix.shards.index import read_index, write_index
from tests.data_prep.test_write import hashes
from tests.support import image_encoders, text_encoders

PARTS = 2
ROUNDS = {"write": 5, "index": 5, "features": 2, "embed-text": 2, "stats": 2}
"""Of kills of all parts: ten kills of a command, and four of one that loads a network each time."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 images with captions."""
    folder, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(5)
    for number in range(101):
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), np.uint8)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(text_encoders.CAPTIONS[number % 5])
    return folder


@pytest.fixture(scope="module")
def prepared(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 shards of them."""
    out = tmp_path_factory.mktemp("prepared") / "shards"
    assert cli.main(["write", str(pairs), str(out), "--size", "32", "--samples-per-shard", "3", "--workers", "1"]) == 0
    return out


@pytest.mark.long
@pytest.mark.parametrize("command", ROUNDS)
def test_killed_parts_end_in_the_bytes_of_one_machine(
    command: str, pairs: Path, prepared: Path, tmp_path: Path
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
        if command == "embed-text":
            subprocess.run(["cp", "-r", prepared, folder / "out"], check=True)
            write_index(folder / "out", replace(read_index(folder / "out"), text=None))
    run(arguments(command, one / "out", pairs, prepared, tmp_path))
    words = arguments(command, several / "out", pairs, prepared, tmp_path)
    for _ in range(ROUNDS[command]):
        before = done(several / "out", command)
        parts = [begun(words, number) for number in range(PARTS)]
        while done(several / "out", command) <= before and any(part.poll() is None for part in parts):
            time.sleep(0.01)
        for part in parts:
            os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    assert not finished(several / "out", command), "it was to be killed before its end"
    for part in [begun(words, number) for number in range(PARTS)]:
        assert part.wait() == 0
    assert hashes(several) == hashes(one)


def arguments(command: str, out: Path, pairs: Path, prepared: Path, folder: Path) -> list[str]:
    match command:
        case "write":
            words = [pairs, out, "--size", 64, "--samples-per-shard", 3, "--workers", 1]
        case "index":
            words = [prepared, "--out", out, "--size", 32, "--workers", 1]
        case "features":
            encoder = folder / "encoder"
            encoder = encoder if encoder.exists() else image_encoders.make(encoder)
            words = [prepared, "--encoder", encoder, "--out", out, "--workers", 1]
        case "stats":
            words = [prepared, "--out", out, "--batch", 4, "--workers", 1]
        case _:
            encoder = folder / "encoder"
            encoder = encoder if encoder.exists() else text_encoders.make(encoder, "bert")
            words = [out, "--encoder", encoder, "--max-tokens", 12, "--prefix", "", "--dtype", "fp32"]
    return [command, *map(str, words)]


def done(out: Path, command: str) -> int:
    """How much of a work is done, in files."""
    pattern = {
        "write": "shard-*.tar",
        "index": ".receipts/*.json",
        "features": "features-*",
        "embed-text": "text-*.safetensors",
        "stats": ".out.*.blocks/block-*.npz",
    }
    return len(list((out.parent if command == "stats" else out).glob(pattern[command])))


def finished(out: Path, command: str) -> bool:
    match command:
        case "features":
            return (out / "features.json").exists()
        case "embed-text":
            return read_index(out).text is not None
        case "stats":
            return out.exists()
        case _:
            return (out / "index.json").exists()


def run(words: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "data_prep", *words], check=True, capture_output=True)


def begun(words: list[str], part: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *words, "--part", f"{part}/{PARTS}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

"""Checkpoints of no training: two ranks' shares of numbers that a test knows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapix.checkpoint import vectors
from megapix.checkpoint.folder import point_to
from megapix.checkpoint.layout import PARTS, FileRecord, Layout
from megapix.checkpoint.manifest import Counters, State, write_state
from megapix.config import Config
from megapix.shards.index import read_index
from tests.support.small_run import SMALL

LAYOUT = Layout({"a": (3, 3), "b": (2,)}, 2)


def numbers(part: str) -> Tensor:
    """A part's flat vector."""
    return torch.arange(LAYOUT.total, dtype=torch.float32) + 100 * PARTS.index(part)


def weights_of(part: str) -> dict[str, Tensor]:
    """The same by name."""
    return {name: numbers(part)[slice(*span)].view(LAYOUT.shapes[name]) for name, span in LAYOUT.spans.items()}


def add_checkpoint(run: Path, images: int) -> Path:
    """Write one, and make `latest` name it."""
    folder = run / "checkpoints" / f"images-{images:012d}"
    folder.mkdir(parents=True)
    files = {}
    for rank, name in enumerate(LAYOUT.files):
        mine = slice(*LAYOUT.range_of(rank))
        pieces = {part: ((len(numbers(part)[mine]),), [numbers(part)[mine]]) for part in PARTS}
        files[name] = vectors.write(folder / name, pieces)
    write_state(folder, State(Counters(images, images), SMALL, "", (), LAYOUT, images, files=files))
    point_to(folder)
    return folder


def checkpoint_of(c: Config, shards: Path, out: Path, ranks: int, **more: Any) -> None:
    """A whole checkpoint at 80 images, of a network with one number; `more` are fields of its state."""
    folder = out / "checkpoints" / "images-000000000080"
    folder.mkdir(parents=True)
    layout, files = Layout({"a": (1,)}, ranks), {}
    for name in layout.files:
        (folder / name).write_bytes(b"numbers")
        files[name] = FileRecord(7, hashlib.sha256(b"numbers").hexdigest())
    digest = read_index(shards).digest
    state = State(Counters(80, 80), c, digest, ("a",) * 3, layout, 10, files=files)
    write_state(folder, replace(state, **more))
    point_to(folder)

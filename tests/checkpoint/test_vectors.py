"""Flat vectors of a GPU: out of it in pieces, and into it from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megapix.checkpoint import vectors as flat
from megapix.checkpoint.layout import PARTS
from tests.support.fake_cuda import CPU, FakeCuda
from tests.support.made_run import LAYOUT, add_checkpoint, numbers


def test_out_of_a_gpu_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "CHUNK", 4)
    folder = add_checkpoint(tmp_path, 7)
    with FakeCuda(monkeypatch.setattr) as cuda:
        for part in PARTS:
            vector = torch.zeros(LAYOUT.total, device="cuda:1")
            flat.fill(vector, folder, LAYOUT, part, 0)
            pieces = list(flat.chunks(vector))
            assert {cuda.place(piece) for piece in pieces} == {CPU}
            assert torch.equal(torch.cat(pieces), numbers(part))

"""Copies in host memory: all numbers in their order, in pieces that torch's pinned allocator rounds up but little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapix.checkpoint import buffers, vectors
from megapix.checkpoint.buffers import HostCopy
from megapix.config import preset
from megapix.costs import parameters

MIB = 2**20
XL = parameters.count(preset("xl-256").model)


def taken(count: int) -> int:
    """Bytes that torch's allocator takes for pinned memory of so many fp32 numbers: the least power of two that holds
    each allocation (CachingHostAllocator.h, `PowerOf2Ceil`)."""
    return sum(1 << (4 * length - 1).bit_length() for length in buffers.lengths(count))


@pytest.mark.parametrize(
    "count", [1, 7, 2**21 - 1, 2**21 + 1, 2**26 - 1, 2**26, 2**26 + 1, XL, XL // 3 + 1, XL // 8 + 5]
)
def test_little_is_wasted(count: int) -> None:
    """Less than 8 MiB, and so 1 % of each share of XL on up to three ranks."""
    assert sum(buffers.lengths(count)) == count
    assert 4 * count <= taken(count) < 4 * count + 8 * MIB
    assert len(buffers.lengths(count)) <= 4 * count / (256 * MIB) + 6, "few allocations"
    assert max(buffers.lengths(count)) * 4 <= 256 * MIB


def test_the_copy_of_xl() -> None:
    """On one rank: 11.9 GiB, of which one allocation for each part would take 16."""
    assert pytest.approx(11.9, abs=0.05) == 4 * 4 * XL / 2**30
    assert 4 * (1 << (4 * XL - 1).bit_length()) == 16 * 2**30
    assert 4 * taken(XL) < 1.003 * 4 * 4 * XL
    assert 4 * taken(XL // 8 + 1) < 1.02 * 4 * 4 * (XL // 8 + 1)


@pytest.mark.parametrize("count", [1, 5, 8, 13, 31])
def test_the_file_is_that_of_one_vector(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, whole pieces of 8 numbers, the smallest of 2, chunks of 3; and for a second vector."""
    monkeypatch.setattr(buffers, "PIECE", 8)
    monkeypatch.setattr(buffers, "SMALLEST", 2)
    monkeypatch.setattr(vectors, "CHUNK", 3)
    copy, pieces = HostCopy(count, pinned=False), None
    for first in (0, 100):
        vector = torch.arange(first, first + count, dtype=torch.float32)
        copy.take(vector)
        assert pieces in (None, [piece.data_ptr() for piece in copy.pieces]), "allocated once"
        pieces = [piece.data_ptr() for piece in copy.pieces]
        whole, parts = tmp_path / f"whole-{first}", tmp_path / f"parts-{first}"
        record = vectors.write(parts, {"a": buffers.flat(copy.pieces), "b": buffers.flat([vector])})
        assert record == vectors.write(whole, {name: ((count,), [vector]) for name in "ab"})
        assert parts.read_bytes() == whole.read_bytes()
        assert torch.equal(load_file(parts)["a"], vector)
    if count == 31:
        assert [len(piece) for piece in copy.pieces] == [8, 8, 8, 4, 2, 1]
    save_file({"a": vector}, tmp_path / "theirs")
    assert torch.equal(load_file(tmp_path / "theirs")["a"], load_file(parts)["b"])


def test_memory_that_the_host_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than any machine can address."""
    monkeypatch.setattr(buffers, "PIECE", 2**60)
    with pytest.raises(MemoryError, match=r"^4294967296\.00 GiB of host memory asked: .*tried to allocate"):
        HostCopy(2**60, pinned=False)

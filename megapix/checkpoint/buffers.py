"""A vector's copy in host memory, in pieces of which torch's allocator wastes little.

For pinned memory torch rounds every allocation up to a power of two (`PowerOf2Ceil` in ATen's CachingHostAllocator), so
one of 9 GiB takes 16. Pieces that are powers of two themselves take what they are asked for; a last one that is none
wastes less than `SMALLEST`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megapix.checkpoint import vectors

PIECE = 2**26
"""Numbers of a whole piece: 256 MiB of fp32."""
SMALLEST = 2**21
"""Pieces of what is left are halved down to this many numbers: 8 MiB."""


def lengths(count: int) -> list[int]:
    """Pieces of `count` fp32 numbers: whole ones, powers of two for what is left, and the last less than SMALLEST."""
    pieces = [PIECE] * (count // PIECE)
    left, size = count % PIECE, PIECE // 2
    while size >= SMALLEST:
        if left >= size:
            pieces.append(size)
            left -= size
        size //= 2
    return [*pieces, left] if left else pieces


class HostCopy:
    """Room for `count` fp32 numbers on the host, allocated once and used for every save.

    Attributes:
        pieces: fp32, of `lengths(count)`, one after the other.

    Raises:
        MemoryError: the host has too little.
    """

    def __init__(self, count: int, pinned: bool) -> None:
        try:
            self.pieces = [torch.empty(length, pin_memory=pinned) for length in lengths(count)]
        except RuntimeError as error:  # what torch raises if malloc or cudaHostAlloc fails
            if "memory" not in str(error):
                raise
            kind = "pinned " if pinned else ""
            raise MemoryError(f"{4 * count / 2**30:.2f} GiB of {kind}host memory asked: {error}") from error

    def take(self, vector: Tensor) -> None:
        """Copy a vector of `count` numbers here, from a GPU without waiting: its numbers have landed once it has been
        synchronized with."""
        start = 0
        for piece in self.pieces:
            piece.copy_(vector[start : start + len(piece)], non_blocking=True)
            start += len(piece)


def flat(pieces: Sequence[Tensor]) -> tuple[tuple[int], Iterable[Tensor]]:
    """Pieces on any device as `vectors.write` takes a flat vector: its shape, and its numbers on the host."""
    return (sum(map(len, pieces)),), (chunk for piece in pieces for chunk in vectors.chunks(piece))

"""How the flat vectors of a checkpoint are partitioned over ranks and files. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

PARTS = ("weights", "exp_avg", "exp_avg_sq", "ema")
"""The flat fp32 vectors, each a tensor of every rank's file: fp32 masters, AdamW's moments, EMA."""


@dataclass(frozen=True)
class Layout:
    """How a flat vector of all parameters is partitioned: rank r has [r·share, (r + 1)·share), the last ranks less."""

    shapes: dict[str, tuple[int, ...]]
    """Parameter name -> shape, in the network's order."""
    ranks: int

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> its half-open range in the flat vector."""
        spans, start = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = (start, start := start + math.prod(shape))
        return spans

    @property
    def total(self) -> int:
        """Numbers in a flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def share(self) -> int:
        """Numbers of a full share: ZeRO-2 pads the vector to a multiple of two numbers per rank."""
        return 2 * -(-self.total // (2 * self.ranks))

    def range_of(self, rank: int) -> tuple[int, int]:
        """The range of one rank, without padding."""
        return min(rank * self.share, self.total), min((rank + 1) * self.share, self.total)

    def file_of(self, rank: int) -> str:
        """Name of a rank's file."""
        return f"rank-{rank:05d}-of-{self.ranks:05d}.safetensors"

    @property
    def files(self) -> list[str]:
        """Names of all ranks' files."""
        return [self.file_of(rank) for rank in range(self.ranks)]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file, noted as it was written."""

    size: int
    sha256: str

"""What is read for one micro batch, in NumPy arrays: it is made where torch is not loaded, and handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapix.data.mix.stored import MixedFeatures, MixedText
from megapix.data.order import Positions
from megapix.shards.image_features import Features
from megapix.shards.text_features import TextFeatures


@dataclass
class ReadTimes:
    """What reading a micro batch took its worker."""

    read: float = 0.0
    """Seconds spent reading, or waiting for what is in flight."""
    decode: float = 0.0
    """Seconds spent decoding."""
    hits: int = 0
    """Reads that found their shard in the cache."""
    misses: int = 0
    """Reads that had to fetch it."""

    def add(self, other: ReadTimes) -> None:
        """Add another's."""
        self.read += other.read
        self.decode += other.decode
        self.hits += other.hits
        self.misses += other.misses

    def row(self, images: int) -> dict[str, float]:
        """Scalars: milliseconds of a worker per image, and the share of reads that the cache answered."""
        row = {"data/read_ms": 1e3 * self.read / images, "data/decode_ms": 1e3 * self.decode / images}
        if reads := self.hits + self.misses:
            row["data/cache_hit_share"] = self.hits / reads
        return row


@dataclass(frozen=True)
class Extras:
    """What a micro batch holds beside images and labels."""

    features: Features | MixedFeatures | None = None
    """An image encoder's features, for REPA."""
    captions: bool = False
    """One caption of each image, by seed and position."""
    text: TextFeatures | MixedText | None = None
    """A text encoder's features of that caption."""
    draw: Callable[[Positions], tuple[Any, ...]] | None = None
    """Positions -> what the objective draws for them, tensors on the host; called in the trainer's process."""


NO_EXTRAS = Extras()
"""Images and labels alone."""


@dataclass
class Arrays:
    """One micro batch of one rank as it was read."""

    images: NDArray[np.uint8]
    """[B, 3, H, W]."""
    labels: NDArray[np.int64]
    """[B]."""
    positions: Positions
    """int64 [B]: the samples' positions in the run."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another one stands in for."""
    times: ReadTimes = field(default_factory=ReadTimes)
    features: NDArray[Any] | None = None
    """float32, or the bit patterns of bf16 as int16: [B, rows, columns, F]."""
    captions: tuple[str, ...] = ()
    """One caption of each image."""
    text: tuple[NDArray[Any], ...] | None = None
    """Or its features, bit patterns of bf16 [B, T, C_text], and their mask, bool [B, T], if there is one (`padded`)."""


def padded(rows: Sequence[NDArray[np.int16]], attended: bool = False) -> tuple[NDArray[Any], ...]:
    """Features [T_i, C] of each caption -> [B, T, C], 0 where there is none, and mask [B, T]; T is the longest of them.

    Args:
        attended: all rows have as many tokens, padding among them, which is attended to: there is no mask.
    """
    if attended:
        return (np.stack(rows),)
    lengths = np.array([len(row) for row in rows])
    features = np.zeros((len(rows), lengths.max(), rows[0].shape[1]), np.int16)
    for place, row in zip(features, rows, strict=True):
        place[: len(row)] = row
    return features, np.arange(features.shape[1]) < lengths[:, None]

"""What the loader hands over: one micro batch of one rank, what is read beside its images, and what reading it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix.data.mix.stored import MixedFeatures, MixedText
from megapix.data.order import Positions
from megapix.shards.image_features import Features
from megapix.shards.text_features import TextFeatures


@dataclass
class ReadTimes:
    """What reading a micro batch took its worker."""

    read: float = 0.0
    """Seconds spent reading."""
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


@dataclass
class Batch:
    """One micro batch of one rank."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: Tensor
    """int64 [B]."""
    positions: Positions
    """int64 [B]: the samples' positions in the run."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another one stands in for."""
    times: ReadTimes = field(default_factory=ReadTimes)
    features: Tensor | None = None
    """An encoder's features of the images, where the run reads them: bf16 or float32 [B, rows, columns, F]."""
    captions: tuple[str, ...] = ()
    """One caption of each image, where the run reads them."""
    text: tuple[Tensor, ...] | None = None
    """Or its features, bf16 [B, T, C_text], and their mask, bool [B, T], if there is one (`padded`)."""
    draws: tuple[Tensor, ...] = ()
    """What the objective draws for these positions, [B] each, where the run has the workers do it (`Extras.draw`)."""

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that the transfer to a GPU does not wait (called by DataLoader)."""
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        features = None if self.features is None else self.features.pin_memory()
        text = None if self.text is None else tuple(part.pin_memory() for part in self.text)
        draws = tuple(part.pin_memory() for part in self.draws)
        return replace(self, images=images, labels=labels, features=features, text=text, draws=draws)


@dataclass(frozen=True)
class Extras:
    """What a micro batch holds beside images and labels."""

    features: Features | MixedFeatures | None = None
    """An image encoder's features, for REPA."""
    captions: bool = False
    """One caption of each image, by seed and position."""
    text: TextFeatures | MixedText | None = None
    """A text encoder's features of that caption."""
    draw: Callable[[Positions], tuple[Tensor, ...]] | None = None
    """Positions -> what the objective draws for them, on the host: picklable, for it is called in the workers."""


NO_EXTRAS = Extras()
"""Images and labels alone."""


def padded(rows: Sequence[NDArray[np.int16]], attended: bool = False) -> tuple[Tensor, ...]:
    """bf16 bit patterns [T_i, C] of each caption -> features bf16 [B, T, C], 0 where there is none, and mask [B, T]; T
    is the longest of them.

    Args:
        attended: all rows have as many tokens, padding among them, which is attended to: there is no mask.
    """
    if attended:
        return (torch.from_numpy(np.stack(rows)).view(torch.bfloat16),)
    lengths = torch.tensor([len(row) for row in rows])
    features = torch.zeros(len(rows), int(lengths.max()), rows[0].shape[1], dtype=torch.bfloat16)
    for place, row in zip(features, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row.copy()).view(torch.bfloat16)
    return features, torch.arange(features.shape[1]) < lengths[:, None]

"""What the loader hands over: one micro batch of one rank, in tensors, and what is read beside its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix.data import arrays
from megapix.data.arrays import Arrays, Extras, ReadTimes
from megapix.data.order import Positions


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
    """What the objective draws for these positions, [B] each, where the run has the loader do it (`Extras.draw`)."""

    @staticmethod
    def of(read: Arrays, extras: Extras) -> Batch:
        """The tensors of what was read, which share its memory, and what the objective draws for it."""
        features = None if read.features is None else torch.from_numpy(read.features)
        if features is not None and features.dtype == torch.int16:
            features = features.view(torch.bfloat16)
        return Batch(
            torch.from_numpy(read.images),
            torch.from_numpy(read.labels),
            read.positions,
            read.replaced,
            read.times,
            features,
            read.captions,
            None if read.text is None else _text(read.text),
            extras.draw(read.positions) if extras.draw else (),
        )

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that the transfer to a GPU does not wait."""
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        features = None if self.features is None else self.features.pin_memory()
        text = None if self.text is None else tuple(part.pin_memory() for part in self.text)
        draws = tuple(part.pin_memory() for part in self.draws)
        return replace(self, images=images, labels=labels, features=features, text=text, draws=draws)


def padded(rows: Sequence[NDArray[np.int16]], attended: bool = False) -> tuple[Tensor, ...]:
    """`arrays.padded` in tensors: features bf16 [B, T, C], and mask, bool [B, T], if there is one."""
    return _text(arrays.padded(rows, attended))


def _text(read: tuple[NDArray[Any], ...]) -> tuple[Tensor, ...]:
    features, *mask = map(torch.from_numpy, read)
    return features.view(torch.bfloat16), *mask

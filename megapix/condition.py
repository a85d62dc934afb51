"""What a network is told about each image of a batch: tensors that it takes after x and t, and what "nothing" is.

classes   (y [B] int64,)                              nothing: the null class, number num_classes
text      (y [B, T, C_text], mask [B, T] bool)        nothing: the empty caption's features (or a negative prompt's)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Told = tuple[Tensor, ...]
"""What a network takes after x and t."""


@dataclass(frozen=True)
class Condition:
    """What each image of a batch is about, and what is said where nothing shall be said."""

    given: Told
    """[B, …] each."""
    nothing: Told
    """[1, …] each."""

    def __len__(self) -> int:
        return len(self.given[0])

    def dropped(self, drop: Tensor) -> Told:
        """`given`, with `nothing` for the images that are true in `drop`, bool [B]."""
        given, nothing = _alike(self.given, self.nothing)
        return tuple(
            torch.where(drop.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in zip(given, nothing, strict=True)
        )

    def with_nothing(self) -> Told:
        """`given`, and `nothing` as often below it, for classifier-free guidance: [2 B, …] each."""
        given, nothing = _alike(self.given, self.nothing)
        return tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(given, nothing, strict=True))

    def at(self, images: Sequence[int]) -> Condition:
        """That of some images of the batch, in any order and number."""
        return Condition(tuple(part[list(images)] for part in self.given), self.nothing)


def classes(labels: Tensor, num_classes: int) -> Condition:
    """Of class numbers, int64 [B]; the null class is the last row of the table."""
    return Condition((labels,), (labels.new_full((1,), num_classes),))


def _alike(given: Told, nothing: Told) -> tuple[Told, Told]:
    """Both with as many text tokens as the longer one; what is added is masked out. Classes stay as they are."""
    if given[0].dim() < 2:
        return given, nothing
    tokens = max(given[0].shape[1], nothing[0].shape[1])
    return _padded(given, tokens), _padded(
        tuple(part.to(like) for part, like in zip(nothing, given, strict=True)), tokens
    )


def _padded(text: Told, tokens: int) -> Told:
    features, mask = text
    missing = tokens - features.shape[1]
    if not missing:  # F.pad would copy
        return text
    return F.pad(features, (0, 0, 0, missing)), F.pad(mask, (0, missing))

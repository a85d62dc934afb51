"""The condition of a network: tensors that it takes after x and t, and the null condition of guidance.

classes   (y [B] int64,)                              null: the null class, number num_classes
text      (y [B, T, C_text], mask [B, T] bool)        null: the empty caption's features (or a negative prompt's)
text      (y [B, T, C_text],)                         the same, where all captions have T tokens: no mask at all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Cond = tuple[Tensor, ...]
"""Cond tensors: what a network takes after x and t."""


@dataclass(frozen=True)
class Condition:
    """Cond tensors of a batch, and the null condition that takes their place in dropout and in guidance."""

    cond: Cond
    """[B, …] each."""
    null: Cond
    """[1, …] each."""

    def __len__(self) -> int:
        return len(self.cond[0])

    def dropped(self, drop: Tensor) -> Cond:
        """`cond`, with `null` for the images that are true in `drop`, bool [B]."""
        cond, null = _same_tokens(self.cond, self.null)
        return tuple(torch.where(drop.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in zip(cond, null, strict=True))

    def with_null(self) -> Cond:
        """`cond`, then `null` for every image again, for classifier-free guidance: [2 B, …] each."""
        cond, null = _same_tokens(self.cond, self.null)
        return tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(cond, null, strict=True))

    def at(self, images: Sequence[int]) -> Condition:
        """That of some images of the batch, in any order and number."""
        return Condition(tuple(part[list(images)] for part in self.cond), self.null)


def classes(labels: Tensor, num_classes: int) -> Condition:
    """Condition on class labels, int64 [B]; the null class is number `num_classes`, the last row of the table."""
    return Condition((labels,), (labels.new_full((1,), num_classes),))


def _same_tokens(cond: Cond, null: Cond) -> tuple[Cond, Cond]:
    """Both padded to the text tokens of the longer one, the padding masked out. Classes stay as they are.

    The network pads once more (`TextPixelDiT.ready`), to one of few lengths: all text meets there.

    Raises:
        ValueError: text without a mask whose lengths differ, or one of both with a mask.
    """
    if cond[0].dim() < 2:
        return cond, null
    lengths = cond[0].shape[1], null[0].shape[1]
    if len(cond) != len(null) or (len(cond) == 1 and lengths[0] != lengths[1]):
        raise ValueError(
            f"text of {lengths[0]} tokens, null of {lengths[1]}: expected masks, or one length without any"
        )
    null = tuple(part.to(like) for part, like in zip(null, cond, strict=True))
    return _padded(cond, max(lengths)), _padded(null, max(lengths))


def _padded(text: Cond, tokens: int) -> Cond:
    missing = tokens - text[0].shape[1]
    if not missing:  # F.pad would copy
        return text
    features, mask = text
    return F.pad(features, (0, 0, 0, missing)), F.pad(mask, (0, missing))

"""From the sum of gradients that ZeRO-2 hands to the optimizer to their clipped mean: its norm, and the divisor.

DeepSpeed would divide by the ranks before it adds up, in bf16 and so inexactly for 3 or 6 of them, test and measure
the gradient of each parameter by itself, 15 kernels and 28 bytes per number, and clip in a pass of its own. The sum is
an fp32 vector already, so one pass is enough to know its norm, and AdamW can divide by the way.
"""

from __future__ import annotations

import math

import torch
import torch.distributed
from torch import Tensor

CHUNK = 2**24
"""Numbers that are measured at once: on CPUs torch makes an fp64 copy of so many."""


def sum_of_squares(vector: Tensor) -> Tensor:
    """Sum of squares of a flat fp32 vector, a scalar in fp64 on its device, in one pass and a fixed order."""
    # Of a whole vector torch's other norms would make an fp64 copy.
    norms = torch._foreach_norm(vector.split(CHUNK), 2, dtype=torch.float64)  # type: ignore[no-untyped-call]
    return torch.stack(norms).square().sum()


class ClippedMean:
    """What makes this rank's share of a summed gradient the mean gradient, of a norm of at most `most` (0: any).

    Args:
        terms: gradients in the sum: micro batches of a step, over all ranks.
    """

    def __init__(self, terms: int, most: float) -> None:
        self.terms, self.most = terms, most
        self.norm = 0.0
        """Of the last step's whole mean gradient, before clipping; the same on every rank. Infinite or NaN: skipped."""
        self.beside: Tensor | None = None
        """Numbers of this rank, fp64, to be added up over the ranks along with the norm."""
        self.sums: list[float] = []
        """Their sums after the last step."""

    @property
    def divides(self) -> bool:
        """Whether the last step's divisor is not 1."""
        return self.terms > 1 or 0.0 < self.most < self.norm + 1e-6

    def divisor(self, share: Tensor) -> Tensor | None:
        """What to divide a rank's share of the sum by, an fp32 scalar on its device; None on every rank if the gradient
        is not finite on any.

        Every rank calls it. One all-reduce, and the one time that a step waits for the device.
        """
        squares = sum_of_squares(share).div_(self.terms**2).float()[None].double()
        both = squares if self.beside is None else torch.cat([squares, self.beside])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(both)
        norm = both[0].float().sqrt()
        both[0].copy_(norm)
        self.norm, *self.sums = both.tolist()
        if not math.isfinite(self.norm):
            return None
        # As DeepSpeed clips, to the bit, with 1e-6 as in torch.nn.utils.clip_grad_norm_.
        clip = ((norm + 1e-6) / self.most).clamp(min=1.0) if self.most else torch.ones_like(norm)
        return clip * self.terms

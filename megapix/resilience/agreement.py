"""What all ranks agree on in a step, in one all-reduce: is the loss finite, shall the run stop, did a save fail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megapix.dist import World, total


@dataclass(frozen=True)
class StepOutcome:
    """What every rank knows of a step after the all-reduce."""

    loss: float
    """Mean over all ranks; NaN if it is not finite on any."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    fault: str
    """Why the step's gradient is not finite, if it is not."""
    stop: bool
    """Whether any rank was asked to stop."""
    save_failed: bool
    """Whether a save in the background has failed."""


def word(world: World, loss: Tensor, stop: bool, save_failed: bool) -> Tensor:
    """What this rank has to say of a step: float64 [3 + ranks] on the loss's device, to be added up over the ranks.

    Args:
        loss: this rank's mean loss, a scalar on its device.
        stop: whether this rank was asked to stop.
        save_failed: whether this rank knows of a save that failed.
    """
    finite = loss.isfinite()
    mine = torch.zeros(3 + world.size, dtype=torch.float64, device=loss.device)
    mine[0].copy_(loss.where(finite, 0.0))
    # To assign a number would be a copy from the host, which waits for the device; to fill with one is a kernel.
    mine[1].fill_(float(stop))
    mine[2].fill_(float(save_failed))
    mine[3 + world.rank].copy_(~finite)
    return mine


def outcome(world: World, sums: list[float], grad_norm: float) -> StepOutcome:
    """What every rank knows of a step, from the sums of all ranks' `word` and the norm that all of them have."""
    loss_sum, stops, failures, *bad = sums
    where = ", ".join(str(rank) for rank, count in enumerate(bad) if count)
    fault = "the gradient is not finite" + (f", nor is the loss of rank {where}" if where else "")
    mean = math.nan if where else loss_sum / world.size
    return StepOutcome(mean, grad_norm, fault, stops > 0, failures > 0)


def any_rank(world: World, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. Every rank calls it."""
    return total(world, torch.full((1,), float(flag), dtype=torch.float64, device=device))[0] > 0

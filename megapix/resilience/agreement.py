"""What all ranks agree on after a step, in one all-reduce: is the loss finite, shall the run stop, did a save fail."""

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


def after_step(world: World, loss: Tensor, grad_norm: Tensor | float, stop: bool, save_failed: bool) -> StepOutcome:
    """Sync all ranks after a step: the one place in it that waits for the device.

    Args:
        loss: this rank's mean loss, a scalar on its device.
        grad_norm: the same on every rank, on its device or not; here so that it costs no wait of its own.
        stop: whether this rank was asked to stop.
        save_failed: whether this rank knows of a save that failed.
    """
    finite = loss.isfinite()
    mine = torch.zeros(4 + world.size, dtype=torch.float64, device=loss.device)
    mine[0], mine[1] = loss.where(finite, 0.0), grad_norm
    mine[2], mine[3] = float(stop), float(save_failed)
    mine[4 + world.rank] = ~finite
    loss_sum, norms, stops, failures, *bad = total(world, mine)
    where = ", ".join(str(rank) for rank, count in enumerate(bad) if count)
    fault = "the gradient is not finite" + (f", nor is the loss of rank {where}" if where else "")
    mean = math.nan if where else loss_sum / world.size
    return StepOutcome(mean, norms / world.size, fault, stops > 0, failures > 0)


def any_rank(world: World, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. Every rank calls it."""
    return total(world, torch.tensor([float(flag)], dtype=torch.float64, device=device))[0] > 0

"""Is the run well? A robust z-score of loss and gradient norm against the last steps, and skipped steps in a row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megapix.config import HealthConfig
from megapix.errors import Trouble

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
LEAST_SPREAD = 0.01
"""The spread is taken to be at least this share of the median, so that a very even window cries no wolf."""


def robust_z(value: float, window: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `window`.

    (value - median) / max(1.4826 · median absolute deviation, 1 % of the median); infinite for a value that is not
    finite.
    """
    if not np.isfinite(value):
        return float("inf")
    median = float(np.median(window))
    spread = max(MAD_TO_SIGMA * float(np.median(np.abs(np.asarray(window) - median))), LEAST_SPREAD * abs(median))
    return (value - median) / spread if spread else float("inf") * (value > median)


@dataclass(frozen=True)
class Spike:
    """A spike that was found: where it began, and what was seen."""

    start: int
    """Position of the first step that stood out."""
    step: int
    """That step's number."""
    reason: str


class Sentinel:
    """Watches the applied steps of a run; a step's numbers enter the window only if it does not stand out.

    It says nothing until the window is full, at the start and after a spike.

    Attributes:
        recent: (loss, gradient norm) of the last steps, at most `window`.
        standing_out: position, number and reason of the last steps, if they stood out.
    """

    def __init__(
        self,
        config: HealthConfig,
        recent: Sequence[tuple[float, float]] = (),
        standing_out: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        self.config = config
        self.recent: deque[tuple[float, float]] = deque(recent, maxlen=config.window)
        self.standing_out = list(standing_out)

    @property
    def suspicious(self) -> bool:
        """Whether the last step stood out."""
        return bool(self.standing_out)

    def look(self, loss: float, grad_norm: float, position: int, step: int) -> Spike | None:
        """Take an applied step's mean loss and gradient norm before clipping; returns a spike when it is one.

        Args:
            position: position at which the step began.
            step: the step's number.
        """
        c = self.config
        if len(self.recent) < c.window:
            self.recent.append((loss, grad_norm))
            return None
        losses, norms = zip(*self.recent, strict=True)
        loss_z, norm_z = robust_z(loss, losses), robust_z(grad_norm, norms)
        seen = []
        if loss_z > c.loss_z:
            seen.append(f"loss {loss:.4g} is {loss_z:.1f} deviations above its median")
        if norm_z > c.grad_norm_z:
            seen.append(f"gradient norm {grad_norm:.4g} is {norm_z:.1f} deviations above its median")
        if not seen:
            self.standing_out.clear()
            self.recent.append((loss, grad_norm))
            return None
        self.standing_out.append((position, step, " and ".join(seen)))
        if len(self.standing_out) < c.patience:
            return None
        start, first, reason = self.standing_out[0]
        self.standing_out.clear()
        self.recent.clear()  # a run that goes on may have found a new level; it is learnt anew
        return Spike(start, first, f"steps {first} to {step}: {reason}, the last {c.window} steps'")


class Skips:
    """Counts skipped steps in a row, and ends a run that applies none."""

    def __init__(self, most: int, in_a_row: int = 0) -> None:
        self.most, self.in_a_row = most, in_a_row

    def count(self, applied: bool, step: int, reason: str) -> None:
        """Take a step's outcome.

        Raises:
            Trouble: `most` steps in a row were skipped.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if self.in_a_row >= self.most:
            raise Trouble(
                f"{self.in_a_row} steps in a row were skipped, the last is step {step}: {reason}; the run diverged "
                "(health.max_skipped)"
            )

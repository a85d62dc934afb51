"""The health of a run: robust z-scores of loss and gradient norm against the last steps, and skipped steps in a row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megapix.config import HealthConfig
from megapix.errors import RunError

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
LEAST_SPREAD = 0.01
"""The spread is taken to be at least this share of the median, so that a very even window gives no false alarm."""


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
    """A spike: where it began, and why it is one."""

    start: int
    """Position of its first outlier."""
    step: int
    """That step's number."""
    reason: str


class Sentinel:
    """Watches the applied steps of a run for outliers; only the other steps enter the window.

    It reports nothing until the window is full, at the start and after a spike.

    Attributes:
        recent: (loss, gradient norm) of the last steps, at most `window`.
        outliers: position, number and reason of the last steps, if they are outliers.
    """

    def __init__(
        self,
        config: HealthConfig,
        recent: Sequence[tuple[float, float]] = (),
        outliers: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        self.config = config
        self.recent: deque[tuple[float, float]] = deque(recent, maxlen=config.window)
        self.outliers = list(outliers)

    @property
    def suspicious(self) -> bool:
        """Whether the last step is an outlier."""
        return bool(self.outliers)

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
        reasons = []
        if loss_z > c.loss_z:
            reasons.append(f"loss {loss:.4g} is {loss_z:.1f} deviations above its median")
        if norm_z > c.grad_norm_z:
            reasons.append(f"gradient norm {grad_norm:.4g} is {norm_z:.1f} deviations above its median")
        if not reasons:
            self.outliers.clear()
            self.recent.append((loss, grad_norm))
            return None
        self.outliers.append((position, step, " and ".join(reasons)))
        if len(self.outliers) < c.patience:
            return None
        start, first, reason = self.outliers[0]
        self.outliers.clear()
        self.recent.clear()  # a run that continues may have reached a new level: collect it again
        return Spike(start, first, f"steps {first} to {step}: {reason}, the last {c.window} steps'")


class Skips:
    """Counts skipped steps in a row, and ends a run that applies none."""

    def __init__(self, most: int, in_a_row: int = 0) -> None:
        self.most, self.in_a_row = most, in_a_row

    def count(self, applied: bool, step: int, reason: str) -> None:
        """Take a step's outcome.

        Raises:
            RunError: `most` steps in a row were skipped.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if self.in_a_row >= self.most:
            raise RunError(
                f"{self.in_a_row} steps in a row were skipped, the last is step {step}: {reason}; the run diverged "
                "(health.max_skipped)"
            )

"""How often to save: the interval that loses the least time to checkpoints and failures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapix.costs.assumptions import PlanOptions

STATE_WIDTH = 16
"""Bytes of a checkpoint per parameter: weights, two moments and EMA in fp32."""


@dataclass(frozen=True)
class Interval:
    """A checkpoint interval and what it costs, in seconds and bytes."""

    size: int
    """Bytes of a checkpoint."""
    stall: float
    """Seconds that training waits for one: the copy to host memory, or in the foreground the writing too."""
    writing: float
    """Seconds until it is written."""
    failures: float
    """Mean seconds between two failures of the run."""
    best: float
    """Seconds from one checkpoint to the next."""
    lost: float
    """Expected seconds of work that a failure loses, including the restart."""

    @property
    def waste(self) -> float:
        """Expected share of the time that goes to saving and to failures."""
        return self.stall / self.best + self.lost / self.failures


def interval(psi: int, ranks: int, nodes: int, background: bool, options: PlanOptions) -> Interval:
    """The interval sqrt(2·δ·M) for a stall of δ and M seconds between failures.

    Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; Daly, "A higher order
    estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, whose further terms vanish where
    δ is far below M. No shorter than a checkpoint takes to write: the next one waits for it.
    """
    a, size = options.assume, STATE_WIDTH * psi
    writing = size / (a.write * 1e9)
    stall = size / ranks / (a.pcie * 1e9) + (0.0 if background else writing)
    failures = options.mtbf * 3600 / nodes
    best = max(math.sqrt(2 * stall * failures), writing)
    # Half an interval, and the time in which the newest checkpoint was not yet whole.
    return Interval(size, stall, writing, failures, best, best / 2 + (writing if background else 0.0) + a.restart)

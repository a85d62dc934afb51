"""AdamW whose state holds the EMA of its parameters.

Under ZeRO-2 the optimizer's parameters are this rank's fp32 partition, so the EMA is kept in fp32 shards: 4 bytes ×
parameters / ranks, without communication. It moves only when the optimizer steps, so a skipped step cannot move it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EMA = "ema"
"""Key of the EMA in each parameter's optimizer state."""


class AdamWWithEMA(torch.optim.AdamW):
    """torch's AdamW; after each step `ema ← ema + (1 - decay)·(p - ema)`, starting from the initial weights."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float, ema_decay: float
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def begin(self) -> None:
        """Make the whole state before the first step: no steps, zero moments, the EMA a copy of the weights."""
        for p in self._params():
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.zeros((), dtype=torch.float32), **zeros, EMA: p.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = super().step(closure)
        self.update_ema()
        return loss

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA towards the weights that the step has made; a part of `step`."""
        for p in self._params():
            if p.grad is not None:
                self.state[p][EMA].lerp_(p, 1.0 - self.ema_decay)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

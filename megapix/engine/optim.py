"""AdamW whose state holds the EMA of its parameters.

Under ZeRO-2 the optimizer's parameters are this rank's fp32 partition, so the EMA is kept in fp32 shards: 4 bytes ×
parameters / ranks, without communication. It moves only when the optimizer steps, so a skipped step cannot move it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megapix.engine.clipping import ClippedMean

EMA = "ema"
"""Key of the EMA in each parameter's optimizer state."""


class AdamWWithEMA(torch.optim.AdamW):
    """torch's AdamW; after each step `ema ← ema + (1 - decay)·(p - ema)`, starting from the initial weights.
    `ema_decay` is the decay, or gives that of an applied step, counted from 1.

    torch's foreach implementation equals its for-loop one bit for bit and makes fewer temporaries; `fused` computes a
    step in one pass over memory, equal but for rounding.

    Set `clipping`, and its parameters' gradients are sums: `step` takes their clipped mean, and takes no step, calling
    `skipped`, if it is not finite.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        ema_decay: float | Callable[[int], float],
        fused: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, foreach=not fused, fused=fused)
        self.ema_decay, self.fused = ema_decay, fused
        self.steps = 0
        """Applied steps, which the state counts too, perhaps on a device."""
        self.clipping: ClippedMean | None = None
        self.skipped: Callable[[], None] = lambda: None

    @torch.no_grad()
    def begin(self) -> None:
        """Make the whole state before the first step: no steps, zero moments, the EMA a copy of the weights."""
        for p in self._params():
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            # The fused implementation counts on the device; for the others that would be a wait in each step.
            step = torch.zeros((), dtype=torch.float32, device=p.device if self.fused else "cpu")
            self.state[p] = {"step": step, **zeros, EMA: p.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.clipping and not self._clip(self.clipping):
            self.skipped()
            return None
        loss = super().step(closure)
        self.update_ema()
        return loss

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the EMA towards the weights that the step has made; a part of `step`."""
        self.steps += 1
        decay = self.ema_decay(self.steps) if callable(self.ema_decay) else self.ema_decay
        for p in self._params():
            if p.grad is not None:
                self.state[p][EMA].lerp_(p, 1.0 - decay)

    def _clip(self, clipping: ClippedMean) -> bool:
        """Make the one parameter's gradient the clipped mean; False if it is not finite."""
        (p,) = self._params()
        assert p.grad is not None
        divisor = clipping.divisor(p.grad)
        if divisor is None:
            return False
        if self.fused and p.is_cuda:  # it divides in its own pass
            self.grad_scale = divisor
        elif clipping.divides:
            p.grad.mul_(1.0 / divisor)
        return True

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

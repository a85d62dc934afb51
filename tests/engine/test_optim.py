"""AdamWWithEMA, and torch's implementations of AdamW, against the plain one on a flat vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapix.engine.optim import EMA, AdamWWithEMA

STEPS, NUMBERS, DECAY = 20, 10_001, 0.99
"""An odd length, so that vector instructions have a rest."""
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}


def trained(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    """The weights after each of some steps, on gradients that depend on the seed alone."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        p.grad = torch.randn(NUMBERS, generator=generator)
        optimizer.step()
        found.append(p.detach().clone())
    return found


def start() -> Tensor:
    return torch.nn.Parameter(torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)))


def plain(**implementation: bool) -> list[Tensor]:
    p = start()
    return trained(torch.optim.AdamW([p], **SETTINGS, **implementation), p)


def test_ours_is_plain_adamw_bit_for_bit_with_a_dense_ema() -> None:
    p = start()
    ours = AdamWWithEMA([p], ema_decay=DECAY, **SETTINGS)
    ours.begin()
    dense, found = p.detach().clone(), trained(ours, p)
    for mine, theirs in zip(found, plain(foreach=False, fused=False), strict=True):
        assert torch.equal(mine, theirs)
        dense = torch.lerp(dense, mine, 1 - DECAY)
    assert torch.equal(ours.state[p][EMA], dense)


def test_ours_fused_is_plain_to_rounding() -> None:
    p = start()
    ours = AdamWWithEMA([p], ema_decay=DECAY, fused=True, **SETTINGS)
    ours.begin()
    for mine, theirs in zip(trained(ours, p), plain(foreach=False), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)
    assert int(ours.state[p]["step"]) == STEPS


def test_foreach_is_plain_bit_for_bit() -> None:
    for mine, theirs in zip(plain(foreach=True), plain(foreach=False), strict=True):
        assert torch.equal(mine, theirs)

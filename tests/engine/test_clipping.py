"""The norm of a flat gradient, what it is divided by, and the steps that are not taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megapix.engine.clipping import CHUNK, ClippedMean, sum_of_squares
from megapix.engine.optim import EMA, AdamWWithEMA


@pytest.mark.parametrize("numbers", [1, 4095, CHUNK, CHUNK + 17])
def test_the_sum_of_squares_is_numpys(numbers: int) -> None:
    """In fp64 over all numbers; to fp32's nearest they are equal."""
    vector = torch.randn(numbers, generator=torch.Generator().manual_seed(numbers)) * 1e-3
    expected = np.float32(np.square(vector.numpy().astype(np.float64)).sum())
    assert np.float32(sum_of_squares(vector).item()) == expected


@pytest.mark.parametrize(
    ("terms", "most", "factor"),
    [(1, 0.0, 1.0), (6, 0.0, 1.0), (6, 10.0, 1.0), (6, 0.25, 0.25 / (5 / 6 + 1e-6)), (1, 5.0, 1 / (1 + 1e-6 / 5))],
)
def test_the_divisor_by_hand(terms: int, most: float, factor: float) -> None:
    """A sum of norm 5 of `terms` gradients: its mean has the norm 5 / terms."""
    mean = ClippedMean(terms, most)
    found = mean.divisor(torch.tensor([3.0, 0.0, -4.0]))
    assert found is not None
    assert float(terms / found) == pytest.approx(factor, rel=2e-7)
    assert mean.norm == pytest.approx(5 / terms)
    assert mean.divides == (float(found) != 1.0)


def test_what_goes_along_with_the_norm() -> None:
    """Numbers of this rank come back added up, and do not mix with the norm; none, and there are none."""
    mean = ClippedMean(2, 1.0)
    mean.beside = torch.tensor([1.5, 0.0, 7.0], dtype=torch.float64)
    mean.divisor(torch.tensor([3.0, 4.0]))
    assert (mean.norm, mean.sums) == (2.5, [1.5, 0.0, 7.0])
    mean.beside = None
    mean.divisor(torch.tensor([3.0, 4.0]))
    assert (mean.norm, mean.sums) == (2.5, [])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("most", [0.0, 0.1, 100.0])
def test_a_step_is_that_of_the_clipped_mean(fused: bool, most: float) -> None:
    """Against torch's AdamW on the gradient that torch's own clipping leaves."""
    g, numbers, terms = torch.Generator().manual_seed(0), 8197, 3
    start, gradients = torch.randn(numbers, generator=g), torch.randn(4, numbers, generator=g) * 0.01
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = AdamWWithEMA([ours], 1e-2, (0.9, 0.99), 0.01, 0.9, fused)
    optimizer.begin()
    optimizer.clipping = ClippedMean(terms, most)
    reference = torch.optim.AdamW([plain], 1e-2, (0.9, 0.99), weight_decay=0.01)
    for gradient in gradients:
        ours.grad, plain.grad = gradient * terms, gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([plain], most or math.inf)
        optimizer.step()
        reference.step()
        assert optimizer.clipping.norm == pytest.approx(norm.item(), rel=1e-6)
    assert torch.allclose(optimizer.state[ours]["exp_avg"], reference.state[plain]["exp_avg"], rtol=1e-5, atol=1e-9)
    assert torch.allclose(ours, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 4097])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float, at: int) -> None:
    p = torch.nn.Parameter(torch.ones(4098))
    optimizer = AdamWWithEMA([p], 1e-2, (0.9, 0.99), 0.01, 0.9)
    optimizer.begin()
    told: list[str] = []
    optimizer.clipping, optimizer.skipped = ClippedMean(2, 1.0), lambda: told.append("skipped")
    p.grad = torch.zeros(4098)
    p.grad[at] = bad
    optimizer.step()
    assert told == ["skipped"]
    assert torch.equal(p, torch.ones_like(p))
    assert torch.equal(optimizer.state[p][EMA], torch.ones_like(p))
    assert int(optimizer.state[p]["step"]) == 0
    p.grad = torch.ones(4098)
    optimizer.step()
    assert told == ["skipped"]
    assert not torch.equal(p, torch.ones_like(p))

"""Losses and sampling in fp32, whatever the network computes in."""

from __future__ import annotations

import torch
from torch import Tensor

from megapix.diffusion.condition import classes
from megapix.diffusion.flow import squared_error
from megapix.diffusion.repa import alignment_loss
from megapix.diffusion.sampler import generate


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_of_a_bf16_network() -> None:
    prediction, target = random(5, 3, 6, 7, seed=0).bfloat16(), random(5, 3, 6, 7, seed=1)
    found = squared_error(prediction, target)
    assert found.dtype == torch.float32
    expected = (prediction.double() - target.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_the_distance_of_bf16_tokens_from_bf16_features() -> None:
    tokens, features = random(3, 7, 37, seed=0).bfloat16(), random(3, 7, 37, seed=1).bfloat16()
    found = alignment_loss(tokens, features)
    assert found.dtype == torch.float32
    a, b = tokens.double(), features.double()
    expected = 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_bf16_network_is_integrated_in_fp32() -> None:
    """A velocity that is the same at all times is added to the noise, in seven steps of guidance."""
    noise, velocity = random(3, 3, 6, 5, seed=0), random(3, 3, 6, 5, seed=1).bfloat16()
    unguided = random(3, 3, 6, 5, seed=2).bfloat16()

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return velocity if len(x) == 3 else torch.cat([velocity, unguided])

    label = classes(torch.zeros(3, dtype=torch.long), 1)
    found = generate(net, noise, label, "euler", steps=7, shift=2.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), noise.double() + velocity.double(), rtol=0, atol=3e-6)
    found = generate(net, noise, label, "euler", steps=7, guidance=1.7, interval=(-1.0, 1.0), shift=2.5)
    expected = noise.double() + 1.7 * velocity.double() - 0.7 * unguided.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)

"""The objective: directions with constant tensors, distributions against closed forms, draws as pure functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megapix import rng
from megapix.config import FlowConfig
from megapix.diffusion import flow
from megapix.diffusion.condition import classes
from megapix.rng import Purpose


def constant(value: float) -> torch.Tensor:
    return torch.full((2, 3, 4, 4), value)


def test_direction_from_noise_to_image() -> None:
    image, noise = constant(0.75), constant(-0.25)
    assert torch.equal(flow.velocity(image, noise), constant(1.0)), "the target is image minus noise"
    assert torch.equal(flow.interpolate(image, noise, torch.zeros(2)), noise), "t = 0 is noise"
    assert torch.equal(flow.interpolate(image, noise, torch.ones(2)), image), "t = 1 is the image"
    assert torch.equal(flow.interpolate(image, noise, torch.tensor([0.5, 0.25]))[:, 0, 0, 0], torch.tensor([0.25, 0.0]))


def test_squared_error_is_a_mean_for_each_image() -> None:
    prediction = torch.stack([torch.full((3, 4, 4), 3.0), torch.full((3, 4, 4), 0.5)])
    assert flow.squared_error(prediction, constant(1.0)).tolist() == [4.0, 0.25]
    assert flow.squared_error(prediction.bfloat16(), constant(1.0).bfloat16()).dtype == torch.float32


def test_images_span_minus_one_to_one() -> None:
    assert flow.to_images(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.8, 3.0)])
def test_timesteps_are_logit_normal_then_shifted(mean: float, std: float, shift: float) -> None:
    # At the p-quantile of u the time must be shift(sigmoid(mean + std · z_p)), z from the normal table.
    quantiles = {0.5: 0.0, 0.841344746: 1.0, 0.022750132: -2.0}
    t = flow.timesteps(torch.tensor(list(quantiles), dtype=torch.float64), FlowConfig(mean, std, shift))
    for value, z in zip(t.tolist(), quantiles.values(), strict=True):
        plain = 1 / (1 + math.exp(-(mean + std * z)))
        assert value == pytest.approx(plain / (plain + (1 - plain) * shift), rel=1e-5)
    assert t.dtype == torch.float32


def test_time_shift_moves_towards_noise() -> None:
    assert flow.time_shift(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.25, 1.0]


def test_draws_are_uniform_and_independent_between_purposes() -> None:
    positions = np.arange(100_000)
    u = {purpose: rng.uniform(3, purpose, positions) for purpose in Purpose}
    for values in u.values():
        assert 0.0 < values.min() < values.max() < 1.0
        assert np.abs(np.histogram(values, 20, (0, 1))[0] - 5000).max() < 350  # 5 standard deviations
    table = np.corrcoef(list(u.values()))
    assert np.abs(table - np.eye(len(u))).max() < 0.02
    assert np.abs(np.corrcoef(u[Purpose.FLIP][:-1], u[Purpose.FLIP][1:])[0, 1]) < 0.02


def test_draws_are_frozen() -> None:
    # SplitMix64 by hand, with Python's integers: these values define every run, so they may never change.
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((42 + golden) % 2**64) + 3 * golden) % 2**64)
    expected = [mix((key + (position + 1) * golden) % 2**64) for position in (0, 1, 10**12)]
    assert rng.bits(42, Purpose.TIMESTEP, np.array([0, 1, 10**12])).tolist() == expected


def test_label_dropout_replaces_the_stated_share_by_the_null_class() -> None:
    class Recorder:
        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.labels = y
            return x

    net, positions = Recorder(), np.arange(4000)
    images = torch.zeros(4000, 3, 1, 1, dtype=torch.uint8)
    labels = torch.arange(4000) % 9
    flow.training_loss(net, images, classes(labels, 9), positions, 0, FlowConfig(label_dropout=0.1))
    dropped = net.labels == 9
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(net.labels[~dropped], labels[~dropped])
    flow.training_loss(net, images, classes(labels, 9), positions, 0, FlowConfig(label_dropout=0.0))
    assert torch.equal(net.labels, labels)


def test_training_loss_of_the_exact_velocity_is_zero() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = flow.to_images(images)

    class Exact:
        """Knows the image, so it can read the noise off x_t: v = (x - x_t) / (1 - t)."""

        def __call__(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - x_t) / (1 - t)[:, None, None, None]

    loss, t = flow.training_loss(
        Exact(), images, classes(torch.zeros(4, dtype=torch.long), 1), np.arange(4), 0, FlowConfig()
    )
    assert loss.max().item() < 1e-10
    assert bool(((t > 0) & (t < 1)).all())

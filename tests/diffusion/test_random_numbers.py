"""What (seed, position) decides of the objective and of a drawn image, with random numbers of the tests' own."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import torch

from megapix.config import FlowConfig
from megapix.diffusion.condition import classes
from megapix.diffusion.flow import draw, noisy_batch
from megapix.diffusion.sampler import seeded_noise
from tests.support import random_numbers

SEED, NULL, SHAPE = 23, 7, (3, 6, 5)
POSITIONS = [*range(9), 13, 1_000_003, 2**40 + 9, 2**40 + 13]
CONFIG = FlowConfig(t_mean=0.3, t_std=0.7, time_shift=2.5, label_dropout=0.4)


def test_every_position_has_random_numbers_of_its_own() -> None:
    """Noise, time and dropout of 13 samples, of which some lie far away."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(POSITIONS), *SHAPE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(POSITIONS)) % NULL
    batch = noisy_batch(images, classes(labels, NULL), np.array(POSITIONS), SEED, CONFIG)
    assert batch.x_t.dtype == batch.t.dtype == batch.target.dtype == torch.float32
    dropped = []
    for i, position in enumerate(POSITIONS):
        x = images[i].double() / 127.5 - 1
        eps = random_numbers.normal(SEED, "noise", position, SHAPE).double()
        z = NormalDist(0.3, 0.7).inv_cdf(random_numbers.uniform(SEED, "timestep", position))
        plain = 1 / (1 + math.exp(-z))
        t = plain / (plain + (1 - plain) * 2.5)
        assert abs(batch.t[i].item() - t) < 1e-6, position
        assert (batch.x_t[i] - (t * x + (1 - t) * eps)).abs().max() < 1e-5, position
        assert (batch.target[i] - (x - eps)).abs().max() < 1e-6, position
        dropped.append(random_numbers.uniform(SEED, "label_dropout", position) < 0.4)
        assert batch.cond[0][i].item() == (NULL if dropped[-1] else labels[i].item()), position
    assert 2 <= sum(dropped) <= len(POSITIONS) - 2, "both kinds are there"


def test_every_position_has_philox_noise_of_its_own() -> None:
    """The same samples, all else unchanged; ready-made draws change nothing."""
    images = torch.full((len(POSITIONS), *SHAPE), 51, dtype=torch.uint8)  # -0.6
    condition, config = (
        classes(torch.zeros(len(POSITIONS), dtype=torch.long), NULL),
        replace(CONFIG, generator="philox"),
    )
    batch = noisy_batch(images, condition, np.array(POSITIONS), SEED, config)
    of_torch = noisy_batch(images, condition, np.array(POSITIONS), SEED, CONFIG)
    assert torch.equal(batch.t, of_torch.t)
    assert torch.equal(batch.cond[0], of_torch.cond[0])
    for target, position in zip(batch.target, POSITIONS, strict=True):
        eps = random_numbers.philox_normal(SEED, "noise", position, target.numel())
        assert (target.flatten() + 0.6 + torch.tensor(eps)).abs().max() < 1e-6, position
    drawn = noisy_batch(images, condition, np.array([0]), 0, config, draw(np.array(POSITIONS), SEED, config))
    assert torch.equal(drawn.x_t, batch.x_t)
    assert torch.equal(drawn.cond[0], batch.cond[0])


def test_every_drawn_image_has_noise_of_its_own() -> None:
    numbers = [*range(7), 97, 1_000_003]
    found = seeded_noise(5, numbers, (6, 5), torch.device("cpu"))
    for image, number in zip(found, numbers, strict=True):
        assert torch.equal(image, random_numbers.normal(5, "sample_noise", number, (3, 6, 5))), number
    for image, number in zip(seeded_noise(5, numbers, (6, 5), torch.device("cpu"), "philox"), numbers, strict=True):
        expected = torch.tensor(random_numbers.philox_normal(5, "sample_noise", number, 90))
        assert (image.flatten() - expected).abs().max() < 1e-6, number

"""The objective: rectified flow from noise (t = 0) to the image (t = 1), in pixels.

    x_t = t·x + (1 - t)·ε          v = x - ε          loss = mean (v_θ(x_t, t, y) - v)²

Everything here is a pure function of tensors. What is random about a sample follows from its position in the run:
`draw` computes on the host what takes a few numbers a sample, so that the loader's workers can do it ahead of the step,
and `megapix.diffusion.noise` makes the noise on the device of the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix import rng
from megapix.config import FlowConfig
from megapix.diffusion import noise
from megapix.diffusion.condition import Cond, Condition
from megapix.rng import Purpose


class Network(Protocol):
    """What the objective needs of a network, wrapped in an engine or not."""

    def __call__(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor: ...


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Shift times towards noise for larger images: t / (t + (1 - t)·shift)."""
    return t / (t + (1.0 - t) * shift)


def timesteps(uniform: Tensor, config: FlowConfig) -> Tensor:
    """Logit-normal times from uniform numbers, then the time shift: float64 [B] in (0, 1) -> float32 [B] in [0, 1]."""
    normal = torch.special.ndtri(uniform) * config.t_std + config.t_mean
    return time_shift(torch.sigmoid(normal), config.time_shift).float()


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = t·x + (1 - t)·ε: images and noise [B, C, H, W], t [B] -> [B, C, H, W]."""
    t = t[:, None, None, None]
    return t * x + (1.0 - t) * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """The target v = x - ε: it points from noise to the image."""
    return x - eps


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per image in fp32: [B, C, H, W] twice -> [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def to_images(uint8: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] -> float32 in [-1, 1]."""
    return uint8.float() / 127.5 - 1.0


class Objective:
    """What of the objective goes through all numbers of the images, apart, so that it can be compiled."""

    def words(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Random words of the noise: `noise.words`."""
        return noise.words(keys, start, stop)

    def noised(self, images: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target, float32, from uint8 images, noise [B, C, H, W] and times [B]."""
        x = to_images(images)
        return interpolate(x, eps, t), velocity(x, eps)

    def squared_error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """`squared_error`."""
        return squared_error(prediction, target)


OBJECTIVE_SIZES = {"words": ("B",), "noised": ("B.HW", "B.HW", "B"), "squared_error": ("B.HW", "B.HW")}
"""Method of Objective -> sizes of its tensors, in the letters of `engine/compiled.py`."""
PLAIN = Objective()


@dataclass(frozen=True)
class NoisyBatch:
    """A micro batch at random times: the network's inputs and its target."""

    x_t: Tensor
    """Noisy images, float32 [B, 3, H, W]."""
    t: Tensor
    """Times, float32 [B]."""
    cond: Cond
    """Cond tensors, null where they are dropped."""
    target: Tensor
    """The velocity, float32 [B, 3, H, W]."""


class Draws(NamedTuple):
    """What is random about the samples of a micro batch but for the noise itself, on the host."""

    t: Tensor
    """Times, float32 [B]."""
    dropped: Tensor
    """Whether the null condition takes the place of the sample's own, bool [B]."""
    keys: Tensor
    """Keys of the noise, int64 [B]: 64 random bits each."""


def draw(positions: NDArray[np.int64], seed: int, config: FlowConfig) -> Draws:
    """The random numbers of the samples at `positions`, int64 [B]."""
    t = timesteps(torch.from_numpy(rng.uniform(seed, Purpose.TIMESTEP, positions)), config)
    dropped = rng.uniform(seed, Purpose.LABEL_DROPOUT, positions) < config.label_dropout
    return Draws(t, torch.from_numpy(dropped), noise.keys_of(rng.bits(seed, Purpose.NOISE, positions)))


def noisy_batch(
    images: Tensor,
    condition: Condition,
    positions: NDArray[np.int64],
    seed: int,
    config: FlowConfig,
    draws: Draws | None = None,
    objective: Objective = PLAIN,
) -> NoisyBatch:
    """The samples at `positions` with their noise, times and dropped conditions; arguments as in `training_loss`."""
    draws = draws or draw(positions, seed, config)
    eps = noise.normal(draws.keys, images.shape[1:], images.device, config.generator, objective.words)
    t = draws.t.to(images.device, non_blocking=True)
    cond = condition.dropped(draws.dropped.to(images.device, non_blocking=True))
    x_t, target = objective.noised(images, eps, t)
    return NoisyBatch(x_t, t, cond, target)


def training_loss(
    net: Network,
    images: Tensor,
    condition: Condition,
    positions: NDArray[np.int64],
    seed: int,
    config: FlowConfig,
    draws: Draws | None = None,
    objective: Objective = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Loss per sample of a micro batch, with the random numbers of its position in the run.

    Args:
        net: called as net(x_t, t, *cond).
        images: uint8 [B, 3, H, W].
        condition: of the images; null takes its place with probability `config.label_dropout`.
        positions: int64 [B].
        draws: `draw` of these positions, seed and configuration, where that has been done; in page-locked memory it
            reaches a GPU without a wait.
        objective: with parts that are compiled.

    Returns:
        Squared error [B] float32, with gradient, and t [B] float32.
    """
    batch = noisy_batch(images, condition, positions, seed, config, draws, objective)
    return objective.squared_error(net(batch.x_t, batch.t, *batch.cond), batch.target), batch.t

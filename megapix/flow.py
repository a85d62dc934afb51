"""The objective: rectified flow from noise (t = 0) to the image (t = 1), in pixels.

    x_t = t·x + (1 - t)·ε          v = x - ε          loss = mean (v_θ(x_t, t, y) - v)²

Everything here is a pure function of tensors; random numbers come from `megapix.draws`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix import draws
from megapix.condition import Condition, Told
from megapix.config import FlowConfig
from megapix.draws import Purpose


class Network(Protocol):
    """What the objective needs of a network, wrapped in an engine or not."""

    def __call__(self, x: Tensor, t: Tensor, *told: Tensor) -> Tensor: ...


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise for larger images: t / (t + (1 - t)·shift)."""
    return t / (t + (1.0 - t) * shift)


def timesteps(uniform: Tensor, config: FlowConfig) -> Tensor:
    """Logit-normal times from uniform numbers, then the time shift: float64 [B] in (0, 1) -> float32 [B] in [0, 1]."""
    normal = torch.special.ndtri(uniform) * config.t_std + config.t_mean
    return time_shift(torch.sigmoid(normal), config.time_shift).float()


def noise(keys: NDArray[np.uint64], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise, an image for each key: float32 [len(keys), *shape].

    Image i depends on keys[i] alone, so batching cannot change it. CPU and GPU have different streams, and torch's CPU
    generator takes the low 32 bits of the key as its seed.
    """
    out = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device)
    for image, key in zip(out, keys, strict=True):
        generator.manual_seed(int(key) & (2**63 - 1))
        image.normal_(generator=generator)
    return out


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = t·x + (1 - t)·ε: images and noise [B, C, H, W], t [B] -> [B, C, H, W]."""
    t = t[:, None, None, None]
    return t * x + (1.0 - t) * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """The target v = x - ε: it points from noise to the image."""
    return x - eps


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image in fp32: [B, C, H, W] twice -> [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def to_images(uint8: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] -> float32 in [-1, 1]."""
    return uint8.float() / 127.5 - 1.0


@dataclass(frozen=True)
class Question:
    """What the network is asked about a micro batch, and the answer."""

    x_t: Tensor
    """Noisy images, float32 [B, 3, H, W]."""
    t: Tensor
    """Times, float32 [B]."""
    told: Told
    """What is said of each image, or nothing."""
    target: Tensor
    """The velocity, float32 [B, 3, H, W]."""


def question(
    images: Tensor, condition: Condition, positions: NDArray[np.int64], seed: int, config: FlowConfig
) -> Question:
    """What the network is asked about the samples at `positions`; the rest as in `training_loss`."""
    x = to_images(images)
    eps = noise(draws.bits(seed, Purpose.NOISE, positions), x.shape[1:], x.device)
    t = timesteps(torch.from_numpy(draws.uniform(seed, Purpose.TIMESTEP, positions)), config).to(x.device)
    dropped = draws.uniform(seed, Purpose.LABEL_DROPOUT, positions) < config.label_dropout
    told = condition.dropped(torch.from_numpy(dropped).to(x.device))
    return Question(interpolate(x, eps, t), t, told, velocity(x, eps))


def training_loss(
    net: Network, images: Tensor, condition: Condition, positions: NDArray[np.int64], seed: int, config: FlowConfig
) -> tuple[Tensor, Tensor]:
    """Loss of each sample of a micro batch, with the random numbers of its position in the run.

    Args:
        net: called as net(x_t, t, *told).
        images: uint8 [B, 3, H, W].
        condition: what the images are about; dropped for a part of them.
        positions: int64 [B].

    Returns:
        Squared error [B] float32, with gradient, and t [B] float32.
    """
    asked = question(images, condition, positions, seed, config)
    return squared_error(net(asked.x_t, asked.t, *asked.told), asked.target), asked.t

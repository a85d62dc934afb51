"""REPA: the patch tokens after one block are led to a frozen encoder's features of the clean image.

    loss = mean (v_θ(x_t, t, y) - v)² + weight · mean (1 - cos(h(s_l), f(x)))

s_l are the patch tokens after block l, h the projector (`model/aligned.py`), f the encoder (`encoder.py`), whose
features may have been computed before (`features.py`); the second mean is over images and the cells of the encoder's
grid. Source: arXiv 2410.06940, in the form that PixelDiT uses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megapix import flow
from megapix.condition import Condition
from megapix.config import FlowConfig, RepaConfig


class Student(Protocol):
    """What the objective needs of a network with a projector, wrapped in an engine or not."""

    def __call__(self, x: Tensor, t: Tensor, *told: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]: ...


def active(config: RepaConfig, images_seen: int) -> bool:
    """Whether a step that starts at `images_seen` is aligned; `config` is resolved (spans are images or 'never')."""
    return config.wanted and (config.stop_at == "never" or images_seen < int(config.stop_at))


def apart(projected: Tensor, features: Tensor) -> Tensor:
    """1 - cos of each cell, its mean over an image's cells, in fp32: [B, G, F] twice -> [B], 0 (aligned) to 2."""
    return 1.0 - F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)


def training_loss(
    net: Student,
    features: Tensor,
    images: Tensor,
    condition: Condition,
    positions: NDArray[np.int64],
    seed: int,
    config: FlowConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flow.training_loss` of each sample, t, and how far its tokens are from the features: [B] float32 each.

    One forward pass of the network gives both.

    Args:
        features: the encoder's, of these images: [B, rows, columns, F].
    """
    asked = flow.question(images, condition, positions, seed, config)
    rows, columns = features.shape[1:3]
    velocity, projected = net(asked.x_t, asked.t, *asked.told, grid=(rows, columns))
    return flow.squared_error(velocity, asked.target), asked.t, apart(projected, features.flatten(1, 2))

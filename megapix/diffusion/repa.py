"""REPA: the patch tokens after one block are aligned with a frozen encoder's features of the clean image.

    loss = mean (v_θ(x_t, t, y) - v)² + weight · mean (1 - cos(h(s_l), f(x)))

s_l are the patch tokens after block l, h the projector (`model/projector.py`), f the encoder (`encoders/image.py`),
whose features may have been computed before (`shards/image_features.py`). The second mean, the alignment loss, is over
images and the cells of the encoder's grid. Source: arXiv 2410.06940, in the form that PixelDiT uses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megapix.config import FlowConfig, RepaConfig
from megapix.diffusion import flow
from megapix.diffusion.condition import Condition


class Student(Protocol):
    """What the objective needs of a network with a projector, wrapped in an engine or not."""

    def __call__(self, x: Tensor, t: Tensor, *cond: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]: ...


def active(config: RepaConfig, images_seen: int) -> bool:
    """Whether a step that starts at `images_seen` is aligned; `config` is resolved (spans are images or 'never')."""
    return config.wanted and (config.stop_at == "never" or images_seen < int(config.stop_at))


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """1 - cos per cell, averaged over an image's cells, in fp32: [B, G, F] twice -> [B], 0 (aligned) to 2."""
    return 1.0 - F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)


def training_loss(
    net: Student,
    features: Tensor,
    images: Tensor,
    condition: Condition,
    positions: NDArray[np.int64],
    seed: int,
    config: FlowConfig,
    draws: flow.Draws | None = None,
    objective: flow.Objective = flow.PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flow.training_loss` per sample, t, and the alignment loss per sample: [B] float32 each.

    One forward pass of the network gives both.

    Args:
        features: the encoder's, of these images: [B, rows, columns, F].
    """
    batch = flow.noisy_batch(images, condition, positions, seed, config, draws, objective)
    rows, columns = features.shape[1:3]
    velocity, projected = net(batch.x_t, batch.t, *batch.cond, grid=(rows, columns))
    error = objective.squared_error(velocity, batch.target)
    return error, batch.t, alignment_loss(projected, features.flatten(1, 2))

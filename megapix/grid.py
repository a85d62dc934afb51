"""The sample grid of a run at work: each rank draws its share from the EMA, every rank gets the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megapix import dist, engine, sample
from megapix.condition import Condition
from megapix.config import Config
from megapix.dist import World


def ema_grid(
    engine_: Any,
    config: Config,
    rows: Condition,
    world: World,
    device: torch.device,
    each_step: Callable[[], None],
) -> np.ndarray:
    """A grid of EMA samples, one class or prompt a row: uint8 [H, W, 3].

    Args:
        rows: what each row is about.
        each_step: called before each step of the sampler, equally often on every rank; an exception ends the sampling.
    """
    columns = config.log.grid_columns
    numbers = list(range(len(rows) * columns))
    mine = numbers[world.rank :: world.size]
    noise = sample.seeded_noise(config.seed, mine, (config.data.image_size, config.data.image_size), device)
    condition = rows.at([n // columns for n in mine])
    with engine.ema_weights(engine_) as net:
        if mine:
            images = sample.draw(net, noise, condition, config.sampling, each_step)
        else:  # more ranks than images: nothing to draw
            images = noise
            for _ in range(config.sampling.steps):
                each_step()
    shares = dist.gather(world, sample.to_uint8(images))
    grid = np.empty((len(numbers), *shares[0].shape[1:]), np.uint8)
    for rank, share in enumerate(shares):
        grid[rank :: world.size] = share
    return sample.grid(grid, columns)

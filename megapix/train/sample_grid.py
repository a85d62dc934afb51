"""The sample grid during training: each rank samples its share from the EMA, every rank gets the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megapix.config import Config
from megapix.diffusion.condition import Condition
from megapix.diffusion.pictures import grid, to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.dist import World, gather
from megapix.engine.zero2 import Zero2Engine


def ema_grid(
    engine: Zero2Engine,
    config: Config,
    rows: Condition,
    world: World,
    device: torch.device,
    each_step: Callable[[], None],
) -> np.ndarray:
    """A grid of EMA samples, one class or prompt a row: uint8 [H, W, 3].

    Args:
        rows: condition of the rows.
        each_step: called before each step of the sampler, equally often on every rank; an exception ends the sampling.
    """
    columns = config.log.grid_columns
    numbers = list(range(len(rows) * columns))
    mine = numbers[world.rank :: world.size]
    size = config.data.image_size, config.data.image_size
    noise = seeded_noise(config.seed, mine, size, device, config.flow.generator)
    condition = rows.at([n // columns for n in mine])
    with engine.ema_weights() as net:
        if mine:
            images = generate_as(net, noise, condition, config.sampling, each_step)
        else:  # more ranks than images: none to sample
            images = noise
            for _ in range(config.sampling.steps):
                each_step()
    shares = gather(world, to_uint8(images))
    pixels = np.empty((len(numbers), *shares[0].shape[1:]), np.uint8)
    for rank, share in enumerate(shares):
        pixels[rank :: world.size] = share
    return grid(pixels, columns)

"""The sample grid during training: each rank samples its share from the EMA, rank 0 gets the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed

from megapix.config import Config
from megapix.diffusion.condition import Condition
from megapix.diffusion.pictures import grid, to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.dist import World
from megapix.engine.zero2 import Zero2Engine


def ema_grid(
    engine: Zero2Engine,
    config: Config,
    rows: Condition,
    world: World,
    device: torch.device,
    each_step: Callable[[], None],
) -> np.ndarray | None:
    """A grid of EMA samples, one class or prompt a row: uint8 [H, W, 3] on rank 0, None on the others.

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
    pixels = _on_main(to_uint8(images), len(numbers), (*size, 3), world, device)
    return grid(pixels, columns) if world.main else None


def _on_main(mine: np.ndarray, count: int, shape: tuple[int, ...], world: World, device: torch.device) -> np.ndarray:
    """All images, on rank 0: `count` of this shape, dealt out round robin; others get an empty array. They go one by
    one, so that no rank but rank 0 ever holds more than one beside its own, however many ranks there are."""
    if world.size == 1:
        return mine
    mine, pixels = np.ascontiguousarray(mine), np.empty((count * world.main, *shape), np.uint8)
    for number in range(count):
        owner, place = number % world.size, number // world.size
        image = (
            torch.from_numpy(mine[place]).to(device)
            if owner == world.rank
            else torch.empty(shape, dtype=torch.uint8, device=device)
        )
        torch.distributed.broadcast(image, owner)
        if world.main:
            pixels[number] = image.cpu()
    return pixels

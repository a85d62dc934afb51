"""Validation loss during training: raw and EMA weights on the same images, noise and times each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megapix import rng
from megapix.conditioning.conditioner import Conditioner
from megapix.config import Config
from megapix.data.arrays import Extras
from megapix.data.loader import MicroBatches
from megapix.data.locate import Located
from megapix.diffusion import flow, noise
from megapix.diffusion.flow import Network
from megapix.dist import World, gather, merge_round_robin, round_robin
from megapix.engine.zero2 import Zero2Engine
from megapix.errors import InputError, StorageError
from megapix.rng import Purpose

TIMES = tuple((i + 0.5) / 8 for i in range(8))
"""The times at which the loss is measured."""
SEED = 0
"""Of the choice of images and their noise; not the run's, so that runs can be compared."""
GROUP = 16
"""Images of one forward pass, on any number of ranks: the sizes of matmuls must not change the rounding."""


class ValidationLoss:
    """The images of a validation index that are used, and this rank's share of them.

    Args:
        located: the validation data set.
        config: the run's resolved configuration.
        conditioner: makes a batch's condition.
        extras: what the loader must read for it.
    """

    def __init__(
        self,
        located: Located,
        config: Config,
        conditioner: Conditioner,
        extras: Extras,
        world: World,
        device: torch.device,
    ) -> None:
        self._conditioner, self._world, self._device = conditioner, world, device
        self._generator = config.flow.generator
        total = located.index.samples
        count = min(config.validation.samples or total, total)
        groups = -(-count // GROUP)
        if len(located.index.bucket_samples) > 1:  # a group holds images of one size
            groups = max(1, count // GROUP)
            count = groups * GROUP
        positions = np.arange(count, dtype=np.int64)
        self._groups = [positions[i * GROUP : (i + 1) * GROUP] for i in range(groups)]
        reading = replace(config.data, path=config.validation.path, flip=False, shuffle_window=0, reading_groups=1)
        self._batches = MicroBatches(located, reading, SEED, GROUP, extras)

    def losses(self, engine: Zero2Engine, each_group: Callable[[], None]) -> dict[str, float]:
        """Scalars: mean squared error of the velocity at TIMES, of raw and EMA weights. Every rank calls it.

        Args:
            each_group: called before each group of images, equally often on every rank; an exception ends it.

        Raises:
            InputError: an image that cannot be read.
        """
        row = {}
        for kind, weights in (("raw", engine.raw_weights), ("ema", engine.ema_weights)):
            with weights() as net:
                means = self._means(net, each_group)
            row[f"validation/loss_{kind}"] = sum(means) / len(TIMES)
            row |= {f"validation/{kind}_t_{t:.4f}": mean for t, mean in zip(TIMES, means, strict=True)}
        return row

    @torch.no_grad()
    def _means(self, net: Network, each_group: Callable[[], None]) -> list[float]:
        """Mean over all images at each of TIMES; summed in the order of the groups, whichever rank computed them."""
        mine: list[list[float]] = []
        for number in round_robin(self._world, len(self._groups)):
            each_group()
            if number is not None:
                mine.append(self._sums(net, number).tolist())
        sums = merge_round_robin(gather(self._world, mine))
        images = sum(len(group) for group in self._groups)
        return [sum(column) / images for column in zip(*sums, strict=True)]

    def _sums(self, net: Network, number: int) -> Tensor:
        """Sums over one group of images at each of TIMES: float64 [8]."""
        batch = self._batches[self._groups[number]]
        if isinstance(batch, (InputError, StorageError)):
            raise batch
        x = flow.to_images(batch.images.to(self._device))
        cond = self._conditioner.of(batch).cond
        keys = noise.keys_of(rng.bits(SEED, Purpose.VALIDATION_NOISE, batch.positions))
        eps = noise.normal(keys, x.shape[1:], x.device, self._generator)
        sums = []
        for time in TIMES:
            t = torch.full((len(x),), time, device=x.device)
            prediction = net(flow.interpolate(x, eps, t), t, *cond)
            sums.append(flow.squared_error(prediction, flow.velocity(x, eps)).double().sum())
        return torch.stack(sums)

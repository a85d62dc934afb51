"""Scores of a run at work: a few images from the EMA against reference statistics, as `megapix evaluate` scores many.

The extractor stands beside the trained network: no engine, EMA or checkpoint knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from megapix import dist, engine
from megapix.conditioner import Conditioner
from megapix.config import Config
from megapix.dist import World
from megapix.evaluation.images import Images, draw
from megapix.evaluation.scores import score
from megapix.evaluation.standard import Standard
from megapix.evaluation.threads import one_thread

SEED = 0
"""Of the noise: the default of `megapix evaluate`, and not the run's, so that runs can be compared."""


Block = tuple[np.ndarray, np.ndarray, bool]
"""Features and logits of a block of images, and whether they are finite."""


class SmallEvaluation:
    """The images that are scored, and what they are measured by.

    Args:
        standard: its extractor is moved to `device`.
        conditioner: whose classes or captions are drawn, in their order.
        config: the run's resolved configuration.
    """

    def __init__(
        self, standard: Standard, conditioner: Conditioner, config: Config, world: World, device: torch.device
    ) -> None:
        self._standard, self._world, self._device = standard, world, device
        e, size = config.evaluation, config.data.image_size
        subjects = range(conditioner.subjects)
        self._images = Images(e.count, e.batch, subjects, conditioner.told, SEED, (size, size), config.sampling)
        standard.extractor.to(device)

    def scores(self, engine_: Any, listen: Callable[[str], None]) -> dict[str, float]:
        """Scalars, on every rank: each score that the reference allows. Every rank calls it.

        Args:
            listen: called with a phase, 'evaluate' before each step of the sampler and 'score' at the end, equally
                often on every rank; an exception from it ends the evaluation.
        """
        # On CPUs matrix products add in another order on several threads, and ranks may have any number of them.
        with one_thread() if self._device.type == "cpu" else nullcontext():
            mine = self._draw(engine_, partial(listen, "evaluate"))
        listen("score")
        shares = dist.gather_on_main(self._world, mine)
        row = self._score(dist.in_order(shares)) if shares else {}
        return dist.gather(self._world, row)[0]

    def _draw(self, engine_: Any, each_step: Callable[[], None]) -> list[Block]:
        """Features and logits of this rank's blocks: every `ranks`-th one."""
        images, mine = self._images, []
        with engine.ema_weights(engine_) as net:
            for block in dist.turns(self._world, images.blocks):
                if block is not None:
                    drawn = draw(images, block, net, self._standard.extractor, self._device, each_step)
                    mine.append((drawn.features, drawn.logits, drawn.finite))
                else:  # the last turn has no block for this rank
                    for _ in range(images.sampling.steps):
                        each_step()
        return mine

    def _score(self, blocks: list[Block]) -> dict[str, float]:
        """The scores of all blocks, in their order, whoever has drawn them."""
        if not all(finite for *_, finite in blocks):
            dist.warn("the EMA's images are not finite: they are not scored")
            return {}
        features, logits = (np.concatenate([block[part] for block in blocks]) for part in (0, 1))
        found = score(features, logits, self._standard.reference)
        return {f"evaluation/{name}": value for name, value in found.items() if value is not None}

"""Scores during training: a few samples from the EMA against reference statistics, as `megapix evaluate` scores many.

The extractor is no part of the trained network: no engine, EMA or checkpoint knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from megapix.conditioning.conditioner import Conditioner
from megapix.config import Config
from megapix.dist import World, gather, gather_on_main, merge_round_robin, round_robin, warn
from megapix.engine.zero2 import Zero2Engine
from megapix.evaluation.images import Images, generate_images
from megapix.evaluation.reference import Standard
from megapix.evaluation.scores import one_thread, score

SEED = 0
"""Of the noise: the default of `megapix evaluate`, and not the run's, so that runs can be compared."""

Block = tuple[np.ndarray, np.ndarray, bool]
"""Features and logits of a block of images, and whether they are finite."""


class SmallEvaluation:
    """The samples that are scored, and the reference that they are scored against.

    Args:
        standard: its extractor is moved to `device`.
        conditioner: its classes or captions are sampled in their order.
        config: the run's resolved configuration.
    """

    def __init__(
        self, standard: Standard, conditioner: Conditioner, config: Config, world: World, device: torch.device
    ) -> None:
        self._standard, self._world, self._device = standard, world, device
        c, size = config.evaluation, config.data.image_size
        subjects = range(conditioner.subjects)
        of, generator = conditioner.of_subjects, config.flow.generator
        self._images = Images(c.count, c.batch, subjects, of, SEED, (size, size), config.sampling, generator)
        standard.extractor.to(device)

    def scores(self, engine: Zero2Engine, listen: Callable[[str], None]) -> dict[str, float]:
        """Scalars, on every rank: each score that the reference allows. Every rank calls it.

        Args:
            listen: called with a phase, 'evaluate' before each step of the sampler and 'score' at the end, equally
                often on every rank; an exception from it ends the evaluation.
        """
        # On CPUs matmuls sum in another order on several threads, and ranks may have any number of them.
        with one_thread() if self._device.type == "cpu" else nullcontext():
            mine = self._sample(engine, partial(listen, "evaluate"))
        listen("score")
        shares = gather_on_main(self._world, mine)
        row = self._score(merge_round_robin(shares)) if shares else {}
        return gather(self._world, row)[0]

    def _sample(self, engine: Zero2Engine, each_step: Callable[[], None]) -> list[Block]:
        """Features and logits of this rank's blocks."""
        images, mine = self._images, []
        with engine.ema_weights() as net:
            for block in round_robin(self._world, images.blocks):
                if block is not None:
                    samples = generate_images(images, block, net, self._standard.extractor, self._device, each_step)
                    mine.append((samples.features, samples.logits, samples.finite))
                else:  # the last round has no block for this rank
                    for _ in range(images.sampling.steps):
                        each_step()
        return mine

    def _score(self, blocks: list[Block]) -> dict[str, float]:
        """The scores of all blocks, in their order, whichever rank sampled them."""
        if not all(finite for *_, finite in blocks):
            warn("the EMA's samples are not finite: they are not scored")
            return {}
        features, logits = (np.concatenate([block[part] for block in blocks]) for part in (0, 1))
        scores = score(features, logits, self._standard.reference)
        return {f"evaluation/{name}": value for name, value in scores.items() if value is not None}

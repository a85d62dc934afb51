"""One training step of a configuration through the real engine, taken apart by wrapping its functions from outside."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megapix.bench.stopwatch import Stopwatch
from megapix.conditioning.conditioner import Conditioner
from megapix.config import BatchLayout, Config
from megapix.data.batch import Batch
from megapix.diffusion import flow
from megapix.dist import World, total
from megapix.engine import zero2
from megapix.engine.network import build_network
from megapix.errors import RunError
from megapix.resilience import agreement
from megapix.train.run import objective_of

PARTS = {
    "data_wait": "waiting for data, copying it to the device",
    "objective": "noise, times, target, loss",
    "patch_forward": "patch pathway, forward",
    "pixel_forward": "pixel pathway, forward",
    "backward": "backward, recomputation",
    "gradient_reduce": "gradients into buckets, reduction",
    "optimizer": "norm, clipping, AdamW, weights gathered",
    "ema": "EMA",
    "agree": "sync of all ranks",
    "unexplained": "none of these",
}
"""Parts of a step, in order; docs/performance.md says what each takes in."""


class TrainingStep:
    """Takes steps as `loop.train` does, without REPA, logging and saving, and times each part.

    Wrapped are the network's two pathways, `backward` and `step` of the engine, ZeRO-2's gradient hook and epilogue,
    and the optimizer's EMA.

    Args:
        config: resolved.
        batches: endless micro batches of this rank.
        conditioner: makes their conditions.
    """

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        batches: Iterator[Batch],
        conditioner: Conditioner,
        world: World,
        device: torch.device,
    ) -> None:
        network = build_network(config.model, config.seed, config.machine, tokens=config.text.max_tokens)
        self.layout, self.engine = layout, zero2.build(config, layout, network)
        self._config, self._batches, self._conditioner = config, batches, conditioner
        self._world, self._device = world, device
        self._objective = objective_of(config, device, varied=False)
        self._watch = Stopwatch(device)
        zero = self.engine.deepspeed.optimizer
        for owner, method, part in (
            (network, "patch_pathway", "patch_forward"),
            (network, "pixel_pathway", "pixel_forward"),
            (self.engine, "backward", "backward"),
            (self.engine, "step", "optimizer"),
            (zero, "process_gradients", "gradient_reduce"),
            (zero, "overlapping_partition_gradients_reduce_epilogue", "gradient_reduce"),
            (self.engine.optimizer, "update_ema", "ema"),
        ):
            setattr(owner, method, self._watch.timed(part, getattr(owner, method)))

    def __call__(self) -> dict[str, float]:
        """Take one step; seconds of each of PARTS.

        Raises:
            RunError: DeepSpeed has skipped the step, because its gradient is not finite; on every rank.
        """
        c, engine, watch = self._config, self.engine, self._watch
        with watch.part("unexplained"):
            step_loss = torch.zeros((), device=self._device)
            for number in range(1, self.layout.accumulation + 1):
                with watch.part("data_wait"):
                    batch = next(self._batches)
                    images = batch.images.to(self._device, non_blocking=True)
                    condition = self._conditioner.of(batch)
                with watch.part("objective"):
                    drawn = batch.positions, c.seed, c.flow, flow.Draws(*batch.draws), self._objective
                    loss, _ = flow.training_loss(engine, images, condition, *drawn)
                    loss = loss.mean()
                engine.backward(loss)
                step_loss += loss.detach() / self.layout.accumulation
                word = agreement.word(self._world, step_loss, False, False)
                sums = engine.step(word if number == self.layout.accumulation else None)
            with watch.part("agree"):
                agreement.outcome(self._world, sums or total(self._world, word), float(engine.grad_norm))
        seconds = watch.read()
        if not engine.applied:
            raise RunError("a step was skipped, as its gradient is not finite: there is nothing to time")
        return {part: seconds[part] for part in PARTS}

    def close(self) -> None:
        """Release the engine, which keeps itself and all its memory alive through its hooks otherwise."""
        self.engine.close()

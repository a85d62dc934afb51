"""One training step of a configuration through the real engine, taken apart by wrapping its functions from outside."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megapix import consensus, engine, flow
from megapix.bench.stopwatch import Stopwatch
from megapix.conditioner import Conditioner
from megapix.config import BatchLayout, Config
from megapix.data.loader import Batch
from megapix.dist import World
from megapix.errors import Trouble

PARTS = {
    "data_wait": "waiting for data, copying it to the device",
    "objective": "noise, times, target, loss",
    "patch_forward": "patch pathway, forward",
    "pixel_forward": "pixel pathway, forward",
    "backward": "backward, recomputation",
    "gradient_reduce": "gradients into buckets, reduction",
    "optimizer": "norm, clipping, AdamW, weights gathered",
    "ema": "EMA",
    "agree": "meeting all ranks",
    "unexplained": "none of these",
}
"""Parts of a step, in order; docs/performance.md says what each takes in."""


class TrainingStep:
    """Takes steps as `loop.train` does, without REPA, logging and saving, and says how long each part has taken.

    Wrapped are the network's two pathways, `backward` and `step` of the engine, ZeRO-2's gradient hook and epilogue,
    and the optimizer's EMA.

    Args:
        config: resolved.
        batches: endless micro batches of this rank.
        conditioner: what the network is told of them.
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
        network = engine.build_network(config.model, config.seed, config.machine)
        self.layout, self.engine = layout, engine.build(config, layout, network)
        self._config, self._batches, self._conditioner = config, batches, conditioner
        self._world, self._device = world, device
        self._watch = Stopwatch(device)
        zero = self.engine.optimizer
        for owner, method, part in (
            (network, "patch_pathway", "patch_forward"),
            (network, "pixel_pathway", "pixel_forward"),
            (self.engine, "backward", "backward"),
            (self.engine, "step", "optimizer"),
            (zero, "process_gradients", "gradient_reduce"),
            (zero, "overlapping_partition_gradients_reduce_epilogue", "gradient_reduce"),
            (zero.optimizer, "update_ema", "ema"),
        ):
            setattr(owner, method, self._watch.timed(part, getattr(owner, method)))

    def __call__(self) -> dict[str, float]:
        """Take one step; seconds of each of PARTS.

        Raises:
            Trouble: DeepSpeed has skipped the step, whose gradient is not finite; on every rank.
        """
        c, e, watch = self._config, self.engine, self._watch
        with watch.part("unexplained"):
            step_loss = torch.zeros((), device=self._device)
            for _ in range(self.layout.accumulation):
                with watch.part("data_wait"):
                    batch = next(self._batches)
                    images = batch.images.to(self._device, non_blocking=True)
                    condition = self._conditioner.of(batch)
                with watch.part("objective"):
                    loss, _ = flow.training_loss(e, images, condition, batch.positions, c.seed, c.flow)
                    loss = loss.mean()
                e.backward(loss)
                e.step()
                step_loss += loss.detach() / self.layout.accumulation
            with watch.part("agree"):
                consensus.after_step(self._world, step_loss, e.get_global_grad_norm(), False, False)
        seconds = watch.read()
        if not e.was_step_applied():
            raise Trouble("a step was skipped, as its gradient is not finite: there is nothing to time")
        return {part: seconds[part] for part in PARTS}

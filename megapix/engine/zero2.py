"""DeepSpeed's ZeRO-2 engine around our network, optimizer and schedule: how it is built, and what we use of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import pydantic
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param
from torch import Tensor

from megapix.checkpoint import vectors
from megapix.checkpoint.find import Saved
from megapix.checkpoint.layout import PARTS, Layout
from megapix.config import BatchLayout, Config
from megapix.config.ds_config import deepspeed_config
from megapix.dist import World, agree, on_all_ranks
from megapix.engine.clipping import ClippedMean
from megapix.engine.optim import EMA, AdamWWithEMA
from megapix.engine.schedule import ImagesSeenSchedule
from megapix.errors import InputError
from megapix.model import PixelDiT


class Zero2Engine:
    """DeepSpeed's ZeRO-2 engine, as far as we use it. `build` makes it.

    Call it as the network. Call `backward` and `step` once per micro batch, in this order; DeepSpeed steps the
    optimizer at the last one of a global batch.
    """

    def __init__(self, engine: Any, clipping: ClippedMean) -> None:
        self.deepspeed = engine
        """DeepSpeed's own engine, for what measures it from outside."""
        self.network: PixelDiT = engine.module
        self.optimizer: AdamWWithEMA = engine.optimizer.optimizer
        """Its one parameter is `partition`."""
        self.schedule: ImagesSeenSchedule = engine.lr_scheduler
        self.device: torch.device = engine.device
        self._clipping = clipping

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro batch's gradient; `loss` is its mean.

        Gradients are added up over micro batches and ranks as they are, and the sum is divided in fp32: a bf16 gradient
        divided by 3 would be rounded once more.
        """
        offloaded = self.deepspeed.optimizer.cpu_offload
        self.deepspeed.backward(loss / self._clipping.terms if offloaded else loss, scale_wrt_gas=False)

    def step(self, beside: Tensor | None = None) -> list[float] | None:
        """End a micro batch; at the end of a global batch clip, step, move the EMA and update the weights.

        Args:
            beside: at the end of a global batch, numbers of this rank (fp64, on its device) to be added up over ranks
                in the all-reduce of the gradient's norm, so that they cost no wait of their own.

        Returns:
            Their sums; None without any, or if the optimizer is offloaded, where there is no such all-reduce.
        """
        self._clipping.beside, self._clipping.sums = beside, []
        self.deepspeed.step()
        self._clipping.beside = None
        return self._clipping.sums or None

    @property
    def applied(self) -> bool:
        """Whether the last step was applied: its gradient was finite on every rank."""
        return bool(self.deepspeed.was_step_applied())

    @property
    def grad_norm(self) -> Tensor | float:
        """Norm of the last applied step's whole gradient, averaged over ranks, before clipping; maybe on the device."""
        norm: Tensor | float = self._clipping.norm
        if self.deepspeed.optimizer.cpu_offload:
            norm = self.deepspeed.get_global_grad_norm()
        return norm

    @property
    def unclipped(self) -> float:
        """What the gradient that the last step of `optimizer` began with times this is the mean before clipping."""
        if not self.deepspeed.optimizer.cpu_offload:
            return 1.0 / self._clipping.terms
        most = self._clipping.most
        return max(1.0, (float(self.grad_norm) + 1e-6) / most) if most else 1.0

    @property
    def partition(self) -> Tensor:
        """This rank's share of the flat fp32 masters, padded: what the optimizer steps."""
        (partition,) = self.deepspeed.optimizer.single_partition_of_fp32_groups
        vector: Tensor = partition
        return vector

    @property
    def adam_steps(self) -> int:
        """Applied steps that AdamW has counted."""
        return int(self.optimizer.state[self.partition]["step"])

    def layout(self, world: World) -> Layout:
        """How ZeRO-2 has concatenated the parameters and partitioned them; the same on every rank."""
        names = {id(p): name for name, p in self.network.named_parameters()}
        zero = self.deepspeed.optimizer
        (group,), (partition_size,) = zero.bit16_groups, zero.partition_size
        layout = Layout({names[id(p)]: tuple(p.shape) for p in group}, world.size)
        if partition_size != layout.share:
            raise RuntimeError(f"DeepSpeed's partition has {partition_size} numbers, expected {layout.share}")
        return layout

    def fragments(self) -> list[tuple[str, int, int]]:
        """Parameters of this rank's partition: name, first element, elements."""
        fragments = []
        for name, p in self.network.named_parameters():
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined] # DeepSpeed's link to the partition, if it has one
            if mapping is not None:
                fragments.append((name, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel))
        return fragments

    def share(self, layout: Layout, world: World) -> dict[str, Tensor]:
        """This rank's range of each flat vector of a checkpoint: fp32 views of what the optimizer steps."""
        start, stop = layout.range_of(world.rank)
        parts = {"weights": self.partition.detach()} | self.optimizer.state[self.partition]
        return {part: parts[part][: stop - start] for part in PARTS}

    def load(self, saved: Saved, world: World) -> None:
        """Load a checkpoint of any number of ranks: each rank reads its own range, a chunk at a time.

        Raises:
            CollectiveInputError: a file cannot be read, or holds another network.
        """
        own, folder, state = self.layout(world), saved.folder, saved.state
        if state.layout.shapes != own.shapes:
            agree(world, f"{folder} holds another network than the one that its configuration describes")
        start, _ = own.range_of(world.rank)

        def fill() -> None:
            for part, vector in self.share(own, world).items():
                vectors.fill(vector, folder, state.layout, part, start)

        on_all_ranks(world, fill)
        self.optimizer.state[self.partition]["step"].fill_(state.adam_steps)
        self.optimizer.steps = state.adam_steps
        self._weights_from_masters()
        self.schedule.load_state_dict({"images_seen": state.counters.images_seen})

    @contextmanager
    def raw_weights(self) -> Iterator[PixelDiT]:
        """The network with its raw weights, in eval mode."""
        self.network.eval()
        try:
            yield self.network
        finally:
            self.network.train()

    @contextmanager
    def ema_weights(self) -> Iterator[PixelDiT]:
        """The network with the EMA gathered into its weights, in eval mode; the training weights come back at the end.

        Call it on every rank: each parameter's EMA is gathered from all partitions, and afterwards its weight is
        restored from the masters, as after a step; no second copy of the weights is held. Restoring needs all ranks, so
        that an exception, which one of them may have alone, leaves the EMA where it is: it must end the training.
        """
        with self.raw_weights() as network:
            with torch.no_grad():
                for p in network.parameters():
                    p.copy_(safe_get_full_optimizer_state(p, EMA))
            yield network
            self._weights_from_masters()

    def gathered(self, what: str) -> dict[str, Tensor]:
        """A state of every parameter in fp32, by name, gathered from all partitions after a step. Every rank calls it.

        `what` is 'master', `optim.EMA`, or one of Adam's, 'exp_avg' and 'exp_avg_sq'.
        """
        return {
            name: safe_get_full_fp32_param(p) if what == "master" else safe_get_full_optimizer_state(p, what)
            for name, p in self.network.named_parameters()
        }

    def close(self) -> None:
        """Release the hooks and buffers of DeepSpeed's engine, which cannot be used after it."""
        self.deepspeed.destroy()

    def _weights_from_masters(self) -> None:
        """The weights that the network computes with, in its dtype, on every rank."""
        self.deepspeed.optimizer.update_lp_params()


def build(config: Config, layout: BatchLayout, network: PixelDiT, knobs: dict[str, Any] | None = None) -> Zero2Engine:
    """DeepSpeed's engine around `network`, with our optimizer and our schedule. Call it on every rank.

    In bf16 the fp32 masters, and so the EMA, start from the network's fp32 weights; DeepSpeed alone would start them
    from weights already rounded to bf16. `knobs` is DeepSpeed's whole configuration where it is not the one that
    follows from `config`.

    Raises:
        InputError: DeepSpeed refuses a knob of the JSON.
    """
    o = config.optim
    initial = [p.detach().clone() for p in network.parameters()] if config.precision == "bf16" else []
    settings = o.lr, (o.beta1, o.beta2), o.weight_decay, o.ema_decay_at
    optimizer = AdamWWithEMA(network.parameters(), *settings, fused=config.machine.fused_adamw)
    try:
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            lr_scheduler=lambda base: ImagesSeenSchedule(base, o),
            config=knobs or deepspeed_config(config, layout),
            dist_init_required=False,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"machine.ds_config = {config.machine.ds_config!r}: {key}: {first['msg'].lower()}") from error
    for p, value in zip(network.parameters() if initial else (), initial, strict=True):
        safe_set_full_fp32_param(p, value)
    optimizer.begin()
    # Links parameters to their optimizer state at once, so that the EMA can be gathered; DeepSpeed would do it at the
    # first step. The state's tensors are filled in place from here on.
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    clipping = ClippedMean(layout.ranks * layout.accumulation, o.grad_clip)
    if engine.optimizer.cpu_offload:
        # DeepSpeed's own clipping, which divides by a loss scale, too: `backward` takes it out of the loss.
        engine.optimizer.override_loss_scale(clipping.terms)
        _forget_skipped_gradients(engine.optimizer)
    else:
        optimizer.clipping, optimizer.skipped = clipping, partial(setattr, engine.optimizer, "overflow", True)
    return Zero2Engine(engine, clipping)


def _forget_skipped_gradients(optimizer: Any) -> None:
    """Make a skipped step leave no gradient behind in ZeRO-Offload.

    In bf16 DeepSpeed 0.19.8 keeps the summed gradients of a skipped step if the optimizer is offloaded, and adds the
    next step's to them: after one that is not finite every step would be skipped. Without offload it drops them.
    """
    reset = optimizer.reset_cpu_buffers  # called at the end of every step, skipped or not

    def reset_all() -> None:
        reset()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in kept:
                kept[group] = None

    optimizer.reset_cpu_buffers = reset_all

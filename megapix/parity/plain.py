"""The plain PyTorch reference that ZeRO-2 is compared with: one process, one device, no DeepSpeed.

It trains on the whole global batch, with torch's AdamW, torch's clipping, and a dense fp32 EMA; the learning rate
comes from `schedule.learning_rate`. In bf16 the network's weights and activations are bf16, and masters, accumulated
gradients and the EMA are fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix.config import Config
from megapix.diffusion import flow
from megapix.diffusion.condition import Condition
from megapix.engine.schedule import learning_rate
from megapix.model import PixelDiT

State = dict[str, Tensor]
"""fp32 tensors by parameter name."""
Samples = Callable[[NDArray[np.int64]], tuple[Tensor, Condition]]
"""Positions [B] -> uint8 images [B, 3, H, W] and their condition, on the network's device."""


@dataclass
class Trace:
    """A run's numbers at each step, and its state at the end. Tensors are fp32, on the CPU, by parameter name."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of each step's global batch, before the step."""
    norms: list[float] = field(default_factory=list)
    """Norm of each step's gradient, before clipping."""
    gradient: State = field(default_factory=dict)
    """The first step's, clipped: Adam's first moment after it, without its factor 1 - beta1."""
    weights: State = field(default_factory=dict)
    ema: State = field(default_factory=dict)


def train(
    initial: PixelDiT,
    config: Config,
    samples: Samples,
    steps: int,
    micro: int,
    after_step: Callable[[int, State], None] = lambda steps, ema: None,
) -> Trace:
    """Take `steps` AdamW steps from the weights of `initial`, which stay as they are, on its device.

    Args:
        initial: the network in fp32.
        config: precision, objective, optimizer and schedule; positions count from 0.
        samples: the data.
        steps: optimizer steps of `config.optim.global_batch` samples.
        micro: images of one forward pass; a divisor of the global batch.
        after_step: called with the number of steps taken and the EMA, which later steps change in place.
    """
    o, trace = config.optim, Trace()
    masters = [p.detach().clone() for p in initial.parameters()]
    ema = [master.clone() for master in masters]
    net = copy.deepcopy(initial).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    names, device = [name for name, _ in initial.named_parameters()], masters[0].device
    optimizer = torch.optim.AdamW(masters, o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step * o.global_batch, config.optim)
        for master in masters:
            master.grad = torch.zeros_like(master)
        total = 0.0
        for positions in np.arange(step * o.global_batch, (step + 1) * o.global_batch).reshape(-1, micro):
            images, condition = samples(positions)
            loss, _ = flow.training_loss(net, images.to(device), condition, positions, config.seed, config.flow)
            net.zero_grad()
            loss.mean().backward()  # type: ignore[no-untyped-call]
            for master, p in zip(masters, net.parameters(), strict=True):
                assert master.grad is not None
                if p.grad is not None:  # the last text block has weights that nothing depends on
                    master.grad += p.grad.float() * (micro / o.global_batch)
            total += loss.mean().item() * micro / o.global_batch

        norm = torch.nn.utils.clip_grad_norm_(masters, o.grad_clip or float("inf"))
        if step == 0:
            trace.gradient = {n: m.grad.cpu() for n, m in zip(names, masters, strict=True) if m.grad is not None}
        optimizer.step()
        decay = o.ema_decay_at(step + 1)
        with torch.no_grad():
            for average, master, p in zip(ema, masters, net.parameters(), strict=True):
                average.mul_(decay).add_(master, alpha=1.0 - decay)
                p.copy_(master)
        trace.losses.append(total)
        trace.norms.append(norm.item())
        after_step(step + 1, dict(zip(names, ema, strict=True)))

    trace.weights = {name: master.detach().cpu() for name, master in zip(names, masters, strict=True)}
    trace.ema = {name: average.cpu() for name, average in zip(names, ema, strict=True)}
    return trace

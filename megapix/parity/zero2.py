"""A case trained with ZeRO-2, through the same engine as a run, on a tiny network and synthetic images."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix import config
from megapix.config import Config, MachineConfig, ModelConfig
from megapix.config.ds_config import deepspeed_config
from megapix.diffusion import flow
from megapix.diffusion.condition import Condition, classes
from megapix.dist import World, gather
from megapix.engine.network import build_network
from megapix.engine.optim import EMA
from megapix.engine.zero2 import build
from megapix.model import PixelDiT
from megapix.parity.cases import IMAGE_SIZE, SMALL_BUCKET, STEPS, Case, configuration
from megapix.parity.plain import Trace


def network(c: Config, machine: MachineConfig | None = None) -> PixelDiT:
    """The network with random numbers added to every weight: zero-initialized layers would block gradients."""
    net = build_network(c.model, c.seed, machine)
    generator = torch.Generator().manual_seed(c.seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def samples(model: ModelConfig, device: torch.device, positions: NDArray[np.int64]) -> tuple[Tensor, Condition]:
    """Synthetic images, a function of the position: uint8 [B, 3, 16, 16]; with classes, or text of 1 to 6 tokens."""
    images, texts = [], []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(position)
        images.append(torch.randint(256, (3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8))
        texts.append(torch.randn(model.text_tokens, model.text_width, generator=generator))
    shown = torch.stack(images).to(device)
    if not model.text_width:
        return shown, classes((torch.from_numpy(positions) % 3).to(device), 3)
    real = torch.arange(model.text_tokens) <= torch.from_numpy(positions)[:, None] % model.text_tokens
    cond = torch.stack(texts).to(device), real.to(device)
    return shown, Condition(cond, (torch.zeros_like(cond[0][:1, :1]), torch.ones_like(cond[1][:1, :1])))


def zero2(case: Case, world: World, device: torch.device, types: dict[str, Any] | None = None) -> Trace:
    """Train a case with DeepSpeed on every rank. `types` replaces the gradient dtypes, in bf16."""
    c = configuration(case)
    layout = config.batch_layout(c, world.size)
    knobs = deepspeed_config(c, layout)
    bucket = SMALL_BUCKET if case.buckets == "small" else 500_000_000
    knobs["zero_optimization"] |= {
        "overlap_comm": case.overlap_comm,
        "contiguous_gradients": case.contiguous_gradients,
        "reduce_scatter": case.reduce_scatter,
        "use_multi_rank_bucket_allreduce": case.bucket_allreduce,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    engine = build(c, layout, network(c, c.machine), knobs | (types or {}))
    trace = Trace()
    for step in range(STEPS):
        positions = np.arange(step * layout.total, (step + 1) * layout.total)
        losses = []
        for mine in positions.reshape(layout.accumulation, layout.ranks, layout.micro)[:, world.rank]:
            loss, _ = flow.training_loss(engine, *samples(c.model, device, mine), mine, c.seed, c.flow)
            engine.backward(loss.mean())
            engine.step()
            losses.append(loss.mean().item())
        trace.losses.append(float(np.mean(gather(world, losses))))
        trace.norms.append(float(engine.grad_norm))
        if step == 0:
            moment = engine.gathered("exp_avg")
            trace.gradient = {name: m.cpu() / (1.0 - c.optim.beta1) for name, m in moment.items()}
    trace.weights = {name: master.cpu() for name, master in engine.gathered("master").items()}
    trace.ema = {name: ema.cpu() for name, ema in engine.gathered(EMA).items()}
    engine.close()
    # Engine and network refer to each other through hooks, and compiled code is kept for the next network of its kind:
    # clear both, so that each case starts fresh.
    del engine
    gc.collect()
    torch.compiler.reset()
    return trace

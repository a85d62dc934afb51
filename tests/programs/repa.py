"""One rank of the test of REPA against plain PyTorch: trains through the engine and writes what rank 0 gathers.

usage: python -m tests.programs.repa SHARDS ENCODER OUT ACCUMULATION [OPTION VALUE]…
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from megapix import config
from megapix.config import Config
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion import repa
from megapix.diffusion.condition import classes
from megapix.dist import from_environment, gather, leave
from megapix.encoders.image import load
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.engine.optim import EMA
from megapix.model import Alignment, PixelDiT
from tests.support.small_run import SMALL, STEP_BATCH

STEPS = 6
LAYER, WEIGHT = 1, 0.5


def network(c: Config, features: int) -> PixelDiT:
    """The aligned network with random numbers added to every weight: layers of zeros would hold gradients back."""
    net = build_network(c.model, c.seed, c.machine, Alignment(LAYER, features))
    generator = torch.Generator().manual_seed(c.seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def main(shards: str, folder: str, out: str, accumulation: str, *changes: str) -> None:
    world = from_environment()
    processes.start(world)
    c = config.replace(SMALL, "data.image_size", 32)
    c = config.replace(c, "machine.micro_batch", STEP_BATCH // world.size // int(accumulation))
    for key, value in zip(changes[::2], changes[1::2], strict=True):
        c = config.replace(c, key, type(config.get(c, key))(value))
    layout = config.batch_layout(c, world.size)
    teacher = load(folder, "fp32", micro_batch=3)
    before = [p.clone() for p in teacher.parameters()]
    net = network(c, teacher.width)
    e = zero2.build(c, layout, net)
    reading = config.replace(c.data, "path", shards)
    data = MicroBatches(locate(reading), reading, c.seed, STEP_BATCH)
    losses: list[tuple[float, float]] = []
    for step in range(STEPS):
        positions = np.arange(step * layout.total, (step + 1) * layout.total)
        sums = []
        for mine in positions.reshape(layout.accumulation, layout.ranks, layout.micro)[:, world.rank]:
            batch = data[mine]
            drawn = batch.images, classes(batch.labels, c.model.num_classes), batch.positions, c.seed, c.flow
            flow, _, apart = repa.training_loss(e, teacher(batch.images), *drawn)
            e.backward(flow.mean() + WEIGHT * apart.mean())
            e.step()
            sums.append((flow.mean().item(), apart.mean().item()))
        losses.append(tuple(np.mean(gather(world, sums), axis=(0, 1)).tolist()))
    weights, ema = e.gathered("master"), e.gathered(EMA)

    stepped = {id(p) for group in e.optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in e.network.parameters()} | stepped
    for p, value in zip(teacher.parameters(), before, strict=True):
        assert torch.equal(p, value), "the encoder changed"
        assert not p.requires_grad
        assert p.grad is None
        assert id(p) not in trained
    partition = e.partition
    total = sum(p.numel() for p in net.parameters())
    assert partition.numel() == e.layout(world).share >= total // world.size, "nothing else is stepped"
    if world.main:
        torch.save({"losses": losses, "weights": weights, "ema": ema}, out)
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One rank of the test of fp32 masters in bf16: from the first step on, and through a checkpoint into another engine.

usage: python -m tests.programs.bf16_masters FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megapix import config
from megapix.checkpoint.find import Saved
from megapix.checkpoint.manifest import Counters, State, read_state
from megapix.checkpoint.saver import Saver
from megapix.config import CheckpointConfig
from megapix.diffusion import flow
from megapix.diffusion.condition import classes
from megapix.dist import barrier, from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.engine.zero2 import Zero2Engine
from tests.support.small_run import SMALL, STEP_BATCH

CONFIG = config.replace(replace(SMALL, precision="bf16"), "machine.micro_batch", 2)


def main(folder: str) -> None:
    world = from_environment()
    processes.start(world)
    layout = config.batch_layout(CONFIG, world.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * STEP_BATCH, 3, 16, 16), dtype=torch.uint8, generator=generator)

    def step(e: Zero2Engine, number: int) -> None:
        positions = np.arange(STEP_BATCH) + STEP_BATCH * number
        for mine in positions.reshape(layout.ranks, layout.accumulation, layout.micro)[world.rank]:
            loss, _ = flow.training_loss(e, images[mine], classes(torch.tensor(mine % 3), 3), mine, 1, CONFIG.flow)
            e.backward(loss.mean())
            e.step()

    def held(e: Zero2Engine) -> dict[str, Tensor]:
        return {part: vector.clone() for part, vector in e.share(e.layout(world), world).items()}

    net = build_network(CONFIG.model, 1)
    initial = torch.cat([p.detach().flatten() for p in net.parameters()])
    e = zero2.build(CONFIG, layout, net)
    shared = e.layout(world)
    mine = slice(*shared.range_of(world.rank))
    assert all(torch.equal(held(e)[part], initial[mine]) for part in ("weights", "ema")), "they begin rounded"
    for number in range(3):
        step(e, number)
    expected = held(e)
    masters = expected["weights"]
    finer = (masters != masters.bfloat16().float()).sum() / masters.count_nonzero()
    assert finer > 0.95, f"only {finer:.0%} of the masters have low bits that bf16 cannot have"

    state = State(Counters(24, 24), CONFIG, "digest", ("a",) * 3, shared, e.adam_steps)
    Saver(Path(folder), CheckpointConfig(background=False), world).save(state, e.share(shared, world))
    barrier(world)
    saved = Path(folder) / "checkpoints" / "images-000000000024"
    other = zero2.build(CONFIG, layout, build_network(CONFIG.model, 2))
    other.load(Saved(saved, read_state(saved)), world)
    for part, vector in held(other).items():
        assert torch.equal(vector, expected[part]), f"{part}: not what was saved"
    weights = torch.cat([p.detach().flatten() for p in other.network.parameters()])
    assert torch.equal(weights[mine], masters.bfloat16()), "what the network computes with"
    assert (other.adam_steps, other.schedule.images_seen) == (3, 24)
    for each in (e, other):
        step(each, 3)
    for part, vector in held(other).items():
        assert torch.equal(vector, held(e)[part]), f"{part}: another step than without a resume"
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

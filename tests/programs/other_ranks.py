"""One rank that loads a run's checkpoint, of whatever number of ranks, and compares what the ranks hold with its files.

usage: python -m tests.programs.other_ranks RUN
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megapix import config
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from tests.support.small_run import flat_vectors, saved


def main(run: str) -> None:
    world = from_environment()
    processes.start(world)
    found = saved(Path(run))
    c = config.replace(found.state.config, "machine.micro_batch", 1)
    net = build_network(c.model, seed=99)
    e = zero2.build(c, config.batch_layout(c, world.size), net)
    e.load(found, world)
    assert e.adam_steps == found.state.adam_steps > 0
    assert e.schedule.images_seen == found.state.counters.images_seen > 0
    expected, start = flat_vectors(found.folder), 0
    for name, p in net.named_parameters():
        stop = start + p.numel()
        here = {"weights": safe_get_full_fp32_param(p)}
        here |= {part: safe_get_full_optimizer_state(p, part) for part in ("exp_avg", "exp_avg_sq", "ema")}
        for part, tensor in here.items():
            assert torch.equal(tensor.flatten(), expected[part][start:stop]), f"{name}: {part}"
        assert torch.equal(p.flatten(), expected["weights"][start:stop].to(p.dtype)), f"{name}: what computes"
        start = stop
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

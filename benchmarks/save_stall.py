"""How long training waits for a checkpoint: written in the background, and written while it waits, in one run.

usage: torchrun --nproc-per-node 2 -m benchmarks.save_stall [--width 640] [--saves 4] [--folder DIR]

A network of about 60 million parameters takes `--between` steps between two saves, which are by turns in the
background and not. Printed: medians of the seconds that training waited, and of the seconds that a step took.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from megapix import config
from megapix.checkpoint.folder import complete
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.config import CheckpointConfig, ModelConfig
from megapix.dist import barrier, from_environment, gather, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=640, help="width of the patch pathway")
    parser.add_argument("--saves", type=int, default=4, help="saves of each kind")
    parser.add_argument("--between", type=int, default=6, help="steps between two saves")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    world = from_environment()
    device = processes.start(world)
    model = ModelConfig(patch_size=8, width=options.width, depth=8, heads=8, pixel_depth=2, num_classes=10)
    c = replace(config.tiny(), model=model, optim=replace(config.tiny().optim, global_batch=4 * world.size))
    e = zero2.build(c, config.batch_layout(c, world.size), build_network(model, 0))
    layout = e.layout(world)
    state = State(Counters(), c, "", (), layout, 0)
    x, t, y = torch.randn(4, 3, 64, 64, device=device), torch.rand(4, device=device), torch.zeros(4).long().to(device)

    def step() -> float:
        start = time.perf_counter()
        e.backward(e(x, t, y).float().square().mean())
        e.step()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        where = Path(gather(world, folder)[0])
        savers = {on: Saver(where, CheckpointConfig(keep=1, background=on), world) for on in (True, False)}
        stalls: dict[bool, list[float]] = {True: [], False: []}
        steps: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(3):
            step()
        for number in range(2 * options.saves + 2):
            background = number % 2 == 0
            saver = savers[background]
            counters = Counters(number + 1, number + 1)
            saver.save(replace(state, counters=counters), e.share(layout, world))
            seconds = [step() for _ in range(options.between)]
            saver.finish()
            if number >= 2:  # the first of each kind makes buffers and folders
                stalls[background].append(saver.stall)
                steps[background] += seconds
            saver.stall = 0.0
        size = sum(path.stat().st_size for path in complete(where)[-1].iterdir())
        barrier(world)
    wait = {on: statistics.median(values) for on, values in stalls.items()}
    world.say(f"{layout.total / 1e6:.1f} M parameters, {world.size} ranks, {size / 2**20:.0f} MiB a checkpoint")
    for on, name in ((True, "in the background"), (False, "while training waits")):
        each = ", ".join(f"{value:.2f}" for value in stalls[on])
        world.say(f"{name}: waits {wait[on]:.2f} s ({each}); a step takes {statistics.median(steps[on]):.2f} s")
    world.say(f"wait in the background / wait: {100 * wait[True] / wait[False]:.1f} %")
    leave(world, 0)


if __name__ == "__main__":
    main()

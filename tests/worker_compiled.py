"""One rank whose compiled blocks are watched for a step: their graphs know no hooks, so that step runs as written.

usage: python -m tests.worker_compiled
"""

from __future__ import annotations

import torch

from megapix import blocks, config, dist, engine
from tests.runs import SMALL


def main() -> None:
    world = dist.from_environment()
    engine.start(world)
    c = config.replace(SMALL, "machine.compile", True)
    net = engine.build_network(c.model, 0, c.machine)
    e = engine.build(c, config.BatchLayout(2, 1, 1), net)
    compiled = [block.forward for block in (*net.patch_blocks, *net.pixel_blocks)]
    watch = blocks.Watch(e)
    e.backward(e(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])).square().mean())
    e.step()
    row = watch.read(1)
    assert sum("modulation_rms/pit" in tag for tag in row) == c.model.pixel_depth * 6
    assert compiled == [block.forward for block in (*net.patch_blocks, *net.pixel_blocks)], "compiled again"
    engine.leave(world, 0)


if __name__ == "__main__":
    main()

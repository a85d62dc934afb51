"""One rank whose compiled blocks are watched for a step: their graphs know no hooks, so that step runs as written.

usage: python -m tests.programs.compiled_blocks
"""

from __future__ import annotations

import torch

from megapix import config
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.monitoring import block_norms
from tests.support.small_run import SMALL


def main() -> None:
    world = from_environment()
    processes.start(world)
    c = config.replace(SMALL, "machine.compile", True)
    net = build_network(c.model, 0, c.machine)
    e = zero2.build(c, config.BatchLayout(8, 1, 1), net)
    compiled = [block.forward for block in (*net.patch_blocks, *net.pixel_blocks)]
    watch = block_norms.Watch(e)
    e.backward(e(torch.randn(8, 3, 16, 16), torch.rand(8), torch.arange(8) % 3).square().mean())
    e.step()
    row = watch.read(1)
    assert sum("modulation_rms/pit" in tag for tag in row) == c.model.pixel_depth * 6
    assert compiled == [block.forward for block in (*net.patch_blocks, *net.pixel_blocks)], "compiled again"
    leave(world, 0)


if __name__ == "__main__":
    main()

"""One rank of the parity test: cases of the table, on this launch's ranks.

usage: python -m tests.programs.parity_cases compiled|thirds|odd
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from megapix.dist import World, from_environment, leave
from megapix.engine import processes
from megapix.parity import compare, zero2
from megapix.parity.cases import Case, describe
from megapix.parity.compare import GRADIENT_TYPES, TOLERANCES, measure

COMPILED = [Case(pixel_checkpointing="full", patch_checkpointing="full", compile=True)]
"""The one that the table's test leaves out."""
THIRDS = [Case(precision="bf16", accumulation=3)]
"""Two steps of it: the first gradient tells."""
ODD = [
    Case(),
    Case(precision="bf16"),
    Case(precision="bf16", reduce_scatter=False, clip="not hit"),
    Case(precision="bf16", contiguous_gradients=False),
    Case(precision="bf16", bucket_allreduce=True, buckets="small", overlap_comm=True),
    Case(precision="bf16", offload=True, accumulation=3),
]
"""Each way that DeepSpeed adds up gradients."""


def main(which: str) -> None:
    world = from_environment()
    device = processes.start(world)
    todo = {"compiled": COMPILED, "thirds": THIRDS, "odd": ODD}[which]
    todo = [replace(case, ranks=world.size) for case in todo]
    if which == "thirds":
        compare.STEPS = zero2.STEPS = 2
    results = measure(todo, world, device)
    for r in results:
        assert r.holds, f"{describe(r.case)}: {r.difference}"
    assert len(results) == (len(todo) if world.main else 0)
    if which == "compiled":
        reduced_in_bf16(world, device)
    leave(world, 0)


def reduced_in_bf16(world: World, device: torch.device) -> None:
    """A planted fault that must be seen."""
    # Gradients kept in bf16 are seen at once: so nearness above says that they are not.
    chosen = {name: types for name, types in GRADIENT_TYPES.items() if "bf16" in name}
    for r in measure([Case(precision="bf16", accumulation=4)], world, device, chosen):
        assert r.difference.gradient > 100 * TOLERANCES["bf16"].gradient, r


if __name__ == "__main__":
    main(*sys.argv[1:])

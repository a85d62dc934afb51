"""Builds engines one after another, as a benchmark of several ways does, and looks at what is left of each."""

from __future__ import annotations

import dataclasses
import gc
import weakref

from megapix.bench.command import batches, conditioner_of, on_ranks
from megapix.bench.kernels import traced
from megapix.bench.options import StepOptions
from megapix.bench.step import TrainingStep
from megapix.config import MachineConfig, PixelPolicy
from megapix.dist import from_environment, leave
from megapix.engine import processes
from tests.support.small_run import SMALL

PASSES: dict[PixelPolicy | str, int] = {"auto": 2 + 2 + 2, "none": 2 + 2, "full": 2 + 2 + 2}
"""Policy -> attention's forward passes of two patch blocks and two PiT blocks, and of those that are recomputed; 'auto'
is 'full' on a CPU."""


def main() -> int:
    """Assert; returns the exit code."""
    world = from_environment()
    device = processes.start(world)
    gone: list[weakref.ref[object]] = []
    for policy, passes in PASSES.items():
        machine = MachineConfig(pixel_checkpointing=policy)  # type: ignore[arg-type]
        options = dataclasses.replace(StepOptions.of(SMALL), micro_batch=3, machine=machine)
        prepared = on_ranks(options, world, device)
        settled = prepared.config.machine.compile, prepared.config.machine.pixel_checkpointing
        assert settled == (False, "full" if policy == "auto" else policy), settled
        data, conditioner = batches(prepared, world, device), conditioner_of(prepared, world, device)
        step = TrainingStep(prepared.config, prepared.layout, data, conditioner, world, device)
        step()
        found = traced(step)
        assert found.attention == {"flash for CPUs": passes}, found
        assert (found.graphs, found.fused, found.launches) == (0, 0, {})
        gone += [
            weakref.ref(step.engine.deepspeed),
            weakref.ref(step.engine.network),
            weakref.ref(step.engine.partition),
        ]
        step.close()
        del step
        gc.collect()
        assert not any(reference() is not None for reference in gone), policy
    return leave(world, 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""`megapix doctor`, `plan` and `bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from megapix.cli.parse import gives_classes, named_config, parse, parse_run, parse_step, print_usage
from megapix.config import Config
from megapix.costs.assumptions import PlanOptions
from megapix.dist import World
from megapix.errors import InputError

DOCTOR_USAGE = """usage: megapix doctor PRESET --data.path SHARDS --out RUN [--SECTION.OPTION VALUE ...]
       megapix doctor [PRESET] --config FILE [--SECTION.OPTION VALUE ...]

A preflight: takes the arguments of `megapix train`, starts no run, and checks on every rank what it needs: versions,
DeepSpeed's op, hosts, clocks, shared memory, GPUs, the run folder, free disk, shards, and how fast an all-reduce is.
Exit code 1 if the run would fail, 0 if not (there may be warnings), 2 for bad input. PRESET is one of

{presets}
"""

PLAN_USAGE = """usage: megapix plan PRESET --gpus N [--gpu-memory 80GB] [--gpu H100] [--SECTION.OPTION VALUE ...]
       megapix plan [PRESET] --config FILE --gpus N [--SECTION.OPTION VALUE ...]

Takes the options of `megapix train` and those of the machines, and predicts memory, the largest micro batch of each
checkpointing policy, speed, scaling, and how often to save. Uses no GPU and reads no data. Exit code 2 if nothing
fits, saying how many bytes are missing. A network that takes text is planned with features stored with the shards;
--text-encoder-parameters N adds a frozen encoder of N parameters to each GPU. PRESET is one of

{presets}

'megapix plan PRESET --help' lists every option; those under --assume are all that is assumed of the machines.
"""


BENCH_USAGE = """usage: megapix bench step PRESET [OPTIONS]
       megapix bench step [PRESET] --config FILE [OPTIONS]

Times whole training steps of a configuration on this machine, through the engine of `megapix train`: MFU against the
matmul peak measured along with them, and the parts of a step. Under a launcher it runs on all its ranks. PRESET is
one of

{presets}

'megapix bench step PRESET --help' lists the options, with those of `megapix train` that change a step.
"""


def doctor(arguments: list[str], world: World) -> int:
    """Check what would make training fail; with --parity, compare ZeRO-2 with the reference. Every rank calls it."""
    if "--parity" in arguments:
        from megapix.parity.command import main

        return main([a for a in arguments if a != "--parity"], world)
    if not arguments or arguments[0] in ("-h", "--help"):
        return print_usage(DOCTOR_USAGE, arguments)
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    requested = parse_run(arguments, world, "doctor")

    from megapix.doctor.command import examine

    return examine(requested, world, gives_classes(arguments))


@dataclass(frozen=True)
class Planned:
    """A run, and the machines to predict it for."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    machines: Annotated[PlanOptions, tyro.conf.arg(name="")]


def plan(arguments: list[str], world: World) -> int:
    """Predict a run on machines that are not at hand."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return print_usage(PLAN_USAGE, arguments)
    named = named_config(arguments)
    default = Planned(named.config, PlanOptions())
    requested = parse(Planned, default, f"megapix plan {named.name}", named.rest, world)

    from megapix.costs.plan import show

    print(show(requested.run, requested.machines, named.name))
    return 0


def bench(arguments: list[str], world: World) -> int:
    """Time a training step; every rank calls it."""
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    if arguments and arguments[0] not in ("step", "-h", "--help"):
        raise InputError(f"megapix bench {arguments[0]!r} does not exist (one of: step)")
    if len(arguments) < 2 or arguments[1] in ("-h", "--help"):
        return print_usage(BENCH_USAGE, [a for a in arguments if a != "step"])
    options = parse_step(arguments[1:], world)

    from megapix.bench.command import step

    return step(options, world)

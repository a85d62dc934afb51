"""The command line: `megapix COMMAND`. Parses, calls, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import atexit
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from megapix import config, dist
from megapix.bench.options import StepOptions, check_batch
from megapix.config import PRESETS, Config
from megapix.dist import World
from megapix.drawing.options import SampleOptions, check
from megapix.errors import InputError, Trouble, one_of
from megapix.evaluation.options import EvaluateOptions
from megapix.shards import check_writable
from megapix.sizing.options import PlanOptions

T = TypeVar("T")

USAGE = """usage: megapix COMMAND ...

Pretraining of PixelDiT, the pixel-space diffusion transformer, on DeepSpeed.

  train     train a preset, or go on with an interrupted run (several ranks: launch.sh)
  sample    draw images from a run, a checkpoint, an exported file or an imported folder
  export    write the EMA or raw weights of a run as one safetensors file with their configuration, or as the authors do
  import    make a folder that the other commands take from a checkpoint that the authors released
  reshard   write a checkpoint anew for another number of ranks
  evaluate  draw images and score them against reference statistics, or repeat a score (several ranks: launch.sh)
  doctor    look on every node for what would make a `train` command fail later; with --parity, compare ZeRO-2 on
            these machines with plain PyTorch
  bench     time a training step here: MFU against this machine's own peak, and where the time goes
  plan      predict memory, the largest micro batch, speed and the checkpoint interval of a run on GPUs not yet at hand

'megapix COMMAND --help' documents each.
"""

TRAIN_USAGE = """usage: megapix train PRESET --data.path SHARDS --out RUN [--SECTION.OPTION VALUE ...]
       megapix train --config FILE [--SECTION.OPTION VALUE ...]

Starts a run, or goes on from its last checkpoint: the same command does both. PRESET is one of

{presets}

  --config FILE   take a JSON file's options (a run's config.json, or a part of one) over the defaults of xl-256
  --dry-run       check everything, print the resolved configuration, and stop

'megapix train PRESET --help' lists every option with that preset's values.
"""

DOCTOR_USAGE = """usage: megapix doctor PRESET --data.path SHARDS --out RUN [--SECTION.OPTION VALUE ...]
       megapix doctor --config FILE [--SECTION.OPTION VALUE ...]

Takes the arguments of `megapix train`, starts no run, and checks on every rank what that run will need: versions,
DeepSpeed's op, hosts, clocks, shared memory, GPUs, the run folder, free disk, shards, and how fast a collective is.
Exit code 1 if the run would fail, 0 if not (there may be warnings), 2 for bad input. PRESET is one of

{presets}
"""

PLAN_USAGE = """usage: megapix plan PRESET --gpus N [--gpu-memory 80GB] [--gpu H100] [--SECTION.OPTION VALUE ...]
       megapix plan --config FILE --gpus N [--SECTION.OPTION VALUE ...]

Takes the options of `megapix train` and those of the machines, and predicts memory, the largest micro batch of each
checkpointing policy, speed, scaling, and how often to save. Touches no GPU and reads no data. Exit code 2 if nothing
fits, saying how many bytes are missing. A network that takes text is planned with features stored with the shards;
--text-encoder-parameters N adds a frozen encoder of N parameters to each GPU. PRESET is one of

{presets}

'megapix plan PRESET --help' lists every option; those under --assume are all that is assumed of the machines.
"""


BENCH_USAGE = """usage: megapix bench step PRESET [OPTIONS]
       megapix bench step --config FILE [OPTIONS]

Times whole training steps of a configuration on this machine, through the engine of `megapix train`: MFU against the
matmul peak that is measured beside them, and the parts of a step. Under a launcher it runs on all its ranks. PRESET is
one of

{presets}

'megapix bench step PRESET --help' lists the options, with those of `megapix train` that change a step.
"""


# ---------------------------------------------------------------------------------------------------------------------
# train, doctor, plan
# ---------------------------------------------------------------------------------------------------------------------


def train(arguments: list[str], world: World) -> int:
    """Train a preset or a file's configuration on this rank."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print_usage(TRAIN_USAGE, arguments)
    dry_run = "--dry-run" in arguments
    asked = parse_run([a for a in arguments if a != "--dry-run" and not a.startswith("--local_rank=")], world)
    if dry_run:
        from megapix.prepare import plan

        resolved = plan(asked, world.size).config
        if world.main:
            print(json.dumps(config.to_dict(resolved), indent=1))
        return 0

    from megapix import engine, loop
    from megapix.stopping import EXIT_STOPPED, StopRequested

    try:
        loop.train(asked, world)
    except StopRequested as request:
        world.say(str(request))
        return engine.leave(world, EXIT_STOPPED)
    except dist.Agreed as error:
        _complain(error, world.main)
        return engine.leave(world, 2)
    except InputError as error:
        # This rank alone knows; the others wait in a collective, until the launcher sees the code and ends them.
        _complain(error, True)
        atexit._run_exitfuncs()
        os._exit(2)
    except Trouble as error:
        _complain(error, world.main)
        return engine.leave(world, 1)
    return engine.leave(world, 0)


def doctor(arguments: list[str], world: World) -> int:
    """Look for what would make training fail, on this rank and with all others; with --parity, compare ZeRO-2."""
    if "--parity" in arguments:
        from megapix import engine, parity

        try:
            return parity.main([a for a in arguments if a != "--parity"], world)
        except dist.Agreed as error:
            _complain(error, world.main)
            return engine.leave(world, 2)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print_usage(DOCTOR_USAGE, arguments)
    asked = parse_run([a for a in arguments if not a.startswith("--local_rank=")], world, "doctor")

    from megapix.doctor.examine import examine, leave

    try:
        return examine(asked, world)
    except dist.Agreed as error:
        _complain(error, world.main)
        return leave(world, 2)


@dataclass(frozen=True)
class Planned:
    """A run, and the machines to predict it for."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    machines: Annotated[PlanOptions, tyro.conf.arg(name="")]


def plan(arguments: list[str], world: World) -> int:
    """Predict a run on machines that it has not seen yet."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _print_usage(PLAN_USAGE, arguments)
    default, name, rest = _named(arguments)
    asked = _parse(Planned, Planned(default, PlanOptions()), f"megapix plan {name}", rest, world)

    from megapix.sizing.plan import show

    print(show(asked.run, asked.machines, name))
    return 0


def _print_usage(usage: str, arguments: list[str]) -> int:
    """Print the usage with all presets: to stdout if it was asked for, to stderr (and code 2) without arguments."""
    width = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:{width}} {about}" for name, (_, about) in PRESETS.items())
    print(usage.format(presets=presets), end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2


def parse_run(arguments: list[str], world: World, command: str = "train") -> Config:
    """A configuration from `PRESET [OPTIONS]` or `--config FILE [OPTIONS]`; only rank 0 prints tyro's messages.

    Raises:
        InputError: unknown preset, or a file that cannot be read or holds an unknown key.
        SystemExit: an option that tyro refuses (code 2), or --help (code 0).
    """
    default, name, rest = _named(arguments)
    return _parse(Config, default, f"megapix {command} {name}", rest, world)


def parse_step(arguments: list[str], world: World, command: str = "megapix bench step") -> StepOptions:
    """The options of a benchmark of a step, from `PRESET [OPTIONS]` or `--config FILE [OPTIONS]`; as `parse_run`.

    Raises:
        InputError: as `parse_run`, or a batch that is asked for twice.
        SystemExit: as `parse_run`.
    """
    run, name, rest = _named(arguments)
    default = StepOptions.of(run)
    options = _parse(StepOptions, default, f"{command} {name}", rest, world)
    check_batch(options, default)
    return options


def _named(arguments: list[str]) -> tuple[Config, str, list[str]]:
    """The configuration that PRESET or --config FILE names, how it is named, and the arguments that follow."""
    first, rest = arguments[0], arguments[1:]
    if first == "--config":
        if not rest:
            raise InputError("--config needs a JSON file")
        return _read_config(Path(rest[0])), f"--config {rest[0]}", rest[1:]
    if first.startswith("-"):
        raise InputError(
            f"the first argument is {first!r}: expected a preset{one_of(first, list(PRESETS))} or --config FILE"
        )
    return config.preset(first), first, rest


def _parse(kind: type[T], default: T, command: str, arguments: list[str], world: World) -> T:
    return tyro.cli(kind, default=default, args=arguments, prog=command, console_outputs=world.main)


def _read_config(path: Path) -> Config:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"--config {path}: expected a table of options, found {type(data).__name__}")
    return config.from_dict(Config, data, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# sample, export, import, reshard, evaluate
# ---------------------------------------------------------------------------------------------------------------------


def sample(arguments: list[str], world: World) -> int:
    """Draw samples and write them as PNG."""
    options = tyro.cli(SampleOptions, args=arguments, prog="megapix sample", console_outputs=world.main)
    check(options)

    from megapix.drawing.command import sample

    return sample(options)


@dataclass(frozen=True)
class ExportOptions:
    """Write the EMA (or raw) weights of a run or checkpoint as one safetensors file, a chunk at a time; the
    configuration lies in its metadata. Or write a torch file as the authors of PixelDiT do."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint) or checkpoint folder; for nvlabs also an exported file or imported
    folder."""
    out: Path
    """File to write, such as pixeldit.safetensors; `megapix sample`, `load_model` and `train --init` read it."""
    format: Literal["safetensors", "nvlabs"] = "safetensors"
    """'nvlabs' writes a torch file (.ckpt, .pth) with the authors' names: docs/weights.md."""
    raw: bool = False
    """Export the raw weights instead of the EMA (the default)."""
    ema: bool = False
    """Export the EMA; the default, for a command that says so. With --raw, nvlabs writes both into one file."""


def export(arguments: list[str], world: World) -> int:
    """Export weights for use outside training."""
    options = tyro.cli(ExportOptions, args=arguments, prog="megapix export", console_outputs=world.main)
    theirs = options.format == "nvlabs"
    if options.raw and options.ema and not theirs:
        raise InputError("--ema and --raw: expected one of them")
    check_writable("--out", options.out)
    from megapix import nvlabs, weights

    if theirs:
        asked = [kind for kind, flag in ((True, options.ema), (False, options.raw)) if flag]
        written = nvlabs.export(options.path, options.out, asked or [None])
    else:
        written = [weights.export(options.path, options.out, not options.raw)]
    for about in written:
        print(f"megapix: {options.out}: the {about.kind} of {about.source}")
    return 0


@dataclass(frozen=True)
class ImportOptions:
    """Make a folder from a checkpoint that the authors of PixelDiT released: model.safetensors with the configuration
    in its metadata, and config.json. The network is recognised from the shapes; the numbers stay as they are."""

    checkpoint: tyro.conf.Positional[Path]
    """Torch file (.ckpt, .pth) with the authors' names, behind denoiser., ema_denoiser., another prefix or none."""
    out: Path
    """New folder; `megapix sample`, `export`, `load_model` and `train --init` read it."""
    ema: bool = False
    """Take the EMA; the default is the EMA if there is one, else the raw weights."""
    raw: bool = False
    """Take the raw weights."""
    trust: bool = False
    """Load a file that holds more than tensors too, which may run code in it: only if you trust whom it is from."""
    image_size: int | None = None
    """Height and width in pixels that the weights were trained at, 256 by default, of a network that takes text 1024;
    the sampling defaults are that size's preset's."""
    guidance: float | None = None
    """Guidance scale to sample with by default, 1 is off; the preset's."""
    interval: tuple[float, float] | None = None
    """Guidance acts for t strictly between these; the preset's."""
    shift: float | None = None
    """Time shift of the sampler's grid; the preset's."""


def import_(arguments: list[str], world: World) -> int:
    """Import released weights."""
    options = tyro.cli(ImportOptions, args=arguments, prog="megapix import", console_outputs=world.main)
    if options.raw and options.ema:
        raise InputError("--ema and --raw: expected one of them")
    from megapix import nvlabs
    from megapix.weights import first, write_model

    released = nvlabs.read(options.checkpoint, options.ema if options.ema or options.raw else None, options.trust)
    weights = nvlabs.weights_of(released, options.image_size, options.checkpoint)
    sampling = config.asked_sampling(
        weights.about.sampling, options.interval, guidance=options.guidance, shift=options.shift
    )
    about = replace(weights.about, sampling=sampling)
    write_model(options.out, replace(weights, about=about))
    print(f"megapix: {options.out}: the {about.kind} of {about.source}: {nvlabs.describe(about.model)}")
    print(f"megapix: taken from {released.place}")
    if released.ignored:
        print(f"megapix: not taken, as they belong to neither the EMA nor the raw weights: {first(released.ignored)}")
    return 0


@dataclass(frozen=True)
class ReshardOptions:
    """Write a checkpoint anew for another number of ranks, equal bit for bit. Going on with a run needs no such step:
    any number of ranks reads any checkpoint."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint) or checkpoint folder."""
    out: Path
    """Run folder to make, with that one checkpoint."""
    ranks: int
    """Ranks to write it for, a file each."""


def reshard(arguments: list[str], world: World) -> int:
    """Rewrite a checkpoint."""
    options = tyro.cli(ReshardOptions, args=arguments, prog="megapix reshard", console_outputs=world.main)
    if options.ranks < 1:
        raise InputError(f"--ranks = {options.ranks}: expected at least 1")
    from megapix import checkpoint
    from megapix.reshard import reshard

    saved = checkpoint.find(options.path, world)
    folder = reshard(saved, options.ranks, options.out)
    print(f"megapix: {folder}: {saved.folder} for {options.ranks} ranks")
    return 0


def evaluate(arguments: list[str], world: World) -> int:
    """Score images of a network, on this rank together with all others."""
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    options = tyro.cli(EvaluateOptions, args=arguments, prog="megapix evaluate", console_outputs=world.main)

    from megapix.evaluation import ranks
    from megapix.evaluation.run import evaluate

    try:
        return ranks.leave(world, evaluate(options, world))
    except dist.Agreed as error:
        _complain(error, world.main)
        return ranks.leave(world, 2)
    except Trouble as error:
        from megapix.watchdog import EXIT_LOST

        _complain(error, True)
        os._exit(EXIT_LOST)


# ---------------------------------------------------------------------------------------------------------------------
# bench
# ---------------------------------------------------------------------------------------------------------------------


def bench(arguments: list[str], world: World) -> int:
    """Time a training step on this rank, together with all others."""
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    if arguments and arguments[0] not in ("step", "-h", "--help"):
        raise InputError(f"megapix bench {arguments[0]!r} does not exist (one of: step)")
    if len(arguments) < 2 or arguments[1] in ("-h", "--help"):
        return _print_usage(BENCH_USAGE, [a for a in arguments if a != "step"])
    options = parse_step(arguments[1:], world)

    from megapix import engine
    from megapix.bench import run

    try:
        return engine.leave(world, run.step(options, world))
    except dist.Agreed as error:
        _complain(error, world.main)
        return engine.leave(world, 2)
    except Trouble as error:
        _complain(error, world.main)
        return engine.leave(world, 1)


COMMANDS = {
    "train": train,
    "sample": sample,
    "export": export,
    "import": import_,
    "reshard": reshard,
    "evaluate": evaluate,
    "doctor": doctor,
    "bench": bench,
    "plan": plan,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script and of each rank; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    world = World()
    try:
        if arguments[0] not in COMMANDS:
            raise InputError(f"command {arguments[0]!r} does not exist{one_of(arguments[0], list(COMMANDS))}")
        world = dist.from_environment()
        return COMMANDS[arguments[0]](arguments[1:], world)
    except InputError as error:
        # What the ranks have not agreed on may be wrong on one node alone: each node says it.
        _complain(error, world.main or (world.local_rank == 0 and not isinstance(error, dist.Agreed)))
        return 2
    except KeyboardInterrupt:
        goes_on = {"train": "; the same command goes on from the last checkpoint"}
        goes_on["evaluate"] = "; the same command goes on"
        _complain(f"interrupted{goes_on.get(arguments[0], '')}", world.main)
        return 130


def _complain(what: object, speak: bool) -> None:
    if speak:
        print(f"megapix: error: {what}", file=sys.stderr, flush=True)

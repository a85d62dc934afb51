"""The command line: `megapix COMMAND`. Parses, calls, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import sys

from megapix import __version__, outage
from megapix.cli import environment
from megapix.cli.images import evaluate, sample
from megapix.cli.runs import diff, report, runs
from megapix.cli.tools import bench, doctor, plan
from megapix.cli.train import train
from megapix.cli.weights import export, import_, push, reshard
from megapix.console import until_nobody_reads
from megapix.dist import (
    CollectiveInputError,
    CollectiveStorageError,
    World,
    abandon,
    first,
    from_environment,
    joined,
    leave,
)
from megapix.errors import InputError, OutOfMemory, RankLost, Reported, RunError, StorageError, one_of
from megapix.launch.command import launch
from megapix.resilience import out_of_memory
from megapix.resilience.first_error import EXIT_INTERRUPTED
from megapix.resilience.stopping import EXIT_STOPPED, StopRequested

USAGE = """usage: megapix COMMAND ...

Pretraining of PixelDiT, the pixel-space diffusion transformer, on DeepSpeed.

  launch    start several ranks of train, evaluate or doctor, on this machine or on several nodes (as launch.sh does)
  train     train a preset, or resume an interrupted run (several ranks: launch)
  sample    sample images from a run, a checkpoint, an exported file or an imported folder
  export    write the EMA or raw weights of a run as one safetensors file with their configuration, or as the authors do
  import    turn a checkpoint that the authors released into a folder that the other commands read
  push      make a model repository on the Hugging Face hub of a run's weights
  reshard   rewrite a checkpoint for another number of ranks
  evaluate  sample images and score them against reference statistics, or repeat a score (several ranks: launch)
  runs      print a table of the runs in a folder: state, images seen, loss, score, speed
  diff      print what two runs differ in: configuration, data, versions
  report    write a run as one HTML page: curves, sample grids, health, data, machines
  doctor    preflight: check on every node what would make a `train` command fail later; with --parity, compare
            ZeRO-2 on these machines with a plain PyTorch reference
  bench     time a training step here: MFU against this machine's own peak, and where the time goes
  plan      predict memory, the largest micro batch, speed and the checkpoint interval of a run on GPUs not yet at hand

'megapix COMMAND --help' documents each; 'megapix --version' says which megapix this is.
"""


COMMANDS = {
    "train": train,
    "sample": sample,
    "export": export,
    "import": import_,
    "push": push,
    "reshard": reshard,
    "evaluate": evaluate,
    "runs": runs,
    "diff": diff,
    "report": report,
    "doctor": doctor,
    "bench": bench,
    "plan": plan,
}


RESUMES = {"train": "; the same command resumes from the last checkpoint", "evaluate": "; the same command resumes"}
"""What to add to the message of an interrupted command."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script and of each rank; returns the exit code."""
    return until_nobody_reads(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megapix {__version__}")
        return 0
    if arguments[0] == "launch":  # before the environment of a rank is read, and completed
        return launch(arguments[1:])
    world = World()
    try:
        arguments = environment.prepare(arguments)
        if arguments[0] not in COMMANDS:
            raise InputError(f"command {arguments[0]!r} does not exist{one_of(arguments[0], [*COMMANDS, 'launch'])}")
        world = from_environment()
        with out_of_memory.told(world, lambda: (0, arguments[0]), out_of_memory.of_command):
            code = COMMANDS[arguments[0]](arguments[1:], world)
    except StopRequested as request:
        world.say(str(request))
        code = EXIT_STOPPED
    except Reported as error:
        return abandon(world, error.code)
    except CollectiveInputError as error:
        _complain(error, world.main)
        code = 2
    except InputError as error:
        # Not raised on all ranks, so perhaps of one node alone: each node prints it.
        _complain(error, world.local_rank == 0 or joined())
        return abandon(world, 2)
    except CollectiveStorageError as error:
        _complain(error, world.main)
        code = error.exit_code
    except StorageError as error:
        _complain(error, first("storage"))  # an outage is often that of all ranks at once
        return abandon(world, error.exit_code)
    except OutOfMemory as error:
        _complain(error, first("out of memory"))  # often it is so on all ranks at once
        return abandon(world, error.exit_code)
    except RankLost as error:
        _complain(error, True)
        return abandon(world, error.exit_code)
    except RunError as error:
        _complain(error, world.main)
        code = error.exit_code
    except OSError as error:
        if not outage.of_storage(error):
            raise
        _complain(outage.said(error), first("storage"))
        return abandon(world, StorageError.exit_code)
    except KeyboardInterrupt:
        _complain(f"interrupted{RESUMES.get(arguments[0], '')}", world.main)
        return abandon(world, EXIT_INTERRUPTED)
    return leave(world, code)


def _complain(error: object, here: bool) -> None:
    if here:
        print(f"megapix: error: {error}", file=sys.stderr, flush=True)

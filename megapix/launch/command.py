"""`megapix launch`: checks once what every rank would find, starts the ranks, and ends with their code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from glob import glob
from pathlib import Path

from megapix.dist import free_port
from megapix.errors import InputError, RankLost
from megapix.launch import hostfile, machine, options, slurm
from megapix.launch.handover import Handover
from megapix.launch.options import USAGE, Options
from megapix.launch.supervise import HEEDED, LOST, Interrupted, Supervisor, heeding, interrupt, say
from megapix.launch.words import PLAIN, quoted

PROGRAM = "MEGAPIX_LAUNCHER"
"""How the user has called this, where it was not `megapix launch`."""
NO_SSH_PORT = 29500
SEVERAL = "on several nodes DeepSpeed takes the first GPUs of each: expected it unset"
ALIVE = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
"""A dead host must not keep ssh, and so this command, waiting."""


def launch(argv: list[str]) -> int:
    """Start ranks as the command line says; returns the exit code, and ends by a signal that came before the run."""
    program = os.environ.pop(PROGRAM, "megapix launch")
    try:
        with heeding(interrupt):
            return _launch(argv, program)
    except InputError as error:
        say(program, f"error: {error}")
        return 2
    except RankLost as error:
        say(program, f"error: {error}")
        return LOST
    except Interrupted as stop:
        signal.signal(stop.number, signal.SIG_DFL)
        os.kill(os.getpid(), stop.number)
        return 128 + stop.number  # the first process of a container is not ended by its own signal


def _launch(argv: list[str], program: str) -> int:
    typed = "./launch.sh" if program == "launch.sh" else program
    asked = options.parse(argv)
    if not asked.arguments or (asked.command == "train" and asked.arguments[0] in ("--help", "-h")):
        print(USAGE.format(program=typed), end="", file=sys.stdout if asked.help else sys.stderr)
        return 0 if asked.help else 2
    python = _python()
    os.environ["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])  # for ninja
    rank = [python, "-m", "megapix", asked.command, *asked.arguments]
    if asked.help:
        os.execv(python, rank)
    gpus = machine.gpus()
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"

    step = slurm.step()
    if step:
        if not step.one_a_node and (asked.hostfile or asked.no_ssh or asked.ranks):
            raise InputError("under srun each task is a rank: expected none of --hostfile, --no-ssh, --ranks")
        if not (step.one_a_node and (len(gpus) > 1 or asked.ranks or asked.hostfile or asked.no_ssh)):
            os.execve(python, rank, os.environ | _of_task(step, asked, gpus))  # SLURM's signals reach the rank itself
        if not asked.hostfile and not asked.no_ssh:
            asked = replace(
                asked, no_ssh=True, nnodes=step.nodes, node_rank=step.node, master=asked.master or slurm.first_node()
            )
            os.environ.setdefault("MASTER_PORT", str(slurm.port()))
            if step.node == 0:
                say(program, f"one task a node: each of the {step.nodes} starts the ranks of its node")
    elif not asked.hostfile and not asked.no_ssh:
        slurm.check_srun(typed)
        _tell_of_others(program)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a scheduler, which counts pods or nodes
        os.environ.pop(name, None)
    return _start(asked, gpus, python, program)


def _of_task(step: slurm.Step, asked: Options, gpus: machine.Gpus) -> dict[str, str]:
    """What a launcher would set for this task of srun."""
    if len(gpus) > 1 and step.here and step.here != len(gpus):
        raise InputError(
            f"srun has started {step.here} tasks on this node, where each sees {len(gpus)} GPUs ({gpus.visible}): "
            f"expected one for each (--ntasks-per-node={len(gpus)}), or one a node (--ntasks-per-node=1)"
        )
    return {
        "MASTER_ADDR": asked.master or slurm.first_node(),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(slurm.port()),
        "RANK": str(step.rank),
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_RANK": "0" if len(gpus) == 1 else str(step.local_rank),  # --gpus-per-task=1: it sees its own alone
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK") or "1",
    }


def _start(asked: Options, gpus: machine.Gpus, python: str, program: str) -> int:
    """Everything from the nodes to the exit code."""
    nodes, ranks = _nodes_and_ranks(asked, gpus)
    world = sum(node.slots for node in nodes) or ranks
    by_ssh = bool(asked.hostfile) and not asked.no_ssh
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    run = _checked(python, asked.arguments, world) if asked.command == "train" else None
    port = _port(asked)
    if not gpus:
        machine.ready_for_cpu_ranks(ranks, ranks == world, python)

    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="megapix-launch-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        if not gpus and ranks == world:
            stack.callback(_remove_segments, port)
        words = [asked.command, *asked.arguments]
        if by_ssh:
            words = _over_ssh(words, python)
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        where = ["--hostfile", "/dev/null"]
        if nodes:
            where[1] = str(hostfile.write(scratch / "hostfile", nodes))
        if asked.no_ssh:
            where += ["--no_ssh", "--node_rank", str(asked.node_rank), "--master_addr", asked.master]
        elif by_ssh:
            where += ["--force_multi", *(["--master_addr", asked.master] if asked.master else [])]
            handover = Handover(nodes, scratch)
            stack.callback(handover.take_back)
            stack.callback(_ignore_signals)
            environment = handover.give(environment, words[1:] != asked.arguments)
        elif gpus.numbers:
            where += ["--include", f"localhost:{','.join(map(str, gpus.numbers[:ranks]))}"]
            if gpus.by_uuid:
                environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's, in which they were counted
        else:
            where += ["--num_gpus", str(ranks)]
        # CUDA_VISIBLE_DEVICES is named to the launcher, which sets it for each rank.
        command = [python, "-m", "deepspeed.launcher.runner", "--log_level", "error", *where]
        command += ["--master_port", str(port), "--no_local_rank", "--module", "megapix", *words]
        if gpus.slices:  # they have no number that DeepSpeed's launcher could set, and a lone rank needs none
            command = [python, "-m", "megapix", *words]
            environment["CUDA_VISIBLE_DEVICES"] = gpus.slices[0]
        code = Supervisor(program, run, nodes if by_ssh else [], port).wait_for(command, environment)
        _ignore_signals()
        return code


def _nodes_and_ranks(asked: Options, gpus: machine.Gpus) -> tuple[list[hostfile.Node], int]:
    """The nodes, none if this one is alone, and the ranks of this one (by ssh: of the first)."""
    if (asked.hostfile or asked.no_ssh) and gpus.numbers != tuple(range(len(gpus))):
        raise InputError(f"CUDA_VISIBLE_DEVICES = {gpus.visible!r}: {SEVERAL}")
    if asked.hostfile:
        nodes = hostfile.read(asked.hostfile)
    else:
        ranks = asked.ranks or len(gpus) or 2
        if gpus and ranks > len(gpus):
            raise InputError(f"--ranks = {ranks}: there are {len(gpus)} GPUs ({gpus.visible})")
        if gpus.slices and ranks > 1:
            raise InputError(
                f"CUDA_VISIBLE_DEVICES = {gpus.visible!r}: NCCL joins no MIG slices: expected one of them, or --ranks 1"
            )
        if not asked.no_ssh:
            return [], ranks
        # Names that nobody calls: DeepSpeed counts nodes and ranks from them.
        nodes = [hostfile.Node(f"node-{number}", ranks) for number in range(asked.nnodes or 1)]
    number = asked.node_rank or 0
    if number >= len(nodes):
        raise InputError(f"--node-rank = {number}: there are {len(nodes)} nodes")
    return nodes, nodes[number].slots


def _checked(python: str, arguments: list[str], world: int) -> Path:
    """Check the configuration once, so that a mistake is one line and not one from every rank; returns the run folder.

    Raises:
        SystemExit: with the code of the check, which has said what is wrong.
    """
    first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    command = [python, "-m", "megapix", "train", *arguments, "--dry-run"]
    done = subprocess.run(command, env=os.environ | first, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return Path(json.loads(done.stdout)["out"])


def _over_ssh(words: list[str], python: str) -> list[str]:
    """The words as they are sent; `PDSH_*` is set for pdsh and ssh.

    Raises:
        InputError: pdsh is missing, or a path that DeepSpeed writes into a shell's command line would be changed there.
    """
    if not shutil.which("pdsh"):
        raise InputError("no pdsh: --hostfile starts the nodes with it (Debian: apt install pdsh); or --no-ssh")
    for path in (os.getcwd(), python):
        if not PLAIN.fullmatch(path):
            raise InputError(f"{path!r} holds what a shell reads, and does not survive ssh: expected a plain path")
    os.environ["PDSH_RCMD_TYPE"] = "ssh"
    os.environ["PDSH_SSH_ARGS_APPEND"] = f"{ALIVE} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}"
    return quoted(words)


def _port(asked: Options) -> int:
    """MASTER_PORT; without it a free one, but on nodes that do not tell each other the same on all."""
    value = os.environ.get("MASTER_PORT")
    if value:
        if not value.isdecimal() or not 0 < int(value) < 65536:
            raise InputError(f"environment variable MASTER_PORT = {value!r}: expected a number from 1 to 65535")
        return int(value)
    if asked.no_ssh:
        return NO_SSH_PORT
    return free_port()


def _python() -> str:
    """PYTHON, or this interpreter.

    Raises:
        InputError: PYTHON names none.
    """
    wanted = os.environ.get("PYTHON")
    found = shutil.which(wanted) if wanted else sys.executable
    if not found:
        raise InputError(f"PYTHON = {wanted!r}: expected an interpreter's name or path")
    return os.path.abspath(found)


def _tell_of_others(program: str) -> None:
    """A pod of several, in which one node alone is started, may be meant or not."""
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1 and "RANK" in os.environ:
        say(
            program,
            f"note: RANK = {os.environ['RANK']} and WORLD_SIZE = {world} are set, and this starts one node alone: for "
            "all of them --no-ssh, --nnodes, --node-rank and --master-addr",
        )


def _remove_segments(port: int) -> None:
    """Shared memory of DeepSpeed's CPU communication op, which outlives a run; the port makes this run's own."""
    for path in glob(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        Path(path).unlink(missing_ok=True)


def _ignore_signals() -> None:
    for number in HEEDED:
        signal.signal(number, signal.SIG_IGN)

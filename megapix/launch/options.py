"""The options of `megapix launch`; everything else on the command line is for the ranks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from megapix.errors import InputError

USAGE = """usage: {program} [options] PRESET --data.path SHARDS --out RUN [megapix train options]
       {program} [options] doctor PRESET --data.path SHARDS --out RUN [megapix train options]
       {program} [options] doctor --parity
       {program} [options] evaluate WEIGHTS --reference STATS [megapix evaluate options]

The first starts `megapix train`, the next two `megapix doctor` (is every node fit for that run?), the last `megapix
evaluate`, under the deepspeed launcher: one rank for each GPU of this machine, or, where there is none, CPU ranks with
gloo (2 by default). Everything but these options goes to megapix.

  --ranks N         ranks on each node (default: all GPUs, or those of CUDA_VISIBLE_DEVICES; without a GPU, 2 CPU ranks)
  --hostfile FILE   several nodes, started from this one by ssh and pdsh: a line 'HOST slots=RANKS' for each
  --no-ssh          several nodes, with this command run on each by hand or by a scheduler; needs
    --node-rank N     which node this is, from 0 (the one at --master-addr)
    --nnodes K        how many there are, or --hostfile FILE for nodes with different numbers of ranks
  --master-addr A   address of the first node for the others (default with --hostfile: its first by `hostname -I`)
  --help            this text; `megapix train --help` lists presets, `megapix train PRESET --help` all options

Under srun with a task for each GPU, each task becomes one rank, with no launcher in between; with one task a node, each
starts the ranks of its node. docs/cluster.md shows all ways, with a SLURM script and files for Kubernetes and SkyPilot.

TERM, USR1 or HUP asks the run to save and end with code 75; a second one, or INT, ends it at once with 130.
Code 69: a rank or a node was lost. 74: storage was away. The others are those of `megapix train`.

Environment: PYTHON (the ranks' interpreter; default of launch.sh: .venv/bin/python if it exists, else python3),
OMP_NUM_THREADS (CPU threads of a rank; default: cores / ranks), MASTER_PORT (default: a free port; with --no-ssh
29500), MASTER_ADDR (as --master-addr). With --hostfile the other nodes get what torch, Triton, NCCL and remote storage
read of it, tokens and keys by a file in their memory that only this user can read and that is removed
(docs/cluster.md).
"""
COMMANDS = ("doctor", "evaluate")
"""Commands that ranks can be started with, besides train, which needs no name."""
VALUED = ("--ranks", "--hostfile", "--node-rank", "--nnodes", "--master-addr")


@dataclass
class Options:
    """What to start, and where. A number that was not given is None, a text that was not given is empty."""

    ranks: int | None = None
    hostfile: str = ""
    no_ssh: bool = False
    node_rank: int | None = None
    nnodes: int | None = None
    master: str = ""
    command: str = "train"
    arguments: list[str] = field(default_factory=list)
    help: bool = False
    """Whether the command only prints something, for which one process is enough."""


def parse(argv: list[str]) -> Options:
    """Options from a command line that is not empty; MASTER_ADDR is the default of --master-addr.

    Raises:
        InputError: an option without its value, a value that is no number, or options that exclude each other.
    """
    given, rest, no_ssh, asks = dict[str, str](), list[str](), False, False
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in VALUED:
            found = value if equals else next(words, None)
            if found is None:
                raise InputError(f"{option} needs a value")
            given[option] = found
        elif word == "--no-ssh":
            no_ssh = True
        else:
            asks |= word in ("--help", "-h", "--print-config")
            rest.append(word)
    command = "train"
    if rest and rest[0] in COMMANDS:
        command, rest = rest[0], rest[1:] or ["--help"]
    ranks, nnodes, node = given.get("--ranks", ""), given.get("--nnodes", ""), given.get("--node-rank", "")
    hostfile, master = given.get("--hostfile", ""), given.get("--master-addr", os.environ.get("MASTER_ADDR", ""))
    for option, value in (("--ranks", ranks), ("--nnodes", nnodes)):
        if value and not re.fullmatch("[1-9][0-9]*", value):
            raise InputError(f"{option} = {value!r}: expected a number above 0")
    if hostfile and (ranks or nnodes):
        raise InputError("--hostfile says how many nodes and ranks: expected no --nnodes or --ranks")
    if no_ssh:
        if not re.fullmatch("[0-9]+", node):
            raise InputError(f"--node-rank = {node!r}: --no-ssh expects this node's number, from 0")
        if not master:
            raise InputError("--no-ssh expects --master-addr, the address of node 0 for the others")
        if not nnodes and not hostfile:
            raise InputError("--no-ssh expects --nnodes or --hostfile")
    elif node or nnodes:
        raise InputError("--node-rank and --nnodes go with --no-ssh")
    return Options(
        ranks=int(ranks) if ranks else None,
        hostfile=hostfile,
        no_ssh=no_ssh,
        node_rank=int(node) if node else None,
        nnodes=int(nnodes) if nnodes else None,
        master=master,
        command=command,
        arguments=rest,
        help=asks,
    )

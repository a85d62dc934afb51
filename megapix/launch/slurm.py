"""What SLURM says of a step and a job: is this process one of srun's tasks, and which one?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from megapix.errors import InputError


@dataclass(frozen=True)
class Step:
    """A step of several tasks, seen from one of them.

    Attributes:
        tasks: how many there are; rank: which one this is; local_rank: which one of its node.
        nodes, node: the same of nodes; here: tasks on this node. None where SLURM does not say.
    """

    tasks: int
    rank: int
    local_rank: int
    nodes: int | None
    node: int | None
    here: int | None

    @property
    def one_a_node(self) -> bool:
        """Whether each node has one task."""
        return self.nodes == self.tasks


def step() -> Step | None:
    """The step that srun has started this process in; None outside, and in a step of one task, as `srun --pty` makes.

    Raises:
        InputError: a variable of SLURM is missing or no number.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS", 1) or 1
    if tasks == 1:
        return None
    node = _number("SLURM_NODEID", None)
    counts = _counts(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    here = counts[node] if node is not None and node < len(counts) else None
    return Step(
        tasks,
        _required("SLURM_PROCID"),
        _required("SLURM_LOCALID"),
        _number("SLURM_STEP_NUM_NODES", None) or len(counts) or None,
        node,
        here,
    )


def check_srun(program: str) -> None:
    """Refuse a job of several nodes whose script has forgotten srun: it would use the first node alone.

    Raises:
        InputError: as said.
    """
    nodes = _number("SLURM_JOB_NUM_NODES", None) or _number("SLURM_NNODES", 1) or 1
    if nodes > 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        names = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST", "?")
        raise InputError(
            f"this SLURM job has {nodes} nodes ({names}), and without srun this command would use one of them: "
            f"expected `srun {program} …` (for one node `srun --nodes=1 --ntasks=1 {program} …`), or --hostfile"
        )


def first_node() -> str:
    """The step's first node, by scontrol or from a list such as node[03-07,12],other.

    Raises:
        InputError: the list has no name.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    found = re.match(r"([^\],\[]+)(?:\[([0-9]+))?", nodes)
    if not found:
        raise InputError(f"SLURM_STEP_NODELIST = {nodes!r} has no first node: set MASTER_ADDR")
    return found[1] + (found[2] or "")


def port() -> int:
    """A port for the ranks of this step, the same on all its nodes and another one for each step and job."""
    return 20000 + (_required("SLURM_JOB_ID") + _required("SLURM_STEP_ID")) % 10000


def _counts(text: str) -> list[int]:
    """Tasks of each node, from '2(x3),1'."""
    found = re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _required(name: str) -> int:
    value = _number(name, None)
    if value is None:
        raise InputError(f"environment variable {name} is missing: expected it from srun, beside SLURM_STEP_NUM_TASKS")
    return value


def _number(name: str, default: int | None) -> int | None:
    value = os.environ.get(name, "")
    if value and not re.fullmatch("[0-9]+", value):
        raise InputError(f"environment variable {name} = {value!r}: expected a number")
    return int(value) if value else default

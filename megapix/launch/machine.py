"""What this machine has for its ranks: GPUs, or what CPU ranks need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megapix.errors import InputError

SHARED_MEMORY = 66
"""MiB of /dev/shm that DeepSpeed's CPU communication op takes for each rank of a single node."""
NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is SLURM's."""


@dataclass(frozen=True)
class Gpus:
    """GPUs that ranks may use.

    Attributes:
        visible: CUDA_VISIBLE_DEVICES, or all numbers where it is not set.
        numbers: each one's number as nvidia-smi counts, for DeepSpeed's launcher; empty for CPU ranks and slices.
        slices: names of MIG slices, which have no number.
    """

    visible: str = ""
    numbers: tuple[int, ...] = ()
    slices: tuple[str, ...] = ()
    by_uuid: bool = False

    def __len__(self) -> int:
        return len(self.numbers) + len(self.slices)


def gpus() -> Gpus:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES lets be seen; none where no driver answers.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES names what there is not, or no device at all.
    """
    if not shutil.which("nvidia-smi"):
        return Gpus()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, errors="replace").stdout
    lines = [line for line in listed.splitlines() if line.startswith("GPU ")]  # slices of a GPU are listed below it
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(lines)))))
    if not lines or visible.strip() in NO_GPU:
        return Gpus()
    names = [name.strip() for name in visible.split(",")]
    if all(name.startswith("MIG-") for name in names):
        return Gpus(visible, slices=tuple(names))
    return Gpus(visible, _numbers(visible, names, lines), by_uuid=names[0].startswith("GPU-"))


def _numbers(visible: str, names: list[str], lines: list[str]) -> tuple[int, ...]:
    """Numbers of GPUs that are named by numbers or by (the start of) their UUID, up to a -1, which ends the list."""
    uuids = [found[1] if (found := re.search(r"\(UUID: (\S+)\)", line)) else "" for line in lines]
    numbers = list[int]()
    for name in names[: names.index("-1")] if "-1" in names else names:
        if name.startswith("GPU-"):
            meant = [number for number, uuid in enumerate(uuids) if uuid.startswith(name)]
        else:
            meant = [number for number in range(len(lines)) if name == str(number)]
        if len(meant) != 1 or meant[0] in numbers:
            raise InputError(
                f"CUDA_VISIBLE_DEVICES = {visible!r}: expected numbers such as 0,1 or UUIDs of the {len(lines)} GPUs "
                f"that nvidia-smi lists, each once, or a MIG slice; {name!r} is none"
            )
        numbers += meant
    return tuple(numbers)


def ready_for_cpu_ranks(ranks: int, alone: bool, python: str) -> None:
    """Look for what CPU ranks need; `alone` is whether this is the only node.

    Raises:
        InputError: the compiler, ninja, Python's headers or room in /dev/shm is missing.
    """
    if not shutil.which("g++"):
        raise InputError("no g++: DeepSpeed compiles its CPU communication op (Debian: apt install g++)")
    if not shutil.which("ninja"):
        raise InputError(f"no ninja beside {python}: pip install ninja")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise InputError(f"no {header}: DeepSpeed's op needs Python's headers (Debian: apt install python3-dev)")
    if alone:
        need, free = ranks * SHARED_MEMORY, shutil.disk_usage("/dev/shm").free >> 20
        if free < need:
            raise InputError(f"/dev/shm has {free} MiB free, {ranks} CPU ranks need {need} (docker: --shm-size=1g)")

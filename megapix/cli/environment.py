"""What a launcher hands on, and torch's allocator: a process's environment, completed before anything loads torch."""

from __future__ import annotations

import os
import re
import stat
import sys
from importlib.metadata import PackageNotFoundError, version

from megapix.errors import InputError
from megapix.launch.words import QUOTED, unquoted

HANDED_ON = "MEGAPIX_ENVIRONMENT"
"""Where `megapix launch` has put a rank's variables on its node: this, a dot, and the rank."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The names under which torch's releases read how their GPU allocator works."""
SEGMENTS = "expandable_segments:True"
"""Segments that grow, so that shapes that vary do not leave holes which no tensor fits."""


def prepare(arguments: list[str]) -> list[str]:
    """Take over what `megapix launch` hands on, then let segments of GPU memory grow; the start of every command.

    Returns:
        The arguments as they were typed: those of a rank of another node come quoted.

    Raises:
        InputError: as `take_over`.
    """
    take_over()
    expand_segments()
    return unquoted(arguments) if os.environ.pop(QUOTED, None) else arguments


def take_over() -> None:
    """Read this rank's variables from its file, which is removed; without MEGAPIX_ENVIRONMENT nothing is done.

    The file holds NAME=VALUE entries that each end with a zero byte, as /proc/PID/environ does.

    Raises:
        InputError: the file cannot be read, or others can read or have written it.
    """
    base = os.environ.pop(HANDED_ON, None)
    if base is None:
        return
    path = f"{base}.{os.environ.get('RANK', '0')}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise InputError(f"{HANDED_ON} = {base!r}: {path!r} is not this user's alone: expected mode 600")
            entries = file.read().split(b"\0")
        os.unlink(path)
    except OSError as error:
        raise InputError(
            f"{HANDED_ON} = {base!r}: {path!r} cannot be read ({error.strerror}): expected the file that launch.sh "
            "leaves for each rank, or the variable unset"
        ) from error
    for entry in filter(None, entries):
        name, _, value = entry.partition(b"=")
        os.environb[name] = value


def expand_segments() -> None:
    """Set expandable_segments:True by the name that the installed torch reads, unless the user has set such a name.

    Once torch is loaded nothing is done: it may have read its configuration.
    """
    if "torch" in sys.modules or any(name in os.environ for name in ALLOCATOR):
        return
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return
    os.environ[allocator_variable(installed)] = SEGMENTS


def allocator_variable(torch: str) -> str:
    """The variable that the CUDA allocator of this version of torch reads, the newer name where it reads both.

    PYTORCH_ALLOC_CONF is read by c10/cuda/CUDAAllocatorConfig.h from 2.10.0 on. 2.9 already calls the older name
    deprecated, and yet its CUDA allocator reads no other (pytorch/pytorch#183387).
    """
    found = re.match(r"(\d+)\.(\d+)(\.\d+)?(a|b|rc|\.dev)?", torch)
    release, early = (int(found[1]), int(found[2])) if found else (0, 0), bool(found and found[4])
    return ALLOCATOR[0] if release > (2, 10) or (release == (2, 10) and not early) else ALLOCATOR[1]

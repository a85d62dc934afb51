"""Out of memory, of a GPU or of the host, in one line: which rank, in which phase, how much it asked for, and the
options that need less there."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megapix.config import Config
from megapix.config.ds_config import read_knobs
from megapix.dist import World
from megapix.errors import InputError, OutOfMemory, Reported, RunError

AMOUNT = r"([\d.]+ (?:[KMGTPE]iB|bytes))"
"""As torch writes bytes (format_size in CUDACachingAllocator.cpp)."""
GPU_SAYS = re.compile(
    r"(?:CUDA|HIP) out of memory|(?:CUDA|HIP) error: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU(?:BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED|Cuda failure \d* ?'out of memory'"
)
"""How torch's allocator, the driver, CUDA's libraries and NCCL (in this order) say that a GPU is full."""
HOST_SAYS = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory")
"""How torch says that malloc has failed (c10/core/impl/alloc_cpu.cpp)."""
LONGEST = 200
"""Characters that are kept of words that nothing was found in."""

Where = Callable[[], tuple[int, str]]
"""Tells the step, 0 where there is none, and the phase."""
Ways = Callable[[str, bool], Sequence[str]]
"""Phase, and whether it is a GPU's memory -> options that need less of it there."""


@dataclass(frozen=True)
class Lack:
    """Memory that was not there."""

    gpu: bool
    """Whether it is a GPU's; else the host's."""
    what: str
    """Such as '2.00 GiB asked, 1.02 GiB of 79.11 GiB free'."""


@contextmanager
def told(world: World, where: Where, ways: Ways) -> Iterator[None]:
    """Turn whatever says that memory was lacking into OutOfMemory.

    Raises:
        OutOfMemory: one line with rank, phase, bytes and the options that would help.
    """
    try:
        yield
    except (InputError, RunError, Reported):  # it is one line already
        raise
    except Exception as error:
        found = lack(error)
        if found is None:
            raise
        step, phase = where()
        rank = f" on rank {world.rank} ({socket.gethostname()})" if world.size > 1 else ""
        place = f"step {step}, phase '{phase}'" if step else f"phase '{phase}'"
        options = ways(phase, found.gpu)
        help_ = f"; less is needed with {_listed(options)}" if options else ""
        kind = "GPU" if found.gpu else "host"
        raise OutOfMemory(f"out of {kind} memory{rank}, {place}: {found.what}{help_}") from error


def lack(error: BaseException) -> Lack | None:
    """What memory an error lacked, or the error that it was raised from; None if it was about something else."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, MemoryError) or HOST_SAYS.search(str(at)):
            return Lack(False, _of_host(str(at)))
        if _is_torchs(at) or (isinstance(at, RuntimeError) and GPU_SAYS.search(str(at))):
            return Lack(True, _of_gpu(str(at)))
        # torch.compile keeps what has gone wrong inside of it in inner_exception.
        context = None if at.__suppress_context__ else at.__context__
        at = getattr(at, "inner_exception", None) or at.__cause__ or context
    return None


def of_run(config: Config, micro: int, phase: str, gpu: bool) -> list[str]:
    """Options of a run that need less memory in a phase of it (`resilience/watchdog.py`).

    Args:
        config: resolved.
        micro: images of a micro batch.
        gpu: whether it is a GPU's memory; else the host's.
    """
    m, e = config.machine, config.evaluation
    offloaded = "offload_optimizer" in read_knobs(m.ds_config, m.unproven)["zero_optimization"]
    if not gpu:
        return _present(
            (phase == "save" and config.checkpoint.background, "--checkpoint.no-background"),
            (m.pixel_checkpointing == "offload", "--machine.pixel-checkpointing full"),
            (offloaded, "--machine.ds-config zero2"),
            (config.data.workers > 1, f"--data.workers below {config.data.workers}"),
        )
    if phase == "sample":
        return ["--log.grid-columns", "--log.grid-classes", "--log.samples-every never"]
    if phase == "validate":
        return ["--validation.every never"]
    if phase in ("evaluate", "score"):
        return _present((e.batch > 1, f"--evaluation.batch below {e.batch}"), (True, "--evaluation.every never"))
    states = (not offloaded, "--machine.ds-config zero2_offload"), (True, "more ranks")
    if phase in ("start", "load", "save"):
        return _present(*states)
    keeps = "full" if m.pixel_checkpointing not in ("full", "chunked", "offload") else "chunked"
    fits = m.pixel_checkpointing not in (keeps, "offload") and (keeps == "full" or m.pixel_kernels == "plain")
    return _present(
        (micro > 1, f"--machine.micro-batch below {micro}"),
        (fits, f"--machine.pixel-checkpointing {keeps}"),
        (m.patch_checkpointing not in ("full", 1), "--machine.patch-checkpointing full"),
        *states,
    )


def of_command(command: str, gpu: bool) -> Sequence[str]:
    """Options of a command that need less memory of a GPU; none are known for the host's."""
    training = "--machine.pixel-checkpointing full", "--machine.patch-checkpointing full"
    known: dict[str, Sequence[str]] = {
        "train": ("--machine.micro-batch", *training),
        "sample": ("--batch", "--size"),
        "evaluate": ("--batch", "--precision bf16"),
        "bench": ("--micro-batch", *training),
    }
    return known.get(command, ()) if gpu else ()


def _is_torchs(error: BaseException) -> bool:
    """Whether torch's allocator of a GPU has raised it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _of_gpu(said: str) -> str:
    asked = re.search(rf"Tried to allocate {AMOUNT}", said)
    total = re.search(rf"total capacity of {AMOUNT}", said)
    free = re.search(rf"of which {AMOUNT} is free", said)
    if not asked:
        return _short(said)
    return f"{asked[1]} asked" + (f", {free[1]} of {total[1]} free" if free and total else "")


def _of_host(said: str) -> str:
    if count := re.search(r"tried to allocate (\d+) bytes", said):
        return f"{int(count[1]) / 2**30:.2f} GiB asked"
    asked = re.search(rf"Unable to allocate {AMOUNT}", said)  # NumPy
    return f"{asked[1]} asked" if asked else _short(said)


def _short(said: str) -> str:
    """The line that says most: the first, but of a worker's traceback the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["the bytes are not known"]
    return lines[-1 if "Traceback" in said else 0][:LONGEST]


def _present(*ways: tuple[bool, str]) -> list[str]:
    return [way for helps, way in ways if helps]


def _listed(words: Sequence[str]) -> str:
    """Such as 'a, b or c'."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))

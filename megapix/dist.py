"""Rank and world as a plain value, messages from rank 0, collectives of small objects, and how a rank ends."""

from __future__ import annotations

import atexit
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from megapix.errors import InputError, StorageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The environment of a launcher, and what holds without one."""

STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop (`resilience/stopping.py`)."""
STORE_PATIENCE = timedelta(seconds=5)
"""How long a rank that ends waits for the store that all ranks have met at."""


@dataclass(frozen=True)
class World:
    """This process's place in the run. `size` counts ranks; under no launcher it is 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints, logs and decides names."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print a line on rank 0, above a progress bar if there is one."""
        if self.main:
            _print(f"megapix: {message}", sys.stdout)


def warn(message: str) -> None:
    """Print a warning on this rank, whichever it is."""
    _print(f"megapix: warning: {message}", sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a warning on rank 0, before the ranks have met, and never again."""
    if os.environ.get("RANK", "0") == "0":
        warn(message)


def _print(line: str, file: TextIO) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=file)
    file.flush()


class CollectiveInputError(InputError):
    """An InputError that every rank has raised, so that all can leave in order."""

    collective = True


class CollectiveStorageError(StorageError):
    """A StorageError that every rank has raised, so that all can leave in order."""

    collective = True


@contextmanager
def stops_held_back() -> Iterator[None]:
    """Keep the signals that ask a run to stop from what this thread does, and from the processes that it starts. They
    come afterwards. A launcher sends them to every process of a job, and a compiler would end in the midst of its work.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def from_environment() -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as `deepspeed` and `torchrun` set them.

    Raises:
        InputError: one of them is not a number.
    """
    values = {name: os.environ.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in values.items():
        if not value.isdigit():
            raise InputError(f"environment variable {name} = {value!r}: expected a number")
    return World(int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"]))


def agree(world: World, problem: str | InputError | StorageError | None = None, group: Any = None) -> None:
    """Sync all ranks; if any reports a problem, raise the same error on every one, so that none hangs.

    Args:
        group: a process group of all ranks for use in a thread of its own (`host_group`); None is the default one.

    Raises:
        CollectiveInputError: the first problem, with the rank and host that reported it unless all have the same.
        CollectiveStorageError: the same, if that is a StorageError.
    """
    mine = (None if problem is None else str(problem), isinstance(problem, StorageError), socket.gethostname())
    problems = gather(world, mine, group)
    bad = [(rank, host, text, storage) for rank, (text, storage, host) in enumerate(problems) if text]
    if bad:
        rank, host, text, storage = bad[0]
        everyone = len(bad) == world.size and len({text for _, _, text, _ in bad}) == 1
        kind = CollectiveStorageError if storage else CollectiveInputError
        raise kind(text if everyone else f"rank {rank} on {host}: {text}")


def on_all_ranks(world: World, work: Callable[[], T], group: Any = None) -> T:
    """Run `work` on every rank and return its value.

    Raises:
        CollectiveInputError: on every rank, if `work` raised InputError on any; StorageError, CollectiveStorageError.
    """
    value: T | None = None
    problem: InputError | StorageError | None = None
    try:
        value = work()
    except (InputError, StorageError) as error:
        problem = error
    agree(world, problem, group)
    return cast(T, value)


def gather(world: World, value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, on every rank, in rank order. Values are small and picklable."""
    if world.size == 1:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value, group)
    return values


def gather_on_main(world: World, value: Any) -> list[Any] | None:
    """Every rank's value in rank order, on rank 0 alone, and None on the others. Every rank calls it."""
    if world.size == 1:
        return [value]
    import torch.distributed

    values: list[Any] | None = [None] * world.size if world.main else None
    torch.distributed.gather_object(value, values, dst=0)
    return values


def round_robin(world: World, count: int) -> Iterator[int | None]:
    """This rank's share of the numbers below `count`, dealt out round robin; None where the last round has none left
    for it. Every rank gets equally many rounds."""
    for first in range(0, count, world.size):
        number = first + world.rank
        yield number if number < count else None


def merge_round_robin(shares: list[list[T]]) -> list[T]:
    """Results of the ranks' `round_robin` shares in the order of the numbers; `shares` are in rank order."""
    return [shares[number % len(shares)][number // len(shares)] for number in range(sum(map(len, shares)))]


def total(world: World, numbers: torch.Tensor) -> list[float]:
    """Each number's sum over all ranks, on every rank: one all-reduce (in place) and one wait for the device."""
    if world.size > 1:
        import torch.distributed

        torch.distributed.all_reduce(numbers)
    return numbers.tolist()


def host_group(world: World) -> Any:
    """A gloo group of all ranks, for a thread that must stay out of training's collectives. Collective."""
    if world.size == 1:
        return None
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    gather(world, None)


def free_port() -> int:
    """A TCP port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def allow_files() -> None:
    """Raise the limit of open files as far as it goes. Each rank of a large run holds some connections for every other,
    and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop() -> None:
    """Wait for every rank and leave the process group; a rank that exits while others talk would abort."""
    if joined():
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def leave(world: World, code: int) -> int:
    """End this rank with `code` when all ranks do; return it if it has joined no process group. Every rank calls it.

    A process that has joined a group ends here, after Python's own exit handlers: threads that gloo has left behind can
    abort the interpreter's teardown ("terminate called without an active exception"), and a launcher would take a
    finished run for a failed one.
    """
    several = world.size > 1 and joined()
    stop()
    if several:
        _exit(code)
    return code


def abandon(world: World, code: int) -> int:
    """End this rank alone with `code`: others may wait in a collective, until the launcher sees the code and ends them.
    Before it has joined them, return the code."""
    if world.size > 1 and joined():
        _exit(code)
    return code


def first(what: str) -> bool:
    """Whether no rank has asked this about `what` before. Needs no other rank, but for the store that rank 0 or the
    launcher holds: True where that does not answer."""
    if not joined():
        return True
    from torch.distributed import distributed_c10d

    try:
        store = distributed_c10d._get_default_store()
        store.set_timeout(STORE_PATIENCE)
        return int(store.add(f"megapix/{what}", 1)) == 1
    except RuntimeError:  # torch's DistError and its children
        return True


def joined() -> bool:
    """Whether this rank has joined the process group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed

    return torch.distributed.is_initialized()


def _exit(code: int) -> None:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

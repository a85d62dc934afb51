"""Rank and world as a plain value, messages from rank 0, and the question "does anyone object?"."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from megapix.errors import InputError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The environment of a launcher, and what holds without one."""


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


def _print(line: str, file: TextIO) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=file)
    file.flush()


class Agreed(InputError):
    """An InputError that every rank has raised together, so that all can leave in order."""


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


def agree(world: World, problem: str | None = None, group: Any = None) -> None:
    """Meet all ranks; if any brings a problem, raise the same error on every one, so that none hangs.

    Args:
        group: a process group of all ranks for use in a thread of its own (`host_group`); None is the default one.

    Raises:
        Agreed: the first problem, with the rank and host that brought it where not every rank has the same.
    """
    if world.size == 1:
        if problem:
            raise Agreed(problem)
        return
    problems = gather(world, (problem, socket.gethostname()), group)
    bad = [(rank, host, text) for rank, (text, host) in enumerate(problems) if text]
    if bad:
        rank, host, text = bad[0]
        everyone = len(bad) == world.size and len({text for _, _, text in bad}) == 1
        raise Agreed(text if everyone else f"rank {rank} on {host}: {text}")


def together(world: World, work: Callable[[], T], group: Any = None) -> T:
    """Run `work` on every rank and return its value, or raise Agreed on all if it raised InputError on any."""
    value, problem = None, None
    try:
        value = work()
    except InputError as error:
        problem = str(error)
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


def turns(world: World, count: int) -> Iterator[int | None]:
    """Numbers below `count` in turns of one for each rank: this rank's, and None where the last turn has none for it.
    Every rank has equally many turns."""
    for first in range(0, count, world.size):
        number = first + world.rank
        yield number if number < count else None


def in_order(shares: list[list[T]]) -> list[T]:
    """What the ranks have made of their numbers in `turns`, in the numbers' order; `shares` are in rank order."""
    return [shares[number % len(shares)][number // len(shares)] for number in range(sum(map(len, shares)))]


def total(world: World, numbers: torch.Tensor) -> list[float]:
    """Each number's sum over all ranks, on every rank: one all-reduce (in place) and one wait for the device."""
    if world.size > 1:
        import torch.distributed

        torch.distributed.all_reduce(numbers)
    return numbers.tolist()


def host_group(world: World) -> Any:
    """A gloo group of all ranks, for a thread that must not meet the training's collectives. Collective."""
    if world.size == 1:
        return None
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    gather(world, None)

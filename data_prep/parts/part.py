"""--part: which share of the work is this process's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from megapix.errors import InputError

T = TypeVar("T")

SLURM, KUBERNETES = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"
"""Numbers of a task: of a SLURM array, and of a pod of a Kubernetes Job with completionMode Indexed."""
EXPECTED = "expected I/N with I from 0 to N - 1, such as 0/8 for the first of 8, or auto, or auto/N"


class Part(NamedTuple):
    """One of the shares of a work; its jobs are those whose number is its own, modulo the number of shares."""

    number: int
    of: int
    """How many there are."""

    @property
    def whole(self) -> bool:
        """Whether there are no others."""
        return self.of == 1

    def mine(self, jobs: Iterable[T]) -> Iterator[T]:
        """Its own jobs, of all."""
        return islice(jobs, self.number, None, self.of)

    def mine_first(self, jobs: int) -> list[int]:
        """Numbers of all jobs: first its own, then those of the part after it, and so on. So what all parts need is
        done once if they begin together, and none waits for one that has not begun."""
        return [job for other in range(self.of) for job in range((self.number + other) % self.of, jobs, self.of)]

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def clear_own(folder: Path, pattern: str, part: Part) -> None:
    """Remove the files of a killed process, which are numbered by their jobs; those of other parts stay: these may be
    at work."""
    for leftover in folder.glob(pattern):
        found = re.search(r"-(\d{6,})\.", leftover.name)
        if part.whole or (found and int(found[1]) % part.of == part.number):
            leftover.unlink(missing_ok=True)


WHOLE = Part(0, 1)
"""All of it: one machine alone."""


def parse_part(option: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Read --part: 'I/N'; 'auto', the task's number in its SLURM array; or 'auto/N', its number in a SLURM array from 0
    or a Kubernetes Job, of N.

    Raises:
        InputError: it is none of these, I is not below N, or the scheduler does not say.
    """
    if not option:
        return WHOLE
    first, slash, count = option.partition("/")
    if first != "auto" or slash:
        number = _of_scheduler(option, environment)[1] if first == "auto" else first
        if not (_is_number(number) and _is_number(count) and int(number) < int(count)):
            said = f" ({'/'.join((number, count))})" if first == "auto" else ""
            raise InputError(f"--part = {option!r}{said}: {EXPECTED}")
        return Part(int(number), int(count))
    name, number = _of_scheduler(option, environment)
    if name == KUBERNETES:
        raise InputError(f"--part auto: {KUBERNETES} = {number} does not say of how many; give --part auto/N")
    keys = (name, "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
    values = [environment.get(key, "1" if key.endswith("STEP") else "") for key in keys]
    if all(map(_is_number, values)):
        place, least, total, step = map(int, values)
        at, beside = divmod(place - least, max(1, step))
        if not beside and 0 <= at < total:
            return Part(at, total)
    said = ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True))
    raise InputError(f"--part auto: {said} is no range of tasks; give --part auto/N")


def _of_scheduler(option: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """(variable, the task's number)."""
    for name in (SLURM, KUBERNETES):
        if name in environment:
            return name, environment[name]
    raise InputError(f"--part {option}: neither {SLURM} nor {KUBERNETES} is set; give --part I/N, such as 0/8")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()

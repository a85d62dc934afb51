"""Work in processes: bounded queues, progress, and the budget of samples that may be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from data_prep.receipt import Rejected
from megapix.errors import InputError

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """What the main process hears of a part: the rest is in its receipt."""

    samples: int
    rejected: tuple[Rejected, ...]


@dataclass
class Budget:
    """Counts rejected samples and stops the run when they are too many of all samples."""

    share: float
    samples: int = 0
    """All samples, or of an index, whose number is not known before, those seen so far."""
    rejected: int = 0

    def check(self) -> None:
        """Raise InputError unless the share is one."""
        if not 0.0 <= self.share <= 1.0:
            raise InputError(f"--max-rejected = {self.share}: expected a share, 0 to 1")

    def spend(self, rejected: tuple[Rejected, ...]) -> None:
        """Count the rejected samples of a part.

        Raises:
            InputError: the budget is used up; names the latest sample and the reason.
        """
        self.rejected += len(rejected)
        if rejected and self.rejected > self.share * self.samples:
            raise InputError(
                f"{self.rejected} of {self.samples} samples cannot be used, --max-rejected allows {self.share:g} of "
                f"them; the latest is {rejected[-1].source!r}: {rejected[-1].reason}"
            )


def check_workers(workers: int) -> None:
    """Raise InputError for a number of processes that has no meaning."""
    if workers < 1:
        raise InputError(f"--workers = {workers}: expected at least 1")


def in_processes(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[tuple[J, R]]:
    """Run the jobs in processes, in order of completion, with no more of them queued than keeps the workers busy."""
    with ProcessPoolExecutor(workers, get_context("forkserver")) as pool:
        remaining = iter(jobs)
        running: dict[Future[R], J] = {pool.submit(work, job): job for job in islice(remaining, 2 * workers)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    for following in islice(remaining, 1):
                        running[pool.submit(work, following)] = following
                    yield job, future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise

"""Work in processes: bounded queues, progress, and the budget of samples that may be left out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

from data_prep.parts.part import WHOLE, Part
from data_prep.writing.receipt import Rejected
from megapix.errors import InputError

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """What the main process gets of a part: the rest is in its receipt."""

    samples: int
    rejected: tuple[Rejected, ...]
    caption_keys: tuple[str, ...] = ()
    """Keys of --captions that it has."""
    names: tuple[int | str, ...] = ()
    """Distinct labels that are no class numbers."""
    columns: tuple[str, ...] = ()
    """Columns of filters that it has."""
    unreadable: bool = False
    """Whether the part is a tar file that was rejected as a whole."""


@dataclass
class Budget:
    """Counts rejected samples and stops the run when they are too many of all samples."""

    share: float
    samples: int = 0
    """All samples, or as many as are expected."""
    rejected: int = 0
    latest: Rejected | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise InputError(f"--max-rejected = {self.share}: expected a share, 0 to 1")

    def spend(self, rejected: tuple[Rejected, ...]) -> None:
        """Count the rejected samples of a part.

        Raises:
            InputError: the budget is used up; names the latest sample and the reason.
        """
        self.rejected += len(rejected)
        self.latest = rejected[-1] if rejected else self.latest
        if self.latest and self.rejected > self.share * self.samples:
            raise InputError(
                f"{self.rejected} of {self.samples} samples cannot be used, --max-rejected allows {self.share:g} of "
                f"them; the latest is {self.latest.source!r}: {self.latest.reason}"
            )

    def spent(self) -> dict[str, Any]:
        """What was counted, for `add` of another process."""
        return {"rejected": self.rejected, "latest": asdict(self.latest) if self.latest else None}

    def add(self, spent: Mapping[str, Any]) -> None:
        """Count what another process has spent; errors as in `spend`."""
        self.rejected += spent["rejected"] - bool(spent["latest"])
        self.spend((Rejected(**spent["latest"]),) if spent["latest"] else ())


def check_workers(workers: int) -> None:
    """Raise InputError for a number of processes that has no meaning."""
    if workers < 1:
        raise InputError(f"--workers = {workers}: expected at least 1")


_loaded = ["megapix.shards.pixels"]


def load_in_workers(*modules: str) -> None:
    """Have the server that workers are forked from load what they need: once, and not in each of them. To be called
    before the first `in_processes`."""
    _loaded.extend(module for module in modules if module not in _loaded)


def in_processes(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[tuple[J, R]]:
    """Run the jobs in processes, in order of completion, with no more of them queued than keeps the workers busy.

    A worker is handed `work`, with all that it is bound to, such as an index, once: a job is as large as itself.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_loaded)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,)) as pool:
        remaining = iter(jobs)
        running: dict[Future[R], J] = {pool.submit(_do, job): job for job in islice(remaining, 2 * workers)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    for following in islice(remaining, 1):
                        running[pool.submit(_do, following)] = following
                    yield job, future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, perhaps for want of memory; expected room for --workers processes: give "
                "the same command with fewer"
            ) from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                for worker in active_children():  # what is half done is done again; nobody waits for it here
                    worker.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_work: Callable[[Any], Any]
"""In a worker: what it does with a job."""


def _begin(work: Callable[[Any], Any]) -> None:
    """In a worker. A terminal sends interrupts to all processes, and this one would end with a traceback."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(job: Any) -> Any:
    return _work(job)


@contextmanager
def alone_in(out: Path, part: Part = WHOLE) -> Iterator[None]:
    """Hold the folder `out` for this process; parts of one work hold it together.

    On a file system of many machines that does not know this lock the work begins without it.

    Raises:
        InputError: another one holds it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if part.whole else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    except BlockingIOError as error:
        raise InputError(f"another data_prep is at work in {str(out)!r}") from error
    finally:
        os.close(descriptor)

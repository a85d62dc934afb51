"""Saving: every rank writes its share, rank 0 checks that all are there, commits, and removes old checkpoints.

A checkpoint is written into NAME.tmp, its files are synced, the manifest is written last, the folder is renamed, and
then `latest` is moved. A crash at any moment leaves the previous checkpoint as it was. A background save does the
same from a copy in host memory, over a process group of its own, while training continues. A save that fails is
tried again when the next one is due, and the last one of a run, after which nothing comes, some seconds later.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megapix import files
from megapix.checkpoint import buffers, retention, vectors
from megapix.checkpoint.buffers import HostCopy
from megapix.checkpoint.find import check_files
from megapix.checkpoint.folder import (
    COMMITTING_NAME,
    HEALTHY_NAME,
    KEEP_NAME,
    checkpoints_of,
    latest,
    name_of,
    point_to,
)
from megapix.checkpoint.layout import PARTS, FileRecord
from megapix.checkpoint.manifest import State, write_state
from megapix.config import CheckpointConfig
from megapix.dist import CollectiveStorageError, World, gather, host_group, on_all_ranks, warn
from megapix.errors import InputError, RunError, StorageError

PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds before each further try of a run's last save."""

T = TypeVar("T")
Share = Mapping[str, Sequence[Tensor]]
"""This rank's range of each of PARTS, in pieces that follow each other."""


class Saver:
    """Writes the checkpoints of one run. Make one on every rank, after joining the process group.

    Args:
        written: called as parts of a file are written, in whichever thread does it.

    Attributes:
        stall: seconds that training has waited for saves.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, world: World, written: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.config, self.world, self._written = run, config, world, written
        self.stall = 0.0
        self._group = host_group(world)
        self._host: dict[str, HostCopy] = {}
        self._thread: threading.Thread | None = None
        self._problem: RunError | None = None
        self._failures = 0
        self._last: tuple[State, Share, bool] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that failed; `finish` says why."""
        return self._problem is not None

    @property
    def at_work(self) -> bool:
        """Whether a background save goes on."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: State, share: Mapping[str, Tensor], prune: bool = True) -> None:
        """Save on all ranks; in the background unless the configuration says no. Call it on every rank.

        Args:
            state: all but its files.
            share: this rank's range of each of PARTS, flat fp32, on any device.
            prune: remove checkpoints that no rule keeps.

        Raises:
            RunError: as `finish`, of the save before it.
            MemoryError: this rank's host, and perhaps no other, has no room for the copy.
        """
        start = time.perf_counter()
        try:
            self._finish()
            if not self.config.background:
                self._last = state, {part: [share[part]] for part in PARTS}, prune
                self._write(*self._last)
                return
            for part in PARTS:
                if part not in self._host:
                    self._host[part] = HostCopy(len(share[part]), pinned=share[part].is_cuda)
                self._host[part].take(share[part])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._last = state, {part: self._host[part].pieces for part in PARTS}, prune
            self._thread = threading.Thread(target=self._write, args=self._last, name="save")
            self._thread.start()
        finally:
            self.stall += time.perf_counter() - start

    def finish(self) -> bool:
        """Wait for the last save; False if it failed, which is warned of. Call it on every rank.

        Raises:
            RunError: it failed, and so did as many before it as `max_failed` allows; StorageError for a disk's sake.
        """
        start = time.perf_counter()
        try:
            return self._finish()
        finally:
            self.stall += time.perf_counter() - start

    def settle(self) -> None:
        """Wait for the last save of a run, and try it again if it failed. Nothing may have been trained since. Call it
        on every rank.

        Raises:
            RunError: it has failed once more after each of PAUSES; StorageError for a disk's sake.
        """
        self._join()
        for pause in PAUSES:
            if self._problem is None or self._last is None:
                return
            if self.world.main:
                warn(f"{self._problem}; tried again in {pause:g} s")
            time.sleep(pause)
            self._write(*self._last)
        if self._problem:
            raise self._problem

    def close(self) -> None:
        """Wait for a background save at the end of a run that failed; warn if the save failed too."""
        self._join()
        if self._problem and self.world.main:
            warn(str(self._problem))

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _finish(self) -> bool:
        self._join()
        problem, self._problem = self._problem, None
        if problem is None:
            return True
        self._failures += 1
        if self._failures >= self.config.max_failed:
            raise problem
        if self.world.main:
            times = f"{self._failures} in a row, checkpoint.max_failed = {self.config.max_failed} end the run"
            warn(f"{problem}; the next one is tried when it is due ({times})")
        return False

    def _write(self, state: State, share: Share, prune: bool) -> None:
        """Write and commit; every rank ends with the same problem, or none."""
        name = name_of(state.counters)
        try:
            name = gather(self.world, name, self._group)[0]
            self._commit(name, replace(state, files=self._put(name, state, share)), prune)
            self._problem, self._failures = None, 0
        except Exception as error:  # what a thread raises would be lost
            kind = CollectiveStorageError if isinstance(error, StorageError) else RunError
            what = str(error) if isinstance(error, (InputError, StorageError)) else repr(error)
            self._problem = kind(f"the checkpoint {name} could not be saved: {what}; {self._before()}")

    def _before(self) -> str:
        """What there is of the checkpoint before; the disk that has failed is not waited for."""
        try:
            left = latest(self.run, minutes=0)
        except StorageError:
            return "what is before it cannot be seen now"
        return f"{left} is still whole" if left else "there is none before it"

    def _put(self, name: str, state: State, share: Share) -> dict[str, FileRecord]:
        """Write this rank's file into NAME.tmp; returns the records of all ranks' files."""
        temporary = checkpoints_of(self.run) / f"{name}.tmp"
        path = temporary / state.layout.file_of(self.world.rank)

        def begin() -> None:
            if self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> FileRecord:
            return vectors.write(path, {part: self._telling(*buffers.flat(share[part])) for part in PARTS})

        try:
            on_all_ranks(self.world, lambda: _named(temporary, begin), self._group)
            record = on_all_ranks(self.world, lambda: _named(path, write), self._group)
        except (InputError, StorageError):
            if self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        return dict(zip(state.layout.files, gather(self.world, record, self._group), strict=True))

    def _telling(self, shape: tuple[int], pieces: Iterable[Tensor]) -> tuple[tuple[int], Iterable[Tensor]]:
        """A vector as `vectors.write` takes it; `written` is called before each piece."""

        def each() -> Iterator[Tensor]:
            for piece in pieces:
                self._written()
                yield piece

        return shape, each()

    def _commit(self, name: str, state: State, prune: bool) -> None:
        """Rank 0: check that every rank's file is there, write the manifest, rename, move `latest`, prune."""
        parent = checkpoints_of(self.run)
        temporary, final, replaced = parent / f"{name}.tmp", parent / name, parent / f"{name}.old"

        def commit() -> None:
            try:
                check_files(temporary, state, World(), hashed=False)
            except InputError as error:
                reason = "the run folder (--out) must be on a file system that all nodes share"
                raise InputError(f"{error}: {reason}") from error
            write_state(temporary, state)
            named = latest(self.run, minutes=0)
            files.write_atomic(temporary / COMMITTING_NAME, f"{named.name if named else ''}\n".encode())
            files.sync_folder(temporary)
            if final.exists():
                for mark in (KEEP_NAME, HEALTHY_NAME):
                    if (final / mark).exists():
                        shutil.copy2(final / mark, temporary / mark)
                retention.erase(replaced)  # of a commit that failed after its rename
                os.replace(final, replaced)
            os.replace(temporary, final)
            files.sync_folder(parent)
            point_to(final)
            (final / COMMITTING_NAME).unlink()
            files.sync_folder(final)
            retention.erase(replaced)
            if prune:
                _prune(self.run, final, self.config)

        on_all_ranks(self.world, lambda: _named(temporary, commit) if self.world.main else None, self._group)


def _prune(run: Path, newest: Path, config: CheckpointConfig) -> None:
    """`retention.prune`; the checkpoint is there, whatever becomes of older ones."""
    try:
        retention.prune(run, newest, config)
    except (OSError, StorageError) as error:
        warn(f"older checkpoints could not be removed: {error}")


def _named(path: Path, work: Callable[[], T]) -> T:
    """`work`, with any error as one that names the file and that `on_all_ranks` tells the others."""
    try:
        return work()
    except (InputError, StorageError):
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(f"{path}: {error!r}") from error

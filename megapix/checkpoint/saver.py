"""Saving: every rank writes its share, rank 0 checks that all are there, commits, and removes old checkpoints.

A checkpoint is written into NAME.tmp, its files are synced, the manifest is written last, the folder is renamed, and
then `latest` is moved. A crash at any moment leaves the previous checkpoint as it was. A background save does the
same from a copy in host memory, over a process group of its own, while training continues.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megapix import files
from megapix.checkpoint import buffers, retention, vectors
from megapix.checkpoint.buffers import HostCopy
from megapix.checkpoint.find import check_files
from megapix.checkpoint.folder import HEALTHY_NAME, KEEP_NAME, checkpoints_of, latest, name_of, point_to
from megapix.checkpoint.layout import PARTS, FileRecord
from megapix.checkpoint.manifest import State, write_state
from megapix.config import CheckpointConfig
from megapix.dist import World, gather, host_group, on_all_ranks, warn
from megapix.errors import InputError, RunError

T = TypeVar("T")
Share = Mapping[str, Sequence[Tensor]]
"""This rank's range of each of PARTS, in pieces that follow each other."""


class Saver:
    """Writes the checkpoints of one run. Make one on every rank, after joining the process group.

    Attributes:
        stall: seconds that training has waited for saves.
    """

    def __init__(self, run: Path, config: CheckpointConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        self.stall = 0.0
        self._group = host_group(world)
        self._host: dict[str, HostCopy] = {}
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a background save that failed; `finish` raises the reason."""
        return self._problem is not None

    def save(self, state: State, share: Mapping[str, Tensor], prune: bool = True) -> None:
        """Save on all ranks; in the background unless the configuration says no. Call it on every rank.

        Args:
            state: all but its files.
            share: this rank's range of each of PARTS, flat fp32, on any device.
            prune: remove checkpoints that no rule keeps.

        Raises:
            RunError: this save, or the background save before it, failed on any rank; the reason names it.
            MemoryError: this rank's host, and perhaps no other, has no room for the copy.
        """
        start = time.perf_counter()
        try:
            self._finish()
            if not self.config.background:
                self._write(state, {part: [share[part]] for part in PARTS}, prune)
                self._finish()
                return
            for part in PARTS:
                if part not in self._host:
                    self._host[part] = HostCopy(len(share[part]), pinned=share[part].is_cuda)
                self._host[part].take(share[part])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            written = {part: self._host[part].pieces for part in PARTS}
            self._thread = threading.Thread(target=self._write, args=(state, written, prune), name="save")
            self._thread.start()
        finally:
            self.stall += time.perf_counter() - start

    def finish(self) -> None:
        """Wait for a background save.

        Raises:
            RunError: it failed.
        """
        start = time.perf_counter()
        try:
            self._finish()
        finally:
            self.stall += time.perf_counter() - start

    def close(self) -> None:
        """Wait for a background save at the end of a run that failed; warn if the save failed too."""
        try:
            self.finish()
        except RunError as error:
            warn(str(error))

    def _finish(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._problem:
            problem, self._problem = self._problem, None
            raise RunError(problem)

    def _write(self, state: State, share: Share, prune: bool) -> None:
        """Write and commit; every rank ends with the same problem, or none."""
        name = name_of(state.counters)
        try:
            name = gather(self.world, name, self._group)[0]
            self._commit(name, replace(state, files=self._put(name, state, share)), prune)
        except Exception as error:  # what a thread raises would be lost
            left = latest(self.run)
            before = f"{left} is still whole" if left else "there is none before it"
            what = str(error) if isinstance(error, InputError) else repr(error)
            self._problem = f"the checkpoint {name} could not be saved: {what}; {before}"

    def _put(self, name: str, state: State, share: Share) -> dict[str, FileRecord]:
        """Write this rank's file into NAME.tmp; returns the records of all ranks' files."""
        temporary = checkpoints_of(self.run) / f"{name}.tmp"
        path = temporary / state.layout.file_of(self.world.rank)

        def begin() -> None:
            if self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> FileRecord:
            return vectors.write(path, {part: buffers.flat(share[part]) for part in PARTS})

        try:
            on_all_ranks(self.world, lambda: _named(temporary, begin), self._group)
            record = on_all_ranks(self.world, lambda: _named(path, write), self._group)
        except InputError:
            if self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        return dict(zip(state.layout.files, gather(self.world, record, self._group), strict=True))

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
            files.sync_folder(temporary)
            if final.exists():
                for mark in (KEEP_NAME, HEALTHY_NAME):
                    if (final / mark).exists():
                        shutil.copy2(final / mark, temporary / mark)
                os.replace(final, replaced)
            os.replace(temporary, final)
            files.sync_folder(parent)
            point_to(final)
            retention.erase(replaced)
            if prune:
                retention.prune(self.run, final, self.config)

        on_all_ranks(self.world, lambda: _named(temporary, commit) if self.world.main else None, self._group)


def _named(path: Path, work: Callable[[], T]) -> T:
    """`work`, with any error as an InputError that names the file, so that `on_all_ranks` tells the others."""
    try:
        return work()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(f"{path}: {error!r}") from error

"""Rolling back after a spike: to the last checkpoint before it, skipping the data that led there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megapix.checkpoint import retention
from megapix.checkpoint.find import Saved, first_whole
from megapix.checkpoint.folder import complete, point_to, protect
from megapix.checkpoint.manifest import State, read_state, write_state
from megapix.dist import World, on_all_ranks, warn
from megapix.errors import InputError, RunError
from megapix.outage import error_of
from megapix.resilience.health import Spike

Ranges = tuple[tuple[int, int], ...]


def newest_before(run: Path, position: int) -> list[Path]:
    """Checkpoints at or before a position, newest first; any that cannot be read is left out."""
    folders = []
    for folder in reversed(complete(run)):
        try:
            if read_state(folder).counters.position <= position:
                folders.append(folder)
        except InputError:
            continue
    return folders


def keep_healthy(run: Path, spike: Spike, world: World) -> Path | None:
    """Protect the last checkpoint before a spike from removal, or warn if that fails; returns its folder."""
    healthy = newest_before(run, spike.start)
    if world.main and healthy:
        try:
            protect(run, healthy[0])
        except OSError as error:
            warn(f"{healthy[0]} cannot be marked, so retention may remove it: {error.strerror}")
    return healthy[0] if healthy else None


def roll_back(run: Path, spike: Spike, now: State, skip: int, world: World) -> Saved:
    """Make the last whole checkpoint before a spike the one to resume from, with the skipped data recorded in it.

    The checkpoints after it are given up: they are removed, and any that is marked or being read is set aside.

    Args:
        now: the state of the run; every rank passes the same.
        skip: samples before the spike that are skipped too, no further back than the checkpoint.

    Returns:
        That checkpoint; its state has the skipped window and the count of rollbacks.

    Raises:
        RunError: no whole checkpoint lies before the spike, or the rollback could not be recorded in it.
        StorageError: for want of storage.
    """
    saved = first_whole(newest_before(run, spike.start), world).saved
    if saved is None:
        raise RunError(f"{spike.reason}; there is no whole checkpoint before it to roll back to")
    folder, before = saved.folder, saved.state.counters
    window = (max(before.position, spike.start - skip), now.counters.position)
    counters = replace(before, skipped=merged((*before.skipped, *now.counters.skipped, window)))
    state = replace(saved.state, counters=counters, spikes=now.spikes, rollbacks=now.rollbacks + 1, standing_out=())

    def record() -> None:
        try:
            write_state(folder, state)
            point_to(folder)
            retention.leave(run, folder, remove=True)
        except OSError as error:
            raise error_of(error, f"{error.filename or folder}: {error.strerror}") from error

    try:
        on_all_ranks(world, lambda: record() if world.main else None)
    except InputError as error:
        raise RunError(f"{spike.reason}; rolling back failed: {error}") from error
    return Saved(folder, state)


def merged(ranges: Ranges) -> Ranges:
    """Sorted, disjoint half-open ranges that cover the same positions."""
    union: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], stop))
        else:
            union.append((start, stop))
    return tuple(union)

"""Going back after a spike: to the last checkpoint before it, past the data that led there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megapix import checkpoint, retention
from megapix.checkpoint import Saved, State
from megapix.dist import World, together, warn
from megapix.errors import InputError, Trouble
from megapix.health import Spike

Ranges = tuple[tuple[int, int], ...]


def newest_before(run: Path, position: int) -> list[Path]:
    """Checkpoints at or before a position, newest first; any that cannot be read is left out."""
    found = []
    for folder in reversed(checkpoint.complete(run)):
        try:
            if checkpoint.read_state(folder).counters.position <= position:
                found.append(folder)
        except InputError:
            continue
    return found


def keep_healthy(run: Path, spike: Spike, world: World) -> Path | None:
    """Protect the last checkpoint before a spike from removal, or warn if that fails; returns its folder."""
    healthy = newest_before(run, spike.start)
    if world.main and healthy:
        try:
            checkpoint.protect(run, healthy[0])
        except OSError as error:
            warn(f"{healthy[0]} cannot be marked, so it is removed when its time comes: {error.strerror}")
    return healthy[0] if healthy else None


def roll_back(run: Path, spike: Spike, now: State, skip: int, world: World) -> Saved:
    """Make the last whole checkpoint before a spike the one to go on from, with the data window recorded in it.

    The checkpoints after it are of a course that is given up: they are removed, and any that is marked or being read is
    set aside.

    Args:
        now: where the run stands; every rank gives the same.
        skip: samples before the spike that are skipped too, no further back than the checkpoint.

    Returns:
        That checkpoint; its state has the skipped window and the count of rollbacks.

    Raises:
        Trouble: no whole checkpoint lies before the spike, or going back could not be recorded in it.
    """
    saved = checkpoint.first_whole(newest_before(run, spike.start), world).saved
    if saved is None:
        raise Trouble(f"{spike.reason}; there is no whole checkpoint before it to go back to")
    folder, before = saved.folder, saved.state.counters
    window = (max(before.position, spike.start - skip), now.counters.position)
    counters = replace(before, skipped=merged((*before.skipped, *now.counters.skipped, window)))
    state = replace(saved.state, counters=counters, spikes=now.spikes, rollbacks=now.rollbacks + 1, standing_out=())

    def record() -> None:
        try:
            checkpoint.write_state(folder, state)
            checkpoint.point_to(folder)
            retention.leave(run, folder, remove=True)
        except OSError as error:
            raise InputError(f"{error.filename or folder}: {error.strerror}") from error

    try:
        together(world, lambda: record() if world.main else None)
    except InputError as error:
        raise Trouble(f"{spike.reason}; going back failed: {error}") from error
    return Saved(folder, state)


def merged(ranges: Ranges) -> Ranges:
    """Sorted, disjoint half-open ranges that cover the same positions."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)

"""Checkpoints of a run: written beside, renamed, `latest` last; read back by the same command.

RUN/config.json                     the resolved configuration
RUN/checkpoints/latest              name of the newest complete checkpoint
RUN/checkpoints/images-000064000/   DeepSpeed's shards of network, optimizer, EMA and schedule, and
    state.json                      counters, resolved configuration, data set, ranks
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megapix import config as configuration
from megapix.config import Config
from megapix.dist import World, barrier, together
from megapix.errors import InputError
from megapix.shards import write_atomic

VERSION = 1
STATE_NAME = "state.json"
LATEST_NAME = "latest"
MODEL_NAME = "model.safetensors"


@dataclass(frozen=True)
class Counters:
    """Where a run stands.

    position: samples drawn; moves on every step, applied or not, and alone decides data, noise, t, dropout and flip.
    images_seen: samples of applied steps; alone decides learning rate, end, and the cadence of saves and logs.
    skipped: sorted half-open ranges of positions that are never drawn; empty unless a data window was skipped.
    """

    position: int = 0
    images_seen: int = 0
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def drawn(self) -> int:
        """Samples drawn so far: the position, less the skipped ranges before it."""
        return self.position - sum(
            min(stop, self.position) - start for start, stop in self.skipped if start < self.position
        )


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself, beside DeepSpeed's shards."""

    counters: Counters
    config: Config
    data_digest: str
    classes: tuple[str, ...]
    ranks: int
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each file of the checkpoint, noted when it is saved."""


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names; None for a run without one.

    Raises:
        InputError: `latest` names a checkpoint that is not there.
    """
    pointer = checkpoints_of(run) / LATEST_NAME
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not (folder / STATE_NAME).is_file():
        raise InputError(f"{pointer} names {folder.name!r}, but {folder / STATE_NAME} is missing")
    return folder


def save(run: Path, state: State, world: World, write: Callable[[Path, str], None], keep: int) -> Path:
    """Save on all ranks: `write(parent, name)` writes every rank's shards; rank 0 commits. Returns the folder.

    A checkpoint of that name is replaced only after the new one is complete.

    Raises:
        Agreed: rank 0 does not see every rank's shard: the run folder is not shared between the nodes.
    """
    parent = checkpoints_of(run)
    name = f"images-{state.counters.images_seen:012d}"
    temporary, final = parent / f"{name}.tmp", parent / name
    if world.main:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier(world)
    write(parent, temporary.name)
    barrier(world)
    together(world, lambda: _check_shared(temporary, world) if world.main else None)
    if world.main:
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        write_atomic(
            temporary / STATE_NAME, (json.dumps(_to_json(replace(state, files=sizes)), indent=1) + "\n").encode()
        )
        _sync(temporary)
        replaced = parent / f"{name}.old"
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        write_atomic(parent / LATEST_NAME, f"{name}\n".encode())
        shutil.rmtree(replaced, ignore_errors=True)
        _retain(parent, final, keep)
    barrier(world)
    return final


def find_weights(path: Path) -> Path:
    """The folder that holds weights for `path`: an exported folder, a checkpoint, or a run's latest checkpoint.

    Raises:
        InputError: none of the three is there.
    """
    if (path / MODEL_NAME).is_file() or (path / STATE_NAME).is_file():
        return path
    folder = latest(path)
    if folder is None:
        raise InputError(
            f"{str(path)!r} holds no weights: expected a run with checkpoints/{LATEST_NAME}, "
            f"a checkpoint with {STATE_NAME}, or an export with {MODEL_NAME}"
        )
    return folder


def read_state(folder: Path) -> State:
    """Read a checkpoint's state.json.

    Raises:
        InputError: missing, not JSON, of another version, or with unknown options.
    """
    path = folder / STATE_NAME
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise InputError(f"{path}: version is {data['version']!r}, this release reads version {VERSION}")
        return State(
            _counters(data["counters"]),
            configuration.from_dict(Config, data["config"], str(path)),
            data["data_digest"],
            tuple(data["classes"]),
            data["ranks"],
            data["files"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}") from error


def check_files(folder: Path, state: State) -> None:
    """Check that every file of a checkpoint is there with its size.

    Raises:
        InputError: naming the first file that is missing or cut, with both sizes.
    """
    for name, size in state.files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; name an older checkpoint in {folder.parent / LATEST_NAME}")
        if path.stat().st_size != size:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, but {size} were saved; "
                f"name an older checkpoint in {folder.parent / LATEST_NAME}"
            )


def _to_json(state: State) -> dict[str, Any]:
    return {"version": VERSION, **asdict(state)}


def _counters(data: dict[str, Any]) -> Counters:
    counters = Counters(data["position"], data["images_seen"], tuple((a, b) for a, b in data["skipped"]))
    numbers = (counters.position, counters.images_seen, *(n for pair in counters.skipped for n in pair))
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or counters.drawn < counters.images_seen:
        raise ValueError(f"counters {data}: expected whole numbers, and no more images seen than samples drawn")
    return counters


def _check_shared(temporary: Path, world: World) -> None:
    found = len(list(temporary.glob("*optim_states.pt")))
    if found != world.size:
        raise InputError(
            f"{temporary} holds the shards of {found} ranks, expected {world.size}: "
            "the run folder (--out) must be on a file system that all nodes share"
        )


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _retain(parent: Path, newest: Path, keep: int) -> None:
    if keep:
        complete = sorted(path for path in parent.glob("images-*") if not path.suffix)  # not .tmp, not .old
        for path in complete[:-keep]:
            if path != newest:
                shutil.rmtree(path)

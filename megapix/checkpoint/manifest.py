"""The manifest of a checkpoint, state.json: where the run stands, and the files that belong to it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megapix import config as configuration
from megapix.checkpoint.layout import FileRecord, Layout
from megapix.config import Config
from megapix.errors import InputError
from megapix.files import read_bytes, write_atomic

VERSION = 2
STATE_NAME = "state.json"


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
class Stage:
    """An earlier stage of training, whose weights the next one was initialized from."""

    source: str
    """Checkpoint folder or exported file, absolute."""
    sha256: str
    """Of its state.json, or of the file."""
    kind: str
    """'EMA' or 'raw weights'."""
    images_seen: int
    """In that stage."""


@dataclass(frozen=True)
class State:
    """The manifest, state.json."""

    counters: Counters
    config: Config
    data_digest: str
    classes: tuple[str, ...]
    layout: Layout
    adam_steps: int
    """Applied steps that AdamW has counted, for its bias correction."""
    previous: int = 0
    """Images seen at the checkpoint before this one."""
    loss: float | None = None
    """Mean loss of the steps since that one."""
    recent: tuple[tuple[float, float], ...] = ()
    """Loss and gradient norm of the last steps, for the spike sentinel."""
    spikes: int = 0
    """Spikes of the run."""
    rollbacks: int = 0
    """Rollbacks of the run."""
    standing_out: tuple[tuple[int, int, str], ...] = ()
    """The last steps, if they are outliers and may begin a spike: position, number, reason."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last applied one."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Each file beside state.json."""
    stages: tuple[Stage, ...] = ()
    """The stages before this run, oldest first."""
    cards: str = ""
    """The GPUs of the ranks that wrote it, in words; empty in checkpoints of releases before 0.3."""
    window: tuple[tuple[float, ...], ...] = ()
    """Each rank's sums of losses since the last row of scalars (`Report.window`)."""
    sets: tuple[str, ...] = ()
    """Digests of the sets of a mix, in order; empty, and not in the file, where the data are one set."""
    weights: tuple[tuple[int, tuple[int, ...], tuple[float | None, ...]], ...] = ()
    """As they changed: the position from which on they count, weights of the sets, epochs after which each leaves."""


def write_state(folder: Path, state: State) -> None:
    """Write state.json, whole or not at all, with a hash of itself."""
    data = {"version": VERSION, **asdict(state)}
    if not state.sets:
        del data["sets"], data["weights"]
    write_atomic(folder / STATE_NAME, (json.dumps({**data, "sha256": _digest(data)}, indent=1) + "\n").encode())


def read_state(folder: Path, minutes: float | None = None) -> State:
    """Read a checkpoint's state.json.

    Args:
        minutes: as long as that it is tried again, in place of the process's own patience.

    Raises:
        InputError: missing, not JSON, changed since it was written, of another version, or with unknown options.
        StorageError: it cannot be read now.
    """
    path = folder / STATE_NAME
    try:
        data = json.loads(read_bytes(path, minutes))
        if data["version"] != VERSION:
            raise InputError(f"{path}: version is {data['version']!r}, this release reads version {VERSION}")
        if (written := data.pop("sha256")) != (found := _digest(data)):
            raise InputError(f"{path} has sha256 {found[:16]}… but was written with {written[:16]}…: it is damaged")
        state = State(
            _counters(data["counters"]),
            configuration.from_dict(Config, data["config"], str(path)),
            data["data_digest"],
            tuple(data["classes"]),
            Layout({name: tuple(shape) for name, shape in data["layout"]["shapes"].items()}, data["layout"]["ranks"]),
            data["adam_steps"],
            data["previous"],
            data["loss"],
            tuple((loss, norm) for loss, norm in data["recent"]),
            data["spikes"],
            data["rollbacks"],
            tuple((position, step, seen) for position, step, seen in data["standing_out"]),
            data["skipped_in_a_row"],
            {name: FileRecord(**record) for name, record in data["files"].items()},
            tuple(Stage(**stage) for stage in data.get("stages", ())),
            data.get("cards", ""),
            tuple(tuple(map(float, sums)) for sums in data.get("window", ())),
            tuple(data.get("sets", ())),
            tuple((position, tuple(parts), tuple(repeats)) for position, parts, repeats in data.get("weights", ())),
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}") from error
    if sorted(state.files) != state.layout.files:
        raise InputError(f"{path} lists {len(state.files)} files, expected those of {state.layout.ranks} ranks")
    return state


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _counters(data: dict[str, Any]) -> Counters:
    counters = Counters(data["position"], data["images_seen"], tuple((a, b) for a, b in data["skipped"]))
    numbers = (counters.position, counters.images_seen, *(n for pair in counters.skipped for n in pair))
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or counters.drawn < counters.images_seen:
        raise ValueError(f"counters {data}: expected whole numbers, and no more images seen than samples drawn")
    return counters

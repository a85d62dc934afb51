"""Checkpoints of a run: what one holds, which one a run goes on from, and whether its files are what was written.

RUN/config.json                      the resolved configuration
RUN/checkpoints/latest               name of the checkpoint to go on from
RUN/checkpoints/images-000064000/
    rank-00000-of-00002.safetensors  rank 0's share of four flat fp32 vectors: weights, both Adam moments, EMA
    rank-00001-of-00002.safetensors
    state.json                       counters, configuration, layout; size and SHA-256 of every file, and of itself

The four vectors are the network's parameters laid end to end in their order, so any number of ranks reads any
checkpoint: each the range that is its share. This file knows names and manifests and imports no torch; `flat.py` moves
the numbers, `saver.py` commits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megapix import config as configuration
from megapix.config import Config
from megapix.dist import Agreed, World, agree, gather, together, warn
from megapix.errors import InputError
from megapix.shards import sha256_of, write_atomic

VERSION = 2
STATE_NAME = "state.json"
LATEST_NAME = "latest"
MODEL_NAME = "model.safetensors"
"""The exported weights in the folder of an imported model."""
OLD = ".old"
"""Suffix of a checkpoint while another of the same name takes its place."""
KEEP_NAME, HEALTHY_NAME = "KEEP", "HEALTHY"
"""Files that keep the checkpoint they lie in from removal: KEEP is a person's, HEALTHY the spike sentinel's."""
PARTS = ("weights", "exp_avg", "exp_avg_sq", "ema")
"""The flat fp32 vectors, each a tensor of every rank's file: fp32 masters, AdamW's moments, EMA."""


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint says of itself
# ---------------------------------------------------------------------------------------------------------------------


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
class Layout:
    """How a flat vector of all parameters is shared out: rank r holds [r·share, (r + 1)·share), the last ones less."""

    shapes: dict[str, tuple[int, ...]]
    """Parameter name -> shape, in the network's order."""
    ranks: int

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> its half-open range in the flat vector."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            found[name] = (start, start := start + math.prod(shape))
        return found

    @property
    def total(self) -> int:
        """Numbers in a flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def share(self) -> int:
        """Numbers of a full share: ZeRO-2 pads the vector to a multiple of two numbers a rank."""
        return 2 * -(-self.total // (2 * self.ranks))

    def range_of(self, rank: int) -> tuple[int, int]:
        """The range of one rank, without padding."""
        return min(rank * self.share, self.total), min((rank + 1) * self.share, self.total)

    def file_of(self, rank: int) -> str:
        """Name of a rank's file."""
        return f"rank-{rank:05d}-of-{self.ranks:05d}.safetensors"

    @property
    def files(self) -> list[str]:
        """Names of all ranks' files."""
        return [self.file_of(rank) for rank in range(self.ranks)]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file, noted as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Stage:
    """An earlier stage of training, whose weights the next one has started from."""

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
    """What a checkpoint says of itself: the manifest, state.json."""

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
    """Spikes that the run has met."""
    rollbacks: int = 0
    """Times that it has gone back to an earlier checkpoint."""
    standing_out: tuple[tuple[int, int, str], ...] = ()
    """The last steps, if they stood out and may be the beginning of a spike: position, number, what was seen."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last applied one."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Each file beside state.json."""
    stages: tuple[Stage, ...] = ()
    """The stages before this run, oldest first."""


def write_state(folder: Path, state: State) -> None:
    """Write state.json, whole or not at all, with a hash of itself."""
    data = {"version": VERSION, **asdict(state)}
    write_atomic(folder / STATE_NAME, (json.dumps({**data, "sha256": _digest(data)}, indent=1) + "\n").encode())


def read_state(folder: Path) -> State:
    """Read a checkpoint's state.json.

    Raises:
        InputError: missing, not JSON, changed since it was written, of another version, or with unknown options.
    """
    path = folder / STATE_NAME
    try:
        data = json.loads(path.read_text())
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


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint, and is it whole
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    folder: Path
    state: State


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run goes on from, and what was wrong with each one that was looked at before it."""

    saved: Saved | None = None
    refused: tuple[str, ...] = ()


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def name_of(counters: Counters) -> str:
    """Name of the checkpoint at these counters."""
    return f"images-{counters.images_seen:012d}"


def complete(run: Path) -> list[Path]:
    """The checkpoints that were committed, oldest first. A name with a suffix is none, but for NAME.old without a NAME:
    a process was killed while it put another in its place."""
    found = {p for p in checkpoints_of(run).glob("images-*") if (p / STATE_NAME).is_file()}
    return sorted(p for p in found if not p.suffix or (p.suffix == OLD and p.with_suffix("") not in found))


def point_to(folder: Path) -> None:
    """Make `latest` name a checkpoint."""
    write_atomic(folder.parent / LATEST_NAME, f"{folder.name}\n".encode())


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, be it there or not (or its NAME.old, as in `complete`); None without one."""
    pointer = checkpoints_of(run) / LATEST_NAME
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError:
        return None
    named = pointer.parent / (Path(name).name or "(nothing)")
    left = named.with_name(named.name + OLD)
    return left if left.is_dir() and not named.exists() else named


def choose(run: Path, resume: str, world: World, hashed: bool = True) -> Choice:
    """The checkpoint to go on from: the one that `latest` names, or if it is not whole the newest one that is.

    Collective: rank 0's list of names counts, the ranks share the work of hashing.

    Args:
        run: run folder.
        resume: 'auto' falls back and starts anew where there is no checkpoint; 'require' does neither.
        world: this rank's place.
        hashed: compare SHA-256 of every file, not its size alone.

    Raises:
        Agreed: no checkpoint is whole, or what 'require' forbids; with the reasons.
    """
    named, parent = latest(run), checkpoints_of(run)
    found = [*([named] if named else []), *(p for p in reversed(complete(run)) if p != named)]
    choice = first_whole(found, world, hashed)
    if choice.refused and resume == "require":
        agree(world, f"resume = 'require', but the newest checkpoint is not whole: {choice.refused[0]}")
    if choice.saved is None and choice.refused:
        reasons = "; ".join(choice.refused)
        agree(world, f"no checkpoint in {parent} is whole: {reasons}; give another --out to start anew")
    if choice.saved is None and resume == "require":
        agree(world, f"resume = 'require', but {parent} holds no checkpoint")
    return choice


def first_whole(folders: list[Path], world: World, hashed: bool = True) -> Choice:
    """The first whole one of rank 0's `folders`, and what is wrong with those before it. Collective."""
    refused: list[str] = []
    for folder in gather(world, folders)[0]:
        try:
            return Choice(together(world, partial(_whole, folder, world, hashed)), tuple(refused))
        except InputError as error:
            refused.append(str(error))
    return Choice(refused=tuple(refused))


def _whole(folder: Path, world: World, hashed: bool) -> Saved:
    if not (folder / STATE_NAME).is_file():
        raise InputError(f"{folder.parent / LATEST_NAME} names {folder.name!r}, but {folder / STATE_NAME} is missing")
    with reading(folder):
        state = read_state(folder)
        check_files(folder, state, world, hashed)
    return Saved(folder, state)


def check_files(folder: Path, state: State, world: World, hashed: bool = True) -> None:
    """Check this rank's share of a checkpoint's files: rank r takes every world.size-th from r on.

    Raises:
        InputError: naming the first file that is missing, cut or of another hash, with both values.
    """
    for name in sorted(state.files)[world.rank :: world.size]:
        path, record = folder / name, state.files[name]
        if not path.is_file():
            raise InputError(f"{path} is missing")
        if path.stat().st_size != record.size:
            raise InputError(f"{path} has {path.stat().st_size} bytes, but {record.size} were saved")
        if hashed:
            try:
                found = sha256_of(path)
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            if found != record.sha256:
                raise InputError(f"{path} has sha256 {found[:16]}…, but {record.sha256[:16]}… was saved: it is damaged")


def find(path: Path, world: World, hashed: bool = True) -> Saved:
    """A run's checkpoint to read from (`choose`; a warning says what it refused), or `path` itself if it is one.
    Collective.

    Raises:
        InputError: neither of the two is there, or it is not whole.
    """
    if (path / STATE_NAME).is_file():
        return together(world, partial(_whole, path, world, hashed))
    choice = choose(path, "auto", world, hashed)
    if choice.saved is None:
        raise Agreed(f"{str(path)!r} holds no weights: {EXPECTED}")
    for reason in choice.refused if world.main else ():
        warn(f"{reason}; reading {choice.saved.folder}")
    return choice.saved


EXPECTED = (
    "expected a run, a checkpoint (images-…, with state.json), a file made by 'megapix export', or a folder made by "
    "'megapix import'"
)


def exported_file(path: Path) -> Path | None:
    """The exported weights at `path`: the file itself, or the one in a folder of an imported model; None without."""
    return next((file for file in (path, path / MODEL_NAME) if file.is_file()), None)


# ---------------------------------------------------------------------------------------------------------------------
# What is never removed
# ---------------------------------------------------------------------------------------------------------------------


def protect(run: Path, folder: Path) -> None:
    """Mark a checkpoint as the last healthy one, which stays; the mark moves there from any other.

    Raises:
        OSError: the file system refuses.
    """
    write_atomic(folder / HEALTHY_NAME, b"The last checkpoint before a spike; it stays while this file is here.\n")
    for other in complete(run):
        if other != folder:
            (other / HEALTHY_NAME).unlink(missing_ok=True)


def protected(folder: Path) -> bool:
    """Whether a mark keeps this checkpoint."""
    return any((folder / name).exists() for name in (KEEP_NAME, HEALTHY_NAME))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Hold a checkpoint while it is read: a run's retention leaves it alone (`unread`).

    Raises:
        InputError: it is not there any more, or cannot be read.
    """
    with ExitStack() as stack:
        for path in _locked_file(folder):
            try:
                file = stack.enter_context(open(path, "rb"))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            _lock(file.fileno(), fcntl.LOCK_SH)
        yield


def unread(folder: Path) -> bool:
    """Whether nobody holds this checkpoint with `reading`; false too if that cannot be found out."""
    for path in _locked_file(folder):
        try:
            with open(path, "r+b") as file:  # over NFS only a file that is open for writing can be locked exclusively
                return _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _locked_file(folder: Path) -> list[Path]:
    """The file whose lock stands for the checkpoint: the first rank's, never written again; empty if that is lost."""
    return sorted(folder.glob("rank-*.safetensors"))[:1]


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        # Some network file systems know no locks; there the newest `keep` checkpoints are all the protection there is.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

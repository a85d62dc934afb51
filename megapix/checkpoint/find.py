"""Which checkpoint a run resumes from or a command reads, and whether its files are what was written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megapix.checkpoint.folder import LATEST_NAME, checkpoints_of, committing, complete, latest, reading
from megapix.checkpoint.manifest import STATE_NAME, State, read_state
from megapix.dist import CollectiveInputError, World, agree, gather, on_all_ranks, warn
from megapix.errors import InputError
from megapix.files import sha256_of, size_of


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole."""

    folder: Path
    state: State


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run resumes from, and what is wrong with each one that was tried before it."""

    saved: Saved | None = None
    refused: tuple[str, ...] = ()


def choose(run: Path, resume: str, world: World, hashed: bool = True) -> Choice:
    """The checkpoint to resume from: the one that `latest` names, or if it is not whole the newest one that is.

    Collective: rank 0's list of names counts, and the ranks share the hashing.

    Args:
        run: run folder.
        resume: 'auto' falls back to older ones, and starts from scratch without any; 'require' does neither.
        world: this rank's place.
        hashed: compare SHA-256 of every file, not only its size.

    Raises:
        CollectiveInputError: no checkpoint is whole, or what 'require' forbids; with the reasons.
        CollectiveStorageError: one cannot be read now: no older one takes its place.
    """
    parent = checkpoints_of(run)
    choice = first_whole(on_all_ranks(world, lambda: _in_order(run) if world.main else []), world, hashed)
    if choice.refused and resume == "require":
        agree(world, f"resume = 'require', but the newest checkpoint is not whole: {choice.refused[0]}")
    if choice.saved is None and choice.refused:
        reasons = "; ".join(choice.refused)
        agree(world, f"no checkpoint in {parent} is whole: {reasons}; give another --out to start from scratch")
    if choice.saved is None and resume == "require":
        agree(world, f"resume = 'require', but {parent} holds no checkpoint")
    return choice


def _in_order(run: Path) -> list[Path]:
    """The checkpoint that `latest` names, or was about to, and the others from the newest on."""
    named = committing(run) or latest(run)
    return [*([named] if named else []), *(p for p in reversed(complete(run)) if p != named)]


def first_whole(folders: list[Path], world: World, hashed: bool = True) -> Choice:
    """The first whole one of rank 0's `folders`, and what is wrong with those before it. Collective."""
    refused: list[str] = []
    for folder in gather(world, folders)[0]:
        try:
            return Choice(on_all_ranks(world, partial(_whole, folder, world, hashed)), tuple(refused))
        except InputError as error:
            refused.append(str(error))
    return Choice(refused=tuple(refused))


def _whole(folder: Path, world: World, hashed: bool) -> Saved:
    if size_of(folder / STATE_NAME) is None:
        raise InputError(f"{folder.parent / LATEST_NAME} names {folder.name!r}, but {folder / STATE_NAME} is missing")
    with reading(folder):
        state = read_state(folder)
        check_files(folder, state, world, hashed)
    return Saved(folder, state)


def check_files(folder: Path, state: State, world: World, hashed: bool = True) -> None:
    """Check this rank's share of a checkpoint's files: every world.size-th file, from number `rank` on.

    Raises:
        InputError: naming the first file that is missing, truncated or of another hash, with both values.
        StorageError: one cannot be read now, which is no reason to refuse the checkpoint.
    """
    for name in sorted(state.files)[world.rank :: world.size]:
        path, record = folder / name, state.files[name]
        if (size := size_of(path)) is None:
            raise InputError(f"{path} is missing")
        if size != record.size:
            raise InputError(f"{path} has {size} bytes, but {record.size} were saved")
        if hashed:
            try:
                sha256 = sha256_of(path)
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            if sha256 != record.sha256:
                raise InputError(
                    f"{path} has sha256 {sha256[:16]}…, but {record.sha256[:16]}… was saved: it is damaged"
                )


def find(path: Path, world: World, hashed: bool = True) -> Saved:
    """A run's checkpoint to read from (`choose`; a warning says what it refused), or `path` itself if it is one.
    Collective.

    Raises:
        InputError: neither of the two is there, or it is not whole. StorageError: it cannot be read now.
    """
    if on_all_ranks(world, lambda: size_of(path / STATE_NAME)) is not None:
        return on_all_ranks(world, partial(_whole, path, world, hashed))
    choice = choose(path, "auto", world, hashed)
    if choice.saved is None:
        raise CollectiveInputError(f"{str(path)!r} holds no weights: {EXPECTED}")
    for reason in choice.refused if world.main else ():
        warn(f"{reason}; reading {choice.saved.folder}")
    return choice.saved


EXPECTED = (
    "expected a run, a checkpoint (images-…, with state.json), a file made by 'megapix export', or a folder made by "
    "'megapix import'"
)

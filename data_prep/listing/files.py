"""The files below a folder, as every source lists them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from data_prep.listing.base import Entries, is_image

T = TypeVar("T")
_walks: dict[Path, tuple[list[str], Entries]] | None = None
"""What the walks of a folder have found, while they are remembered."""
_parsed: dict[Path, Any] | None = None
"""What was read from files, for as long."""


@contextmanager
def each_walked_once() -> Iterator[None]:
    """Within it `files_below` walks a folder once, and `parsed_once` reads a file once, however many kinds of sources
    look whether it is theirs."""
    global _walks, _parsed
    _walks, _parsed = {}, {}
    try:
        yield
    finally:
        _walks = _parsed = None


def parsed_once(path: Path, parse: Callable[[Path], T]) -> T:
    """What `parse` makes of a file; its errors."""
    if _parsed is None:
        return parse(path)
    if path not in _parsed:
        _parsed[path] = parse(path)
    found: T = _parsed[path]
    return found


def files_below(folder: Path, entries: Entries) -> list[str]:
    """Names of the files below `folder` in order, relative to it with '/'. Symbolic links are followed.

    Hidden files and folders, macOS's __MACOSX, links that lead nowhere or to a folder that they lie in, and what is
    neither file nor folder are counted in `entries` as passed over, a folder as one. A link that leads nowhere but is
    called an image is listed: it cannot be read, and is rejected.

    Raises:
        OSError: a folder cannot be read.
    """
    walks = {} if _walks is None else _walks
    if folder not in walks:
        counted = Entries()
        walks[folder] = sorted(_below(folder, "", (), counted)), counted
    names, counted = walks[folder]
    entries.add(counted)
    return list(names)


def files_in(folder: Path, entries: Entries) -> list[str]:
    """As `files_below`, but of the folder itself alone: a folder in it counts as one entry that is passed over."""
    return sorted(_below(folder, "", (), entries, deep=False))


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in `folder` that `files_below` would enter, in order.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name))


def _below(folder: Path, prefix: str, above: tuple[str, ...], entries: Entries, deep: bool = True) -> Iterator[str]:
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as found:
        for entry in found:
            if _hidden(entry.name):
                entries.pass_over("hidden")
            elif entry.is_file():
                yield prefix + entry.name
            elif not entry.is_dir():
                if entry.is_symlink() and is_image(entry.name):
                    yield prefix + entry.name  # a sample that cannot be read
                else:
                    entries.pass_over("broken link" if entry.is_symlink() else "no file")
            elif not deep:
                entries.pass_over("folder")
            elif entry.is_symlink() and os.path.realpath(entry.path) in above:
                entries.pass_over("link to a folder above it")
            else:
                yield from _below(Path(entry.path), f"{prefix}{entry.name}/", above, entries)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"

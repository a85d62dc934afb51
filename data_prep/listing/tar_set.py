"""Which tar files `index` reads: a folder or URL that lists them, one file, or braces."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from data_prep.listing.archives import is_packed
from data_prep.listing.base import Entries, is_hidden
from data_prep.listing.files import files_in
from data_prep.listing.img2dataset import count_others
from data_prep.listing.reading import Reading
from data_prep.listing.splits import of_split
from megapix.errors import InputError
from megapix.shards.index import INDEX_NAME, Index, read_index
from megapix.shards.mix.alike import UNCLASSED
from megapix.shards.storage import Access, is_url, open_storage, protocol_of, shown

_PACKED = "{!r} is compressed, so its samples cannot be read by offset; unpack it, or give data_prep write"
HARMLESS = ("download", "dl", "raw", "alt", "versionid", "generation")
"""Keys of a query that an index may hold; any other may be a secret."""
MERGE = "data_prep merge PART… --out INDEX"


def without_secrets(pattern: str) -> tuple[str, str]:
    """The pattern without the query of signed URLs, and that query, which no index may hold; empty if there is none.

    Raises:
        InputError: each tar file has a query of its own.
    """
    from braceexpand import braceexpand

    if not is_url(pattern) or "?" not in pattern:
        return pattern, ""
    queries = {path.partition("?")[2] for path in braceexpand(pattern)}
    if all(part.partition("=")[0].lower() in HARMLESS for query in queries for part in query.split("&")):
        return pattern, ""
    if len(queries) > 1:
        raise InputError(f"{shown(pattern)!r}: each tar file has a signature of its own; expected one query for all")
    (query,) = queries
    return pattern.replace(f"?{query}", ""), query


def _path(name: str) -> str:
    """A path, or a URL without its query."""
    return name.partition("?")[0] if is_url(name) else name


def tar_files(pattern: str, access: Access, entries: Entries) -> tuple[str, list[str]]:
    """(folder or URL, names below it in order) of the tar files that `pattern` names; symbolic links stay as given.

    Args:
        pattern: a folder or URL that lists its files, one tar file, or WebDataset's braces,
            'https://host/train-{0000..1023}.tar'.
        entries: counts what else lies in the folder.

    Raises:
        InputError: a protocol that is not read, nothing there, or no tar file.
    """
    from braceexpand import braceexpand

    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r}: the braces are not closed") from error
    if is_url(pattern):
        protocol_of(pattern)
    if packed := [path for path in paths if is_packed(_path(path))]:
        raise InputError(_PACKED.format(shown(packed[0])))
    if len(paths) == 1 and not _path(pattern).endswith(".tar"):
        return _in_folder(pattern, access, entries)
    if not is_url(pattern):
        paths = [os.path.abspath(path) for path in paths]
    base = paths[0].rpartition("/")[0]
    while not all(path.startswith(f"{base}/") for path in paths):
        base = base.rpartition("/")[0]
    if is_url(pattern) and base.count("/") < 2:
        raise InputError(f"{pattern!r}: the tar files lie on several hosts; expected one")
    names = [path[len(base) + 1 :] for path in paths]
    base = base or "/"
    if len({_path(f"{base}/{name}") for name in names}) < len(names):
        raise InputError(f"{pattern!r} names a tar file twice")
    return base, names


def _in_folder(pattern: str, access: Access, entries: Entries) -> tuple[str, list[str]]:
    if is_url(pattern):
        if "?" in pattern:
            raise InputError(f"{pattern!r}: expected the URL of a tar file, or of a folder without a query")
        base = pattern.rstrip("/")
        listed = open_storage(base, access).names()
    else:
        base = os.path.abspath(pattern)
        if not os.path.isdir(base):
            raise InputError(f"{pattern!r} is not a folder or a tar file")
        listed = files_in(Path(base), entries)
    listed = [name for name in listed if not is_hidden(name)]  # of a server; a folder's are left out already
    if packed := [name for name in listed if is_packed(name)]:
        raise InputError(_PACKED.format(f"{base}/{packed[0]}"))
    names = [name for name in listed if name.endswith(".tar")]
    if not is_url(pattern):  # a server's listing may hold anything
        count_others(listed, names, entries)
    if not names:
        raise InputError(
            f"{pattern!r} holds no tar file, which index reads; images, parquet and zip files are for: "
            f"data_prep write {shlex.quote(pattern)} OUT --size N"
        )
    return base, names


def tars_of_split(
    pattern: str, access: Access, reading: Reading, entries: Entries
) -> tuple[str, list[str], dict[str, str]]:
    """As `tar_files`, but those of the split to take alone; and what plan and index record of it.

    Raises:
        InputError: as `tar_files` and `of_split`.
    """
    place, names = tar_files(pattern, access, entries)
    if not reading.split and "{" in pattern:  # whoever writes braces names the files
        return place, names, {}
    return place, *of_split(names, reading.split, entries, repr(pattern))


def recorded_base(tars: str, out: Path, before: str = "") -> str:
    """How the index in `out` says where its tar files lie: relative to itself where both have one folder in common that
    can be moved, else as given.

    Args:
        tars: absolute path or URL.
        before: what an earlier command recorded; it stays if it is the same place.
    """
    if is_url(tars) or before in (tars, os.path.realpath(tars)):
        return before or tars
    here = os.path.abspath(out)
    above = os.path.dirname(here)
    together = (above != "/" and _below(tars, above)) or (tars != "/" and _below(here, tars))
    return os.path.relpath(tars, here) if together else tars


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def class_names_of(base: str, names: list[str]) -> tuple[str, ...]:
    """Class names in our index beside the tar files; none if there is no such index, or a stranger's.

    Raises:
        InputError: the tar files come from several folders that `data_prep` has prepared, whose class numbers mean
            different classes.
    """
    if is_url(base):
        return ()
    found: dict[str, tuple[str, ...]] = {}
    for folder in dict.fromkeys(os.path.dirname(name) for name in names):
        place = os.path.join(base, folder) if folder else base
        index = _ours(place)
        found[place] = index.class_names if index else ()
    if len(set(found.values())) > 1 and any(_named(those) for those in found.values()):
        (first, its), (second, theirs) = _two_different(found)
        raise InputError(
            f"the tar files of {first!r} and {second!r} number their classes each in their own way "
            f"({_shown(its)} and {_shown(theirs)}); join them by the names of their classes: {MERGE}"
        )
    return next(iter(found.values()))


def _ours(folder: str) -> Index | None:
    if not os.path.isfile(os.path.join(folder, INDEX_NAME)):
        return None
    try:
        return read_index(folder)
    except InputError:
        return None


def _named(classes: tuple[str, ...]) -> bool:
    return classes != (UNCLASSED,) and classes != tuple(str(number) for number in range(len(classes)))


def _two_different(found: dict[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    first = next(iter(found.items()))
    return [first, next(other for other in found.items() if other[1] != first[1])]


def _shown(classes: tuple[str, ...]) -> str:
    names = ", ".join(classes[:3]) or "without an index"
    return f"{names}, …" if len(classes) > 3 else names

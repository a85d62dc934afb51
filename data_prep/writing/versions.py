"""Older versions of an index whose set has grown: OUT/versions/DIGEST, from which the runs that began with them resume.

OUT itself holds the newest. A version is a whole index folder; it shares its files with OUT by hard links until OUT has
newer ones, so it takes no room of its own. Nothing removes one but its owner.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from data_prep.writing.account import ACCOUNT_NAME
from data_prep.writing.finish import REJECTED_NAME
from megapix.files import sync_folder
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, TABLE_NAME, Index, read_index, version_name, write_index
from megapix.shards.storage import is_url
from megapix.shards.tables.entries import SHARDS_NAME
from megapix.shards.text_features import FILES

FILES_KEPT = (SHARDS_NAME, TABLE_NAME, CAPTIONS_NAME, REJECTED_NAME, ACCOUNT_NAME, FILES)


def keep(out: Path, index: Index) -> Path:
    """Keep the index of the folder `out`, with what lies beside it, as a version; return the version's folder.

    Raises:
        OSError: it cannot be written.
    """
    kept = out / version_name(index.digest)
    if (kept / INDEX_NAME).is_file() and index.text is None:
        return kept
    kept.parent.mkdir(exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for pattern in FILES_KEPT:
        for path in out.glob(pattern):
            _link(path, temporary / path.name)
    base = index.base
    if base and not is_url(base) and not base.startswith("/"):  # a version lies two folders deeper
        base = os.path.join("..", "..", base)
    write_index(temporary, replace(index, base=base))
    shutil.rmtree(kept, ignore_errors=True)
    os.rename(temporary, kept)
    sync_folder(kept.parent)
    return kept


def replaced(there: Mapping[Path, Index], make: Callable[[], object]) -> None:
    """Have `make` write newer indexes, and keep those of before as versions where they differ.

    Features of captions stay with the version that they are of.

    Args:
        there: folder -> the index that it has.

    Raises:
        OSError: one cannot be written.
    """
    known = {folder for folder, before in there.items() if (folder / version_name(before.digest)).exists()}
    kept = {folder: keep(folder, before) for folder, before in there.items()}
    make()
    for folder, before in there.items():
        made = read_index(folder)
        if made.digest != before.digest:
            for path in folder.glob(FILES):
                path.unlink()
            continue
        if before.text is not None:  # tar files were touched, or copied, but hold what they held
            write_index(folder, replace(made, text=before.text))
        if folder not in known:
            shutil.rmtree(kept[folder])


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, to)

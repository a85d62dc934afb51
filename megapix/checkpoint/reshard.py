"""A checkpoint rewritten for another number of ranks, a chunk at a time and equal bit for bit.

Resuming needs no such step, since any number of ranks reads any checkpoint; this is for moving one with fewer or
smaller files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from megapix import config
from megapix.checkpoint import vectors
from megapix.checkpoint.find import Saved, check_files
from megapix.checkpoint.folder import checkpoints_of, complete, latest, point_to, reading
from megapix.checkpoint.layout import PARTS, FileRecord, Layout
from megapix.checkpoint.manifest import write_state
from megapix.dist import World
from megapix.errors import InputError
from megapix.files import sync_folder, write_atomic


def reshard(saved: Saved, ranks: int, out: Path) -> Path:
    """Write a run folder `out` with one checkpoint, `saved` for `ranks` ranks. Returns its folder.

    Raises:
        InputError: `out` has a checkpoint already, cannot be written, or a file of the source cannot be read.
    """
    source, state = saved.folder, replace(saved.state, config=replace(saved.state.config, out=str(out)))
    if latest(out) or complete(out):
        raise InputError(f"--out {str(out)!r} has checkpoints already; expected a new run folder")
    layout = Layout(state.layout.shapes, ranks)
    final = checkpoints_of(out) / source.name
    temporary = final.with_name(f"{final.name}.tmp")
    files: dict[str, FileRecord] = {}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with reading(source):
            for rank in range(ranks):
                start, stop = layout.range_of(rank)
                pieces = {
                    part: (
                        (stop - start,),
                        (piece for _, piece in vectors.read(source, state.layout, part, start, stop)),
                    )
                    for part in PARTS
                }
                files[layout.file_of(rank)] = vectors.write(temporary / layout.file_of(rank), pieces)
        written = replace(state, layout=layout, files=files)
        write_state(temporary, written)
        sync_folder(temporary)
        temporary.rename(final)
        check_files(final, written, World())
        point_to(final)
        write_atomic(out / "config.json", (json.dumps(config.to_dict(state.config), indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{error.filename or temporary}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final

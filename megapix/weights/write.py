"""Weights into files: a run's or checkpoint's as one exported file, or an imported folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megapix import config, files
from megapix.checkpoint import vectors
from megapix.checkpoint.find import find
from megapix.checkpoint.folder import reading
from megapix.dist import World
from megapix.errors import InputError
from megapix.files import appearing, write_atomic
from megapix.weights.about import MODEL_NAME, About, Weights, about_saved, exported_file, metadata_of, own, part_of


def export(path: Path, out: Path, ema: bool = True) -> About:
    """Write the EMA or raw weights of a run or checkpoint as one safetensors file, a chunk of a tensor at a time.

    Raises:
        InputError: neither of the two is at `path`, it is damaged, or `out` cannot be written.
    """
    if file := exported_file(path):
        raise InputError(f"{file} is an exported model already; expected a run or a checkpoint")
    saved = find(path, World())
    folder, layout, about = saved.folder, saved.state.layout, about_saved(saved, ema)
    with appearing(out) as temporary, reading(folder):
        tensors = {
            name: (layout.shapes[name], (piece for _, piece in vectors.read(folder, layout, part_of(ema), *span)))
            for name, span in own(layout.spans).items()
        }
        vectors.write(temporary, tensors, metadata_of(about))
    return about


def write_model(out: Path, weights: Weights) -> None:
    """Write the folder of an imported model, each tensor in its dtype.

    Raises:
        InputError: `out` is there and not empty, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error
    if taken:
        raise InputError(f"--out {str(out)!r} exists already; expected a new or empty folder")
    about = config.to_dict(weights.about)
    run = {
        "model": about["model"],
        "data": {"image_size": about["image_size"]},
        "sampling": about["sampling"],
        "text": about["text"],
        "flow": {"generator": about["generator"]},
    }
    with appearing(out) as temporary:
        temporary.mkdir(parents=True)
        tensors = {name: (tuple(t.shape), vectors.chunks(t.flatten())) for name, t in weights.tensors.items()}
        dtypes = {name: t.dtype for name, t in weights.tensors.items()}
        vectors.write(temporary / MODEL_NAME, tensors, metadata_of(weights.about), dtypes)
        write_atomic(temporary / "config.json", (json.dumps(run, indent=1) + "\n").encode())
        files.sync_folder(temporary)

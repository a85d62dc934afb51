"""Where `megapix sample` puts its images.

    grid      one PNG with one row per class or prompt, and with --singles each image as its own PNG
    geneval   OUT/00000/metadata.jsonl, OUT/00000/samples/00000.png, …: what GenEval's evaluate_images.py reads
    dpg       OUT/NAME.png per prompt file NAME.txt, four images in two rows: what DPG-Bench's
              compute_dpg_bench.py reads

Every PNG has metadata in its text chunk "megapix" (JSON): weights, class or prompt, seed, options. A row of geneval or
dpg whose files have the metadata of this command is not sampled again, so an interrupted command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megapix.diffusion.pictures import METADATA, grid, write_png
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.sample.rows import Row


class GridFiles:
    """One picture of all rows, and if `singles` is given one file per image."""

    def __init__(self, out: Path, singles: Path | None, rows: Sequence[Row], zoom: int) -> None:
        self._out, self._singles, self._rows, self._zoom = out, singles, rows, zoom
        self._images: list[np.ndarray] = []
        self._about: list[dict[str, Any]] = []

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Never: the picture is always made again."""
        return False

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Keep the row for the grid, and write its images to `singles`."""
        for column, (image, one) in enumerate(zip(images, about, strict=True)):
            if self._singles:
                name = f"{self._rows[row].stem}-{row * len(images) + column:06d}.png"
                write_png(self._singles / name, image, about=one)
        self._images.append(images)
        self._about.append({key: value for key, value in about[0].items() if key not in ("seed", "number")})

    def close(self) -> None:
        """Write the grid."""
        columns = len(self._images[0])
        write_png(self._out, grid(np.concatenate(self._images), columns), self._zoom, {"rows": self._about})


class GenEvalFiles:
    """One folder per prompt."""

    def __init__(self, out: Path, rows: Sequence[Row]) -> None:
        self._out, self._rows = out, rows

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether all its images are there."""
        return all(metadata_of(self._path(row, column)) == one for column, one in enumerate(about))

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Write the line of the prompt, and its images."""
        for column, (image, one) in enumerate(zip(images, about, strict=True)):
            write_png(self._path(row, column), image, about=one)
        _write(self._out / self._rows[row].stem / "metadata.jsonl", self._rows[row].line.encode() + b"\n")

    def close(self) -> None:
        """All is written."""

    def _path(self, row: int, column: int) -> Path:
        return self._out / self._rows[row].stem / "samples" / f"{column:05d}.png"


class DpgFiles:
    """One picture of four images per prompt."""

    def __init__(self, out: Path, rows: Sequence[Row]) -> None:
        self._out, self._rows = out, rows

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether its picture is there."""
        return metadata_of(self._path(row)) == {"images": list(about)}

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Write the picture: the evaluator cuts it in four, so nothing lies between them."""
        upper, lower = (np.concatenate([images[i], images[i + 1]], axis=1) for i in (0, 2))
        write_png(self._path(row), np.concatenate([upper, lower]), about={"images": list(about)})

    def close(self) -> None:
        """All is written."""

    def _path(self, row: int) -> Path:
        return self._out / f"{self._rows[row].stem}.png"


def metadata_of(path: Path) -> dict[str, Any] | None:
    """Metadata of a PNG; None if it is not there or has none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            metadata: dict[str, Any] = json.loads(image.text[METADATA])  # type: ignore[attr-defined]
            return metadata
    except (OSError, KeyError, ValueError):
        return None


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error

"""`megapix sample`: rows of pictures of classes or prompts, and the files they go to.

    grid      one PNG with a row for each class or prompt, and if asked for each image as its own PNG
    geneval   OUT/00000/metadata.jsonl, OUT/00000/samples/00000.png, …: what GenEval's evaluate_images.py reads
    dpg       OUT/NAME.png for each prompt file NAME.txt, four images in two rows: what DPG-Bench's
              compute_dpg_bench.py reads

Every PNG says in its text chunk "megapix" (JSON) what it was drawn from. A row of geneval or dpg whose files say what
this command would draw is not drawn again, so an interrupted command goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from megapix.condition import Condition
from megapix.config import SamplingConfig
from megapix.errors import InputError
from megapix.sample import METADATA, draw, grid, not_finite, seeded_noise, to_uint8, write_png
from megapix.shards import write_atomic
from megapix.weights import Weights, network

Layout = Literal["grid", "geneval", "dpg"]
DPG_IMAGES = 4


@dataclass(frozen=True)
class Row:
    """A class or a prompt."""

    name: str
    """The class's name, or the prompt."""
    stem: str
    """How its files are named."""
    line: str = ""
    """GenEval's line about the prompt."""


@dataclass(frozen=True)
class Asked:
    """What is to be drawn."""

    rows: Sequence[Row]
    columns: int
    """Images of each row."""
    seed: int
    seeds: tuple[int, ...]
    """A seed for each column, in place of `seed`."""
    size: tuple[int, int]
    """Height and width in pixels."""
    batch: int
    sampling: SamplingConfig
    negative: str = ""
    """What guidance leads away from, in place of the empty caption."""

    def noise_of(self, row: int, column: int) -> tuple[int, int]:
        """(seed, number) of an image's noise."""
        return (self.seeds[column], 0) if self.seeds else (self.seed, row * self.columns + column)


class Files(Protocol):
    """Where the images go."""

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether a row lies there already, drawn as `about` says."""

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Write a row: uint8 [columns, H, W, 3]."""

    def close(self) -> None:
        """Write what is written at the end."""


def draw_all(
    weights: Weights,
    asked: Asked,
    condition_of: Callable[[Sequence[int]], Condition],
    files: Files,
    device: torch.device,
    progress: bool = True,
) -> int:
    """Draw every row that is not there, and write it; returns how many rows were drawn.

    Args:
        condition_of: what rows are about, given their numbers.

    Raises:
        InputError: a size that the patch size does not divide, images that are not finite, or a file that cannot be
            written.
    """
    patch, (height, width) = weights.about.model.patch_size, asked.size
    if min(asked.size) < patch or height % patch or width % patch:
        raise InputError(f"size {height}x{width}: expected multiples of the patch size {patch}")
    about = [
        [described(weights, asked, row, column) for column in range(asked.columns)] for row in range(len(asked.rows))
    ]
    todo = [row for row in range(len(asked.rows)) if not files.has(row, about[row])]
    images = [(row, column) for row in todo for column in range(asked.columns)]
    net, waiting = network(weights, device), dict[int, list[np.ndarray]]()
    with tqdm(total=len(images), unit="img", disable=not progress or len(images) <= asked.batch) as bar:
        for start in range(0, len(images), asked.batch):
            some = images[start : start + asked.batch]
            for (row, _), pixels in zip(some, _drawn(net, weights, asked, condition_of, some, device), strict=True):
                waiting.setdefault(row, []).append(pixels)
                if len(waiting[row]) == asked.columns:
                    files.write(row, np.stack(waiting.pop(row)), about[row])
            bar.update(len(some))
    files.close()
    return len(todo)


def _drawn(
    net: Any,
    weights: Weights,
    asked: Asked,
    condition_of: Callable[[Sequence[int]], Condition],
    images: list[tuple[int, int]],
    device: torch.device,
) -> Iterator[np.ndarray]:
    noise = [seeded_noise(seed, [number], asked.size, device) for seed, number in (asked.noise_of(*i) for i in images)]
    drawn = draw(net, torch.cat(noise), condition_of([row for row, _ in images]), asked.sampling)
    if not drawn.isfinite().all():
        raise InputError(not_finite(weights.about.source))
    yield from to_uint8(drawn)


def described(weights: Weights, asked: Asked, row: int, column: int) -> dict[str, Any]:
    """What an image is drawn from: equal descriptions on one device make equal images, but for the batch's rounding."""
    a, (seed, number) = weights.about, asked.noise_of(row, column)
    return {
        "weights": a.source,
        "kind": a.kind,
        "images_seen": a.images_seen,
        ("prompt" if a.model.text_width else "class"): asked.rows[row].name,
        **({"negative_prompt": asked.negative, "text_encoder": a.text.digest} if a.model.text_width else {}),
        "seed": seed,
        "number": number,
        "size": list(asked.size),
        **asdict(asked.sampling),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class GridFiles:
    """One picture of all rows, and if `singles` is given each image for itself."""

    def __init__(self, out: Path, singles: Path | None, rows: Sequence[Row], zoom: int) -> None:
        self._out, self._singles, self._rows, self._zoom = out, singles, rows, zoom
        self._images: list[np.ndarray] = []
        self._about: list[dict[str, Any]] = []

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Never: the picture is made anew."""
        return False

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Keep the row for the grid, and write its images if they are wanted."""
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
    """A folder for each prompt."""

    def __init__(self, out: Path, rows: Sequence[Row]) -> None:
        self._out, self._rows = out, rows

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether all its images are there."""
        return all(said_of(self._path(row, column)) == one for column, one in enumerate(about))

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
    """A picture of four images for each prompt."""

    def __init__(self, out: Path, rows: Sequence[Row]) -> None:
        self._out, self._rows = out, rows

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether its picture is there."""
        return said_of(self._path(row)) == {"images": list(about)}

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Write the picture: the evaluator cuts it in four, so nothing lies between them."""
        upper, lower = (np.concatenate([images[i], images[i + 1]], axis=1) for i in (0, 2))
        write_png(self._path(row), np.concatenate([upper, lower]), about={"images": list(about)})

    def close(self) -> None:
        """All is written."""

    def _path(self, row: int) -> Path:
        return self._out / f"{self._rows[row].stem}.png"


def said_of(path: Path) -> dict[str, Any] | None:
    """What a PNG says that it was drawn from; None if it is not there or says nothing."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found: dict[str, Any] = json.loads(image.text[METADATA])  # type: ignore[attr-defined]
            return found
    except (OSError, KeyError, ValueError):
        return None


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error

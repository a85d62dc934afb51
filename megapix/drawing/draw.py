"""Rows of pictures of classes or prompts, drawn in batches and handed to the files they go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from megapix.condition import Condition
from megapix.config import SamplingConfig
from megapix.errors import InputError
from megapix.sample import draw, not_finite, seeded_noise, to_uint8
from megapix.weights import Weights, network


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

"""Rows of images of classes or prompts, sampled in batches and handed to the files that they go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from megapix.config import SamplingConfig
from megapix.diffusion.condition import Condition
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate_as, not_finite, seeded_noise
from megapix.errors import InputError
from megapix.weights.about import Weights
from megapix.weights.read import network


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
class Request:
    """What to sample."""

    rows: Sequence[Row]
    columns: int
    """Images per row."""
    seed: int
    seeds: tuple[int, ...]
    """One seed per column, in place of `seed`."""
    size: tuple[int, int]
    """Height and width in pixels."""
    batch: int
    sampling: SamplingConfig
    negative: str = ""
    """The negative prompt; empty is the empty caption."""

    def noise_of(self, row: int, column: int) -> tuple[int, int]:
        """(seed, number) of an image's noise."""
        return (self.seeds[column], 0) if self.seeds else (self.seed, row * self.columns + column)


class Files(Protocol):
    """Where the images go."""

    def has(self, row: int, about: Sequence[dict[str, Any]]) -> bool:
        """Whether a row is there already, with `about` as its images' metadata."""

    def write(self, row: int, images: np.ndarray, about: Sequence[dict[str, Any]]) -> None:
        """Write a row: uint8 [columns, H, W, 3]."""

    def close(self) -> None:
        """Write what comes at the end."""


def generate_rows(
    weights: Weights,
    request: Request,
    condition_of: Callable[[Sequence[int]], Condition],
    files: Files,
    device: torch.device,
    progress: bool = True,
) -> int:
    """Sample and write every row that is not there; returns how many rows were sampled.

    Args:
        condition_of: row numbers -> their condition.

    Raises:
        InputError: a size that the patch size does not divide, images that are not finite, or a file that cannot be
            written.
    """
    patch, (height, width) = weights.about.model.patch_size, request.size
    if min(request.size) < patch or height % patch or width % patch:
        raise InputError(f"size {height}x{width}: expected multiples of the patch size {patch}")
    about = [
        [metadata(weights, request, row, column) for column in range(request.columns)]
        for row in range(len(request.rows))
    ]
    todo = [row for row in range(len(request.rows)) if not files.has(row, about[row])]
    images = [(row, column) for row in todo for column in range(request.columns)]
    net, waiting = network(weights, device), dict[int, list[np.ndarray]]()
    with tqdm(total=len(images), unit="img", disable=not progress or len(images) <= request.batch) as bar:
        for start in range(0, len(images), request.batch):
            some = images[start : start + request.batch]
            for (row, _), pixels in zip(some, _sampled(net, weights, request, condition_of, some, device), strict=True):
                waiting.setdefault(row, []).append(pixels)
                if len(waiting[row]) == request.columns:
                    files.write(row, np.stack(waiting.pop(row)), about[row])
            bar.update(len(some))
    files.close()
    return len(todo)


def _sampled(
    net: Any,
    weights: Weights,
    request: Request,
    condition_of: Callable[[Sequence[int]], Condition],
    images: list[tuple[int, int]],
    device: torch.device,
) -> Iterator[np.ndarray]:
    of = [request.noise_of(*image) for image in images]
    noise = [seeded_noise(*one, request.size, device, weights.about.generator) for one in _by_seed(of)]
    samples = generate_as(net, torch.cat(noise), condition_of([row for row, _ in images]), request.sampling)
    if not samples.isfinite().all():
        raise InputError(not_finite(weights.about.source))
    yield from to_uint8(samples)


def _by_seed(noise: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(seed, number) of images -> (seed, numbers) of those in a row that share a seed."""
    for seed, same in groupby(noise, key=itemgetter(0)):
        yield seed, [number for _, number in same]


def metadata(weights: Weights, request: Request, row: int, column: int) -> dict[str, Any]:
    """An image's metadata: equal metadata on one device mean equal images, but for the batch's rounding."""
    a, (seed, number) = weights.about, request.noise_of(row, column)
    return {
        "weights": a.source,
        "kind": a.kind,
        "images_seen": a.images_seen,
        ("prompt" if a.model.text_width else "class"): request.rows[row].name,
        **({"negative_prompt": request.negative, "text_encoder": a.text.digest} if a.model.text_width else {}),
        "seed": seed,
        "number": number,
        "size": list(request.size),
        **asdict(request.sampling),
        **({"generator": a.generator} if a.generator != "torch" else {}),
        **({"convention": a.model.convention} if a.model.convention != "paper" else {}),
    }

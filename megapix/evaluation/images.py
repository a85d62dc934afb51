"""The images of an evaluation: which ones, in blocks that are drawn together, and what an extractor says of them.

An image depends on subject, seed, number, batch and device alone: whoever draws a block draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megapix import sample
from megapix.condition import Condition
from megapix.config import SamplingConfig
from megapix.extractors import Extractor
from megapix.flow import Network


@dataclass(frozen=True)
class Images:
    """Image numbers 0 to `count` - 1 in blocks of `batch`."""

    count: int
    batch: int
    subjects: Sequence[int]
    """Numbers of classes or captions; image number n has the one at n modulo their number."""
    told: Callable[[Sequence[int]], Condition]
    """What the network is told of such numbers."""
    seed: int
    size: tuple[int, int]
    """Height and width in pixels."""
    sampling: SamplingConfig

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.batch)

    def numbers(self, block: int) -> range:
        """The image numbers of a block; the last may have fewer than `batch`."""
        return range(block * self.batch, min((block + 1) * self.batch, self.count))

    def subject(self, number: int) -> int:
        """The class or caption of an image number."""
        return self.subjects[number % len(self.subjects)]


@dataclass(frozen=True)
class Drawn:
    """A block."""

    pixels: NDArray[np.uint8]
    """[B, H, W, 3]"""
    features: NDArray[np.float32]
    """[B, D]"""
    logits: NDArray[np.float32]
    """[B, K]"""
    finite: bool
    """Whether the network's images held numbers alone."""


def draw(
    images: Images,
    block: int,
    net: Network,
    extractor: Extractor,
    device: torch.device,
    each_step: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw a block and have its features taken.

    It is drawn as a whole batch, of which the last block's is kept in part, and its noise is always the CPU's.

    Args:
        each_step: called before each step of the sampler; an exception from it ends the drawing.
    """
    numbers = list(range(block * images.batch, (block + 1) * images.batch))
    condition = images.told([images.subject(n) for n in numbers])
    noise = sample.seeded_noise(images.seed, numbers, images.size, torch.device("cpu")).to(device)
    drawn = sample.draw(net, noise, condition, images.sampling, each_step)
    finite, pixels = bool(drawn.isfinite().all()), sample.to_uint8(drawn)
    features, logits = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))
    kept = len(images.numbers(block))
    return Drawn(pixels[:kept], features[:kept].float().cpu().numpy(), logits[:kept].float().cpu().numpy(), finite)

"""The samples of an evaluation, in blocks that are sampled together, and their features.

An image depends on subject, seed, number, batch and device alone: a block is the same whichever rank samples it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megapix.config import Generator, SamplingConfig
from megapix.diffusion.condition import Condition
from megapix.diffusion.flow import Network
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.encoders.clip import ImageText
from megapix.encoders.scoring import Extractor


@dataclass(frozen=True)
class Images:
    """Image numbers 0 to `count` - 1 in blocks of `batch`."""

    count: int
    batch: int
    subjects: Sequence[int]
    """Numbers of classes or captions; image number n has the one at n modulo their number."""
    condition_of: Callable[[Sequence[int]], Condition]
    """Such numbers -> the network's condition."""
    seed: int
    size: tuple[int, int]
    """Height and width in pixels."""
    sampling: SamplingConfig
    generator: Generator = "torch"
    """Of the noise: the run's `flow.generator`."""

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
class Samples:
    """A block of samples."""

    pixels: NDArray[np.uint8]
    """[B, H, W, 3]"""
    features: NDArray[np.float32]
    """[B, D]"""
    logits: NDArray[np.float32]
    """[B, K]"""
    fit: NDArray[np.float32]
    """Vectors that say how well they fit prompts (`encoders.clip`) [B, E]; E is 0 without such an encoder."""
    finite: bool
    """Whether no pixel was NaN or infinite."""


def generate_images(
    images: Images,
    block: int,
    net: Network,
    extractor: Extractor | None,
    device: torch.device,
    each_step: Callable[[], None] = lambda: None,
    clip: ImageText | None = None,
) -> Samples:
    """Sample a block and extract its features.

    A whole batch is sampled, of which the last block keeps a part. Its noise is the same on any device: that of torch's
    generator is always the CPU's.

    Args:
        extractor: None makes features and logits of no numbers.
        each_step: called before each step of the sampler; an exception from it ends the sampling.
    """
    numbers = list(range(block * images.batch, (block + 1) * images.batch))
    condition = images.condition_of([images.subject(n) for n in numbers])
    place = torch.device("cpu") if images.generator == "torch" else device
    noise = seeded_noise(images.seed, numbers, images.size, place, images.generator).to(device)
    samples = generate_as(net, noise, condition, images.sampling, each_step)
    finite, pixels = bool(samples.isfinite().all()), to_uint8(samples)
    shown, nothing = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device), torch.zeros(len(pixels), 0)
    features, logits = extractor(shown) if extractor else (nothing, nothing)
    fit = clip.images(shown) if clip else nothing
    kept = len(images.numbers(block))
    features, logits, fit = (part[:kept].float().cpu() for part in (features, logits, fit))
    return Samples(pixels[:kept], features.numpy(), logits.numpy(), fit.numpy(), finite)

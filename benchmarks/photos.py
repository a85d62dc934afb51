"""Pictures for the benchmarks: noise with a photograph's spectrum and edges, of ImageNet's usual sizes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SHAPES = ((375, 500), (500, 375), (333, 500), (400, 500), (480, 640), (600, 800))
"""(height, width), cycled through; ImageNet's mean is about 400 x 470."""


def photo(height: int, width: int, seed: int) -> Image.Image:
    """An RGB picture whose amplitude falls with 1/frequency, as photographs' does, with a little sensor noise."""
    generator = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    phases = generator.normal(size=(2, *amplitude.shape))
    grey = np.fft.irfft2(amplitude * (phases[0] + 1j * phases[1]), (height, width))
    tints = generator.uniform(0.6, 1.2, 3)
    picture = grey[..., None] / grey.std() * 45 * tints + 120
    picture[height // 3 : height // 2, width // 4 : width // 2] += 50
    picture += generator.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def jpegs(count: int, quality: int = 92) -> list[bytes]:
    """Encoded pictures of the usual sizes."""
    found = []
    for number in range(count):
        out = io.BytesIO()
        photo(*SHAPES[number % len(SHAPES)], seed=number).save(out, "JPEG", quality=quality)
        found.append(out.getvalue())
    return found

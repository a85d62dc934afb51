"""Small real shards: images with a structure that a tiny network learns in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.shards.image_policy import Policy

OPTIONS = Options(Policy.make("crop", 16), samples_per_shard=16)
CLASSES = ("blue", "green", "red")


def draw(root: Path) -> Path:
    """40 PNG images of 16 pixels in three class folders: a gradient of the class's colour, with noise."""
    generator = np.random.default_rng(0)
    for number in range(40):
        label = number % 3
        image = generator.integers(0, 60, (16, 16, 3))
        image[..., 2 - label] += np.linspace(0, 190, 16).astype(int)[None, :]
        folder = root / CLASSES[label] / ("deep" if number % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


def pack(images: Path, out: Path) -> Path:
    """Those images as three shards."""
    write(ImageFolder.open(images), out, OPTIONS, workers=1, progress=False)
    return out

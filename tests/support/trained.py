"""What the distributed tests train: the small run with classes, and with text on images of several shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.passes.text_features import embed_text
from data_prep.sources.image_text import ImageText
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.conditioning import conditioner, text_source
from megapix.conditioning.text_source import text_of
from megapix.config import Config, TextConfig
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion.condition import Condition
from megapix.dist import World
from megapix.engine.network import build_network
from megapix.shards.image_policy import Policy
from megapix.shards.text_recipe import recipe_of
from megapix.weights.about import About, Weights
from megapix.weights.write import write_model
from tests.support import text_encoders
from tests.support.small_run import SMALL, STEP_BATCH, arguments

TEXT = replace(
    SMALL,
    model=replace(
        SMALL.model,
        mlp="swiglu",
        num_classes=0,
        text_width=text_encoders.WIDTH,
        text_tokens=12,
        pixel_attention_width=24,
        pixel_heads=3,
    ),
    text=TextConfig(max_tokens=12, scale=1.0, dtype="fp32"),
)
CONFIGS = {"classes": SMALL, "text": TEXT}
BUCKETS = Policy.make("buckets", 16, step=4)
SIZES = ((16, 16), (12, 20), (20, 12))
"""(height, width) of the images, in turns."""


@dataclass(frozen=True)
class Subject:
    """A run's data and options."""

    name: str
    """'classes' or 'text'."""
    shards: Path

    @property
    def config(self) -> Config:
        """Its options."""
        return CONFIGS[self.name]

    def arguments(self, out: Path, *overrides: str) -> list[str]:
        """`train` arguments."""
        return arguments(self.shards, out, *overrides, small=self.config)

    def samples(self, seed: int = SMALL.seed) -> Callable[[NDArray[np.int64]], tuple[Tensor, Condition]]:
        """Positions of one step -> images uint8 [B, 3, H, W] and their condition, as the run's loader has them."""
        c = replace(self.config, data=replace(self.config.data, path=str(self.shards)))
        located = locate(c.data)
        source = text_of(c, located, None)
        of = conditioner.of_run(c, source, World(), torch.device("cpu")).of
        data = MicroBatches(located, c.data, seed, STEP_BATCH, source.extras(None))

        def read(positions: NDArray[np.int64]) -> tuple[Tensor, Condition]:
            batch = data[positions]
            assert not isinstance(batch, Exception), batch
            return batch.images, of(batch)

        return read


def text_shards(root: Path, encoder: Path, count: int = 36) -> Path:
    """Shards of `count` images of three shapes with one or two captions each, and the features of these."""
    generator = np.random.default_rng(0)
    images = root / "images"
    images.mkdir(parents=True)
    for number in range(count):
        height, width = SIZES[number % 3]
        colour = ("red", "blue")[number % 2]
        pixels = generator.integers(0, 60, (height, width, 3))
        pixels[..., 2 * (number % 2)] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number:02d}.png")
        captions = [{"text": f"a {colour} mat"}, {"text": f"a photo of the {colour} dog", "weight": 0.5}]
        about = {"captions": captions} if number % 4 else {"caption": captions[0]["text"]}
        (images / f"{number:02d}.json").write_text(json.dumps(about))
    out = root / "shards"
    write(ImageText.open(images), out, Options(BUCKETS, samples_per_shard=16), workers=1, progress=False)
    embed_text(out, str(encoder), recipe_of(TEXT.text), batch=16, overwrite=False, progress=False)
    return out


def text_model(folder: Path, encoder: Path, stored: bool = False) -> Path:
    """An imported folder of a text network with random weights, which was trained with the encoder, or with features
    of it that were stored."""
    net = build_network(TEXT.model, 0)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    digest = text_source.load(TEXT.text, str(encoder)).digest
    text = replace(TEXT.text, encoder="" if stored else str(encoder), digest=digest)
    about = About(TEXT.model, replace(TEXT.sampling, steps=2, guidance=2.0), 16, text, (), True, "random", 7)
    write_model(folder, Weights({n: p.detach() for n, p in net.named_parameters()}, about))
    return folder

"""`megapix.load`: a pipeline of whatever holds weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megapix.ports.pipeline import PixelDiTPipeline, Settings
from megapix.weights.about import About
from megapix.weights.read import load_weights, network


def load(path: str | Path, ema: bool | None = None, device: str | torch.device | None = None) -> PixelDiTPipeline:
    """A pipeline of a run, a checkpoint, an exported file, an imported folder, or a folder exported for diffusers.

    Args:
        path: as of `load_model`; or a folder by `megapix export --format diffusers`.
        ema: the EMA weights, or the raw ones, as of `load_model`.
        device: where to sample; None is a GPU if there is one.

    Raises:
        InputError: none of these is at `path`, it is damaged, or the weights asked for are not in it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (Path(path) / "model_index.json").is_file():
        return PixelDiTPipeline.from_pretrained(path, device)
    weights = load_weights(path, ema)
    return PixelDiTPipeline(network(weights, device), settings_of(weights.about))


def settings_of(about: About) -> Settings:
    """What a pipeline needs of what goes with weights."""
    return Settings(
        about.source, about.model, about.image_size, about.sampling, about.generator, about.classes, about.text
    )

"""`megapix.load`: a pipeline of whatever holds weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megapix.model import PixelDiT
from megapix.ports.hub import local
from megapix.ports.pipeline import PixelDiTPipeline
from megapix.ports.settings import settings_of
from megapix.weights import read
from megapix.weights.read import load_weights, network


def load(path: str | Path, ema: bool | None = None, device: str | torch.device | None = None) -> PixelDiTPipeline:
    """A pipeline of a run, a checkpoint, an exported file, an imported folder, or a folder exported for diffusers.

    Args:
        path: as of `load_model`; or a folder by `megapix export --format diffusers`; or hf://OWNER/NAME, maybe with
            @REVISION behind it, for one of these on the Hugging Face hub.
        ema: the EMA weights, or the raw ones, as of `load_model`.
        device: where to sample; None is a GPU if there is one.

    Raises:
        InputError: none of these is at `path`, it is damaged, or the weights asked for are not in it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = local(path)
    if _is_exported(path):
        return PixelDiTPipeline.from_pretrained(path, device)
    weights = load_weights(path, ema)
    return PixelDiTPipeline(network(weights, device), settings_of(weights.about))


def load_model(path: str | Path, ema: bool | None = None, device: str | torch.device = "cpu") -> PixelDiT:
    """The network alone, as `megapix.weights.read.load_model` gives it, which says more; from hf://OWNER/NAME and from
    a folder by `megapix export --format diffusers`, too.

    Raises:
        InputError: none of these is at `path`, it is damaged, or the weights asked for are not in it.
    """
    path = local(path)
    return (
        PixelDiTPipeline.from_pretrained(path, device).network
        if _is_exported(path)
        else read.load_model(path, ema, device)
    )


def _is_exported(path: Path) -> bool:
    return (path / "model_index.json").is_file()

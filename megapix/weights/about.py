"""What goes with weights: network, sampling, classes or text options, and where they came from; as metadata, too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megapix import config
from megapix.checkpoint.find import Saved
from megapix.checkpoint.manifest import Stage
from megapix.config import FlowConfig, Generator, ModelConfig, SamplingConfig, TextConfig
from megapix.errors import InputError
from megapix.model.projector import PROJECTOR

MODEL_NAME = "model.safetensors"
"""The exported weights in the folder of an imported model."""


METADATA = "megapix"
"""Key of an exported file's metadata that holds its `About`, as JSON."""
T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What weights need to be used, and where they came from."""

    model: ModelConfig
    sampling: SamplingConfig
    image_size: int
    text: TextConfig
    classes: tuple[str, ...]
    ema: bool
    source: str
    images_seen: int
    stages: tuple[Stage, ...] = ()
    """The stages of training before this one, oldest first."""
    generator: Generator = "torch"
    """Of the noise that images start from: the run's `flow.generator`; a file that does not name it has torch's."""
    initial_share: float | None = None
    """Of an EMA, the share that is still the weights that its run began with (`OptimConfig.ema_share`); None where that
    is not known."""

    @property
    def kind(self) -> str:
        """'EMA' or 'raw weights'."""
        return "EMA" if self.ema else "raw weights"


@dataclass(frozen=True)
class Weights:
    """Weights, and what goes with them."""

    tensors: dict[str, Tensor]
    """Parameters by name."""
    about: About


def exported_file(path: Path) -> Path | None:
    """The exported weights at `path`: the file itself, or the one in a folder of an imported model; None without."""
    return next((file for file in (path, path / MODEL_NAME) if file.is_file()), None)


def own(named: dict[str, T]) -> dict[str, T]:
    """The parameters of PixelDiT itself, by name: all but REPA's projector."""
    return {name: value for name, value in named.items() if not name.startswith(PROJECTOR)}


def part_of(ema: bool) -> str:
    """Name of the flat vector that holds these weights in a checkpoint."""
    return "ema" if ema else "weights"


def about_saved(saved: Saved, ema: bool) -> About:
    """`About` of a checkpoint's weights."""
    c, state = saved.state.config, saved.state
    size, seen, source = c.data.image_size, state.counters.images_seen, str(saved.folder)
    generator = c.flow.generator
    share = c.optim.ema_share(state.adam_steps) if ema else None
    return About(c.model, c.sampling, size, c.text, state.classes, ema, source, seen, state.stages, generator, share)


def metadata_of(about: About) -> dict[str, str]:
    """`about` as the metadata of an exported file."""
    return {METADATA: json.dumps(config.to_dict(about))}


def parsed(data: dict[str, Any], path: Path) -> About:
    """`About` from the metadata of the exported file at `path`, parsed as JSON.

    Raises:
        InputError: an unknown option, or one of the wrong type.
        ValueError, KeyError, TypeError: other values that are missing or wrong.
    """
    size = data["image_size"]
    if not isinstance(size, int):
        raise ValueError(f"image_size is {size!r}, not a number of pixels")
    model = config.from_dict(ModelConfig, data["model"], str(path))
    try:
        config.validate_model(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    sampling = config.from_dict(SamplingConfig, data["sampling"], str(path))
    text = config.from_dict(TextConfig, data.get("text", {}), str(path))
    classes, stages = tuple(data["classes"]), tuple(Stage(**stage) for stage in data.get("stages", ()))
    named = {"generator": data["generator"]} if "generator" in data else {}
    generator, ema, seen = config.from_dict(FlowConfig, named, str(path)).generator, data["ema"], data["images_seen"]
    share = data.get("initial_share")
    if not isinstance(share, float | int | None):
        raise ValueError(f"initial_share is {share!r}, not a number")
    return About(model, sampling, size, text, classes, ema, str(path), seen, stages, generator, share)

"""Weights out of runs, checkpoints and exported files, on one process and without DeepSpeed.

A checkpoint holds flat fp32 vectors in shares (`checkpoint.py`); a parameter is a range of one. An exported file is one
safetensors file of fp32 parameters with the configuration in its metadata, under the key "megapix". REPA's projector,
which only training needs, stays in the checkpoint.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapix import checkpoint, config, dist, flat
from megapix.checkpoint import EXPECTED, Saved
from megapix.config import ModelConfig, SamplingConfig
from megapix.dist import World
from megapix.errors import InputError
from megapix.model import PixelDiT
from megapix.model.aligned import PROJECTOR

METADATA = "megapix"
T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What is needed to use weights, and where they came from."""

    model: ModelConfig
    sampling: SamplingConfig
    image_size: int
    classes: tuple[str, ...]
    ema: bool
    source: str
    images_seen: int


@dataclass(frozen=True)
class Weights:
    """Weights and what is needed to use them."""

    tensors: dict[str, Tensor]
    """Parameters by name, float32."""
    about: About


def load_model(path: str | Path, ema: bool = True, device: str | torch.device = "cpu") -> PixelDiT:
    """The network of a run, a checkpoint or an exported file, in eval mode, with float32 weights.

    Call it as net(x, t, y): x [B, 3, H, W] in [-1, 1], t [B] in [0, 1], y [B] class indices; it returns the velocity.

    Args:
        path: run folder (its newest whole checkpoint is taken), checkpoint folder, or exported file.
        ema: the EMA weights, or the raw ones. An exported file holds one kind.

    Raises:
        InputError: none of the three is at `path`, it is damaged, or the weights asked for are not in it.
    """
    return network(load_weights(path, ema), device)


def network(weights: Weights, device: str | torch.device = "cpu") -> PixelDiT:
    """The network that `weights` belong to, in eval mode; it takes the tensors over.

    Raises:
        InputError: tensors and configuration do not belong together.
    """
    with torch.device("meta"):
        net = PixelDiT(weights.about.model)
    _check_shapes(net, weights)
    net.load_state_dict(weights.tensors, assign=True)
    return net.to(device).eval().requires_grad_(False)


def load_weights(path: str | Path, ema: bool = True, world: World | None = None) -> Weights:
    """Read weights from a run, a checkpoint or an exported file; errors as in `load_model`.

    Args:
        world: every rank of a run calls it together, and they share the work of hashing; None is one process alone.
    """
    path, world = Path(path), world or World()
    if path.is_file():
        return dist.together(world, lambda: _read_export(path, ema))
    saved = checkpoint.find(path, world)
    layout = saved.state.layout

    def read() -> dict[str, Tensor]:
        with checkpoint.reading(saved.folder):
            return {name: flat.tensor(saved.folder, layout, _part(ema), name) for name in own(layout.shapes)}

    return Weights(dist.together(world, read), _about(saved, ema))


def export(path: Path, out: Path, ema: bool = True) -> About:
    """Write the EMA or raw weights of a run or checkpoint as one safetensors file, a chunk of a tensor at a time.

    Raises:
        InputError: neither of the two is at `path`, it is damaged, or `out` cannot be written.
    """
    saved = checkpoint.find(path, World())
    folder, layout, about = saved.folder, saved.state.layout, _about(saved, ema)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with checkpoint.reading(folder):
            tensors = {
                name: (layout.shapes[name], (piece for _, piece in flat.read(folder, layout, _part(ema), *span)))
                for name, span in own(layout.spans).items()
            }
            flat.write(temporary, tensors, {METADATA: json.dumps(config.to_dict(about))})
        os.replace(temporary, out)
        checkpoint.sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return about


def own(named: dict[str, T]) -> dict[str, T]:
    """What belongs to PixelDiT itself, by name: all but REPA's projector."""
    return {name: value for name, value in named.items() if not name.startswith(PROJECTOR)}


def assign(net: PixelDiT, weights: Weights) -> None:
    """Copy `weights` into `net`; a projector keeps what it has.

    Raises:
        InputError: names the first tensor that is missing, extra or of another shape.
    """
    _check_shapes(net, weights)
    net.load_state_dict(weights.tensors, strict=False)


def _check_shapes(net: PixelDiT, weights: Weights) -> None:
    needed = own(net.state_dict())
    for name in sorted(needed.keys() | weights.tensors.keys()):
        here, there = (tuple(d[name].shape) if name in d else None for d in (needed, weights.tensors))
        if here != there:
            raise InputError(f"{weights.about.source}: {name} has shape {there}, but the network needs {here}")


def _part(ema: bool) -> str:
    return "ema" if ema else "weights"


def _about(saved: Saved, ema: bool) -> About:
    c, state = saved.state.config, saved.state
    size, seen = c.data.image_size, state.counters.images_seen
    return About(c.model, c.sampling, size, state.classes, ema, str(saved.folder), seen)


def _read_export(path: Path, ema: bool) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata:
                raise InputError(f"{path} has no {METADATA!r} in its metadata: {EXPECTED}")
            about = _parsed(json.loads(metadata[METADATA]), path)
            if about.ema != ema:
                kinds = {True: "EMA", False: "raw"}
                raise InputError(f"{path} holds {kinds[about.ema]} weights, but the {kinds[ema]} ones were asked for")
            return Weights({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as exported weights: {error}") from error


def _parsed(data: dict[str, Any], path: Path) -> About:
    size = data["image_size"]
    if not isinstance(size, int):
        raise ValueError(f"image_size is {size!r}, not a number of pixels")
    model = config.from_dict(ModelConfig, data["model"], str(path))
    sampling = config.from_dict(SamplingConfig, data["sampling"], str(path))
    classes = tuple(data["classes"])
    return About(model, sampling, size, classes, data["ema"], str(path), data["images_seen"])

"""Weights out of runs, checkpoints and exported models, on one process and without DeepSpeed.

A checkpoint holds flat fp32 vectors in shares (`checkpoint.py`); a parameter is a range of one. An exported file is one
safetensors file of the EMA or the raw weights, with the configuration in its metadata under the key "megapix". Imported
weights are such a file in a folder, in the dtypes that they came in:

FOLDER/model.safetensors    the exported file
FOLDER/config.json          model, image size and sampling again, to read and for `train --config`

REPA's projector, which only training needs, stays in the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapix import checkpoint, config, dist, flat
from megapix.checkpoint import EXPECTED, Saved, Stage
from megapix.config import ModelConfig, SamplingConfig, TextConfig
from megapix.dist import World
from megapix.errors import InputError
from megapix.model import PixelDiT, build
from megapix.model.aligned import PROJECTOR
from megapix.shards import write_atomic

METADATA = "megapix"
T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What is needed to use weights, and where they came from."""

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

    @property
    def kind(self) -> str:
        """'EMA' or 'raw weights'."""
        return "EMA" if self.ema else "raw weights"


@dataclass(frozen=True)
class Weights:
    """Weights and what is needed to use them."""

    tensors: dict[str, Tensor]
    """Parameters by name."""
    about: About


def load_model(path: str | Path, ema: bool | None = None, device: str | torch.device = "cpu") -> PixelDiT:
    """The network of a run, a checkpoint, an exported file or an imported folder, in eval mode, with float32 weights.

    Call it as net(x, t, y): x [B, 3, H, W] in [-1, 1], t [B] in [0, 1], y [B] class indices; or, where it takes text,
    as net(x, t, y, mask): y [B, T, C_text], mask [B, T] true for real tokens. It returns the velocity.

    Args:
        path: run folder (its newest whole checkpoint is taken), checkpoint folder, exported file, or imported folder.
        ema: the EMA weights, or the raw ones. None takes the EMA of a run or checkpoint, and of an exported file or
            imported folder the one kind that it holds.

    Raises:
        InputError: none of the four is at `path`, it is damaged, or the weights asked for are not in it.
    """
    return network(load_weights(path, ema), device)


def network(weights: Weights, device: str | torch.device = "cpu") -> PixelDiT:
    """The network that `weights` belong to, in eval mode; it takes the tensors over.

    Raises:
        InputError: tensors and configuration do not belong together.
    """
    with torch.device("meta"):
        net = build(weights.about.model)
    _check(net, weights)
    net.load_state_dict(weights.tensors, assign=True)
    return net.to(device).eval().requires_grad_(False)


def load_weights(path: str | Path, ema: bool | None = None, world: World | None = None) -> Weights:
    """Read weights in float32; `path`, `ema` and errors as in `load_model`.

    Args:
        world: every rank of a run calls it together, and they share the work of hashing; None is one process alone.
    """
    found = stored_weights(path, ema, world)
    return Weights({name: tensor.float() for name, tensor in found.tensors.items()}, found.about)


def stored_weights(path: str | Path, ema: bool | None = None, world: World | None = None) -> Weights:
    """`load_weights` in the dtypes of the file: float32, or what weights were imported in."""
    path, world = Path(path), world or World()
    if file := checkpoint.exported_file(path):
        return dist.together(world, lambda: _read_export(file, ema))
    saved = checkpoint.find(path, world)
    layout, part = saved.state.layout, _part(ema is not False)

    def read() -> dict[str, Tensor]:
        with checkpoint.reading(saved.folder):
            return {name: flat.tensor(saved.folder, layout, part, name) for name in own(layout.shapes)}

    return Weights(dist.together(world, read), _about(saved, ema is not False))


def about(path: str | Path, ema: bool | None = None) -> About:
    """What is said of the weights at `path`, without reading them: checkpoints are checked by size alone.

    Raises:
        InputError: as `load_model`.
    """
    path = Path(path)
    if file := checkpoint.exported_file(path):
        with _opened(file, ema) as (_, found):
            return found
    return _about(checkpoint.find(path, World(), hashed=False), ema is not False)


def export(path: Path, out: Path, ema: bool = True) -> About:
    """Write the EMA or raw weights of a run or checkpoint as one safetensors file, a chunk of a tensor at a time.

    Raises:
        InputError: neither of the two is at `path`, it is damaged, or `out` cannot be written.
    """
    if file := checkpoint.exported_file(path):
        raise InputError(f"{file} is an exported model already; expected a run or a checkpoint")
    saved = checkpoint.find(path, World())
    folder, layout, about = saved.folder, saved.state.layout, _about(saved, ema)
    with appearing(out) as temporary, checkpoint.reading(folder):
        tensors = {
            name: (layout.shapes[name], (piece for _, piece in flat.read(folder, layout, _part(ema), *span)))
            for name, span in own(layout.spans).items()
        }
        flat.write(temporary, tensors, _metadata(about))
    return about


def write_model(out: Path, weights: Weights) -> None:
    """Write the folder of an imported model, each tensor in its dtype.

    Raises:
        InputError: `out` is there and not empty, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error
    if taken:
        raise InputError(f"--out {str(out)!r} exists already; expected a new or empty folder")
    about = config.to_dict(weights.about)
    run = {
        "model": about["model"],
        "data": {"image_size": about["image_size"]},
        "sampling": about["sampling"],
        "text": about["text"],
    }
    with appearing(out) as temporary:
        temporary.mkdir(parents=True)
        tensors = {name: (tuple(t.shape), flat.chunks(t.flatten())) for name, t in weights.tensors.items()}
        dtypes = {name: t.dtype for name, t in weights.tensors.items()}
        flat.write(temporary / checkpoint.MODEL_NAME, tensors, _metadata(weights.about), dtypes)
        write_atomic(temporary / "config.json", (json.dumps(run, indent=1) + "\n").encode())
        checkpoint.sync_folder(temporary)


@contextmanager
def appearing(out: Path, option: str = "--out") -> Iterator[Path]:
    """A path to write a synced file or folder to; at the end it becomes `out`, whole or not at all.

    Raises:
        InputError: it cannot be written; names `option`.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _remove(temporary)  # of a process that was killed
        yield temporary
        os.replace(temporary, out)
        checkpoint.sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"{option} {str(out)!r} cannot be written: {error.strerror}") from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        temporary.unlink()


def own(named: dict[str, T]) -> dict[str, T]:
    """What belongs to PixelDiT itself, by name: all but REPA's projector."""
    return {name: value for name, value in named.items() if not name.startswith(PROJECTOR)}


def assign(net: PixelDiT, weights: Weights) -> None:
    """Copy `weights` into `net`; a projector keeps what it has.

    Raises:
        InputError: names the first tensors that are missing, unknown or of another shape.
    """
    _check(net, weights)
    net.load_state_dict(weights.tensors, strict=False)


def _check(net: PixelDiT, weights: Weights) -> None:
    check_shapes(shapes_of(own(net.state_dict())), shapes_of(weights.tensors), weights.about.source)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare a file's parameters with a network's.

    Raises:
        InputError: names the first tensors that are missing, unknown or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} has shape {found[name]}, but the network needs {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    faults = {"misses ": missing, "holds the unknown ": unknown, "": misshapen}
    said = [f"{what}{first(names)}" for what, names in faults.items() if names]
    if said:
        raise InputError(f"{source}: {'; '.join(said)}")


def first(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _part(ema: bool) -> str:
    return "ema" if ema else "weights"


def _about(saved: Saved, ema: bool) -> About:
    c, state = saved.state.config, saved.state
    size, seen = c.data.image_size, state.counters.images_seen
    return About(c.model, c.sampling, size, c.text, state.classes, ema, str(saved.folder), seen, state.stages)


def _metadata(about: About) -> dict[str, str]:
    return {METADATA: json.dumps(config.to_dict(about))}


def _read_export(path: Path, ema: bool | None) -> Weights:
    with _opened(path, ema) as (file, about):
        return Weights({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118


@contextmanager
def _opened(path: Path, ema: bool | None) -> Iterator[tuple[Any, About]]:
    """An exported file, and what it says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata:
                raise InputError(f"{path} has no {METADATA!r} in its metadata: {EXPECTED}")
            found = _parsed(json.loads(metadata[METADATA]), path)
            if ema not in (None, found.ema):
                kinds = {True: "EMA", False: "raw"}
                raise InputError(f"{path} holds {kinds[found.ema]} weights, but the {kinds[ema]} ones were asked for")
            yield file, found
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "; megapix import reads the authors' checkpoints" if path.suffix in (".ckpt", ".pt", ".pth") else ""
        raise InputError(f"{path}: cannot be read as exported weights: {error}{hint}") from error


def _parsed(data: dict[str, Any], path: Path) -> About:
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
    return About(model, sampling, size, text, classes, data["ema"], str(path), data["images_seen"], stages)

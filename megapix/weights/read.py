"""Weights from a run, a checkpoint, an exported file or an imported folder, and the network that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapix.checkpoint import vectors
from megapix.checkpoint.find import EXPECTED, find
from megapix.checkpoint.folder import reading
from megapix.dist import World, on_all_ranks
from megapix.errors import InputError
from megapix.model import PixelDiT, build
from megapix.weights.about import METADATA, About, Weights, about_saved, exported_file, own, parsed, part_of


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
        world: every rank of a run calls it together, and they share the hashing; None is one process alone.
    """
    stored = stored_weights(path, ema, world)
    return Weights({name: tensor.float() for name, tensor in stored.tensors.items()}, stored.about)


def stored_weights(path: str | Path, ema: bool | None = None, world: World | None = None) -> Weights:
    """`load_weights` in the dtypes of the file: float32, or those that weights were imported in."""
    path, world = Path(path), world or World()
    if file := exported_file(path):
        return on_all_ranks(world, lambda: _read_export(file, ema))
    saved = find(path, world)
    layout, part = saved.state.layout, part_of(ema is not False)

    def read() -> dict[str, Tensor]:
        with reading(saved.folder):
            return {name: vectors.tensor(saved.folder, layout, part, name) for name in own(layout.shapes)}

    return Weights(on_all_ranks(world, read), about_saved(saved, ema is not False))


def about(path: str | Path, ema: bool | None = None) -> About:
    """`About` of the weights at `path`, without reading them: checkpoints are checked only by size.

    Raises:
        InputError: as `load_model`.
    """
    path = Path(path)
    if file := exported_file(path):
        with _opened(file, ema) as (_, about):
            return about
    return about_saved(find(path, World(), hashed=False), ema is not False)


def check_whole(path: str | Path, ema: bool | None = None) -> None:
    """Check that the weights at `path` are those of the network that their `About` says, by names and shapes alone.

    Raises:
        InputError: as `load_model`, but for damage within the numbers.
    """
    path, known = Path(path), about(path, ema)
    with torch.device("meta"):
        expected = shapes_of(own(build(known.model).state_dict()))
    if file := exported_file(path):
        with _opened(file, ema) as (opened, _):
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    else:
        found = own(find(path, World(), hashed=False).state.layout.shapes)
    check_shapes(expected, found, known.source)


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
    lines = [f"{what}{first(names)}" for what, names in faults.items() if names]
    if lines:
        raise InputError(f"{source}: {'; '.join(lines)}")


def first(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _read_export(path: Path, ema: bool | None) -> Weights:
    with _opened(path, ema) as (file, about):
        return Weights({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118


@contextmanager
def _opened(path: Path, ema: bool | None) -> Iterator[tuple[Any, About]]:
    """An exported file, and its `About`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata:
                raise InputError(f"{path} has no {METADATA!r} in its metadata: {EXPECTED}; megapix import reads others")
            about = parsed(json.loads(metadata[METADATA]), path)
            if ema not in (None, about.ema):
                kinds = {True: "EMA", False: "raw"}
                raise InputError(f"{path} holds {kinds[about.ema]} weights, but the {kinds[ema]} ones were asked for")
            yield file, about
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "; megapix import reads the authors' checkpoints" if path.suffix in (".ckpt", ".pt", ".pth") else ""
        raise InputError(f"{path}: cannot be read as exported weights: {error}{hint}") from error

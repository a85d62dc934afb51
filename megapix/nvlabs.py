"""Weights as the authors of PixelDiT release them: in and out.

A release is a torch file (`.ckpt`) whose `state_dict` holds our parameters under the same names behind a prefix:

    ema_denoiser.patch_blocks.0.attn.qkv.weight     the EMA
    denoiser.patch_blocks.0.attn.qkv.weight         the raw weights

There is no configuration in it: the network is recognised from the shapes. Image size, sampling and the names of the
classes are not in it either.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapix import config, flat
from megapix.config import ModelConfig, TextConfig
from megapix.errors import InputError
from megapix.model import build
from megapix.weights import About, Weights, appearing, check_shapes, first, shapes_of, stored_weights

PREFIXES = {True: "ema_denoiser.", False: "denoiser."}
"""Whether they are the EMA -> what stands before each name."""
LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What a torch file from before 1.6 begins with, behind a few bytes of pickle."""
PRESETS = {"PixelDiT-B": config.pixeldit_b, "PixelDiT-L": config.pixeldit_l, "PixelDiT-XL": config.pixeldit_xl}


@dataclass(frozen=True)
class Released:
    """One kind of weights out of a released checkpoint."""

    tensors: dict[str, Tensor]
    """Parameters by our name, in the dtypes of the file."""
    model: ModelConfig
    ema: bool
    ignored: tuple[str, ...]
    """Names in the file that belong to neither kind of weights."""


def read(path: Path, ema: bool | None = None, trust: bool = False) -> Released:
    """Read a released checkpoint, mapped into memory where the file allows it.

    Args:
        ema: the EMA or the raw weights; None takes the EMA if there is one.
        trust: unpickle whatever the file holds, which runs code that it may hold; else tensors and plain values only.

    Raises:
        InputError: not such a file, it holds more than tensors and `trust` is off, or its tensors are no PixelDiT.
    """
    state = _state_dict(path, trust)
    kinds = {
        kind: {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for kind, prefix in PREFIXES.items()
    }
    kind = bool(kinds[True]) if ema is None else ema
    if not kinds[kind]:
        if kinds[not kind]:
            raise InputError(f"{path}: no tensor begins with {PREFIXES[kind]!r}, only with {PREFIXES[not kind]!r}")
        prefixes = " or ".join(map(repr, PREFIXES.values()))
        raise InputError(
            f"{path}: no tensor of its state_dict begins with {prefixes}; it holds {first(list(state)) or 'none'}"
        )
    tensors = kinds[kind]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in flat.DTYPES or not _plain(tensor):
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{path}: {PREFIXES[kind]}{name} is {what}; expected float32, bfloat16 or float16, dense")
    tensors = {name: tensor.resolve_neg() for name, tensor in tensors.items()}
    ignored = tuple(name for name in state if not name.startswith(tuple(PREFIXES.values())))
    return Released(tensors, recognise(shapes_of(tensors), str(path)), kind, ignored)


def _state_dict(path: Path, trust: bool) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; expected a released checkpoint (.ckpt)")
    mapped, zipped = _check_archive(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError as error:
        if trust:
            raise _unreadable(path, error) from error
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        unsafe = sorted(unsafe) or re.findall(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"{path} holds more than tensors{f' (it needs {first(unsafe)})' if unsafe else ''}, and loading that may "
            "run code; if you trust whom the file is from, add --trust"
        ) from None
    except Exception as error:  # unpickling a damaged or foreign file ends in whatever its bytes lead to
        raise _unreadable(path, error) from error
    state = data.get("state_dict") if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping):
        held = f"its keys are {first([str(key) for key in data])}" if isinstance(data, Mapping) else type(data).__name__
        raise InputError(f"{path} has no state_dict: {held}; expected a released checkpoint (.ckpt)")
    return {str(name): value for name, value in state.items()}


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _check_archive(path: Path) -> tuple[bool, bool]:
    """Whether a torch file can be mapped into memory, and whether it is an archive, as they are since torch 1.6.

    Raises:
        InputError: it is no torch file, or a part of it is damaged, which torch would not see.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if LEGACY not in file.read(32):
                raise InputError(f"{path} is no torch file, or not a whole one; expected a released checkpoint (.ckpt)")
        return False, False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error
    if damaged:
        raise InputError(f"{path} is damaged: its part {damaged!r} has another CRC; get the file again")
    return stored, True


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read as a torch file: {type(error).__name__}: {_line(error)}")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def recognise(shapes: Mapping[str, tuple[int, ...]], source: str) -> ModelConfig:
    """The network whose parameters have these names and shapes.

    Width and patch size come from `s_embedder`, heads from `q_norm`'s length, depths from the numbers of blocks, the
    patch FFN from its names, and the pixel modulation from the rows of its layer for each pixel and channel: 6 or 4.

    Raises:
        InputError: there is none; names the first tensors of `source` that are missing, unknown or of another shape.
    """

    def size(name: str, axis: int = 0) -> int:
        shape = shapes.get(name, ())
        if len(shape) <= axis or 0 in shape:
            found = f"has shape {shape}" if name in shapes else "is missing"
            raise InputError(f"{source}: {name} {found}: these are not the weights of a PixelDiT")
        return shape[axis]

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})

    width, head = size("s_embedder.proj.weight"), size("patch_blocks.0.attn.q_norm.weight")
    patch = max(1, math.isqrt(size("s_embedder.proj.weight", 1) // 3))
    pixel_width = size("pixel_embedder.proj.weight")
    if width % head or head % 4:
        raise InputError(
            f"{source}: heads of {head} channels: expected a multiple of 4 that divides the width, {width}"
        )
    if pixel_width % 4:
        raise InputError(f"{source}: a pixel width of {pixel_width}: expected a multiple of 4")
    if (classes := size("y_embedder.embedding_table.weight") - 1) < 1:
        raise InputError(f"{source}: y_embedder.embedding_table.weight has 1 row, expected one more than classes")
    rows, channels = size("pixel_blocks.0.adaLN_modulation.0.weight"), patch**2 * pixel_width
    if rows not in (6 * channels, 4 * channels):
        raise InputError(
            f"{source}: pixel_blocks.0.adaLN_modulation.0.weight has {rows} rows, expected 6 or 4 for each of the "
            f"{channels} channels of a patch's pixels"
        )
    found = ModelConfig(
        patch_size=patch,
        width=width,
        depth=blocks("patch_blocks"),
        heads=width // head,
        pixel_width=pixel_width,
        pixel_depth=blocks("pixel_blocks"),
        mlp="swiglu" if "patch_blocks.0.mlp.w1.weight" in shapes else "gelu",
        modulation="pre" if rows == 6 * channels else "post",
        num_classes=classes,
    )
    with torch.device("meta"):
        check_shapes(shapes_of(build(found).state_dict()), shapes, source)
    return found


def describe(model: ModelConfig) -> str:
    """The network in words, by its name if it is one of the paper's."""
    sizes = replace(model, mlp="gelu", modulation="pre", num_classes=1000)
    name = next((name for name, preset in PRESETS.items() if preset() == sizes), "PixelDiT")
    return (
        f"{name}, {model.depth} + {model.pixel_depth} blocks, width {model.width}, {model.heads} heads, patch "
        f"{model.patch_size}, pixel width {model.pixel_width}, {model.mlp} FFN, {model.modulation}-modulation, "
        f"{model.num_classes} classes"
    )


def weights_of(released: Released, image_size: int, source: Path) -> Weights:
    """Released weights with what is needed to use them: the preset's sampling for that image size, numbered classes.

    Raises:
        InputError: the patch size does not divide the image size.
    """
    model = released.model
    if image_size < model.patch_size or image_size % model.patch_size:
        raise InputError(f"--image-size = {image_size}: expected a multiple of the patch size {model.patch_size}")
    sampling = (config.imagenet_512 if image_size >= 512 else config.imagenet_256)(model).sampling
    classes = tuple(str(number) for number in range(model.num_classes))
    return Weights(
        released.tensors, About(model, sampling, image_size, TextConfig(), classes, released.ema, str(source), 0)
    )


def export(path: Path, out: Path, kinds: Sequence[bool | None]) -> list[About]:
    """Write the weights of a run, checkpoint, exported file or imported folder as the authors would, dtypes kept.

    Args:
        kinds: the EMA (True), the raw weights (False), both, or what `stored_weights` takes by itself (None).

    Raises:
        InputError: as `stored_weights`; or `out` cannot be written.
    """
    state: dict[str, Tensor] = {}
    parts = [stored_weights(path, ema) for ema in kinds]
    for part in parts:
        prefix = PREFIXES[part.about.ema]
        # Copies: a tensor of a mapped file would take the whole file with it.
        state |= {prefix + name: tensor.clone() for name, tensor in part.tensors.items()}
    with appearing(out) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"state_dict": state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # such as a full disk, in torch's words
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())
    return [part.about for part in parts]

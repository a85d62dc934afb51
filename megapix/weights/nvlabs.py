"""Weights as the authors of PixelDiT release them: in and out.

A release is a torch file (`.ckpt`, `.pth`), whose `state_dict` holds our parameters by the same names behind a prefix;
or it is safetensors files of such names:

    ema_denoiser.patch_blocks.0.attn.qkv.weight     the EMA
    denoiser.patch_blocks.0.attn.qkv.weight         the raw weights
    core.patch_blocks.0.attn.qkv_x.weight           any other wrapper's: what stands before `s_embedder.proj.weight`

There is no configuration in it: the network is recognised by its shapes. Image size, sampling, the names of the
classes and the text encoder are not in it either.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapix import config
from megapix.checkpoint import vectors
from megapix.config import Convention, ModelConfig, TextConfig
from megapix.errors import InputError
from megapix.files import appearing
from megapix.model import build
from megapix.weights import released_files
from megapix.weights.about import About, Weights
from megapix.weights.read import check_shapes, first, shapes_of, stored_weights

PREFIXES = {True: "ema_denoiser.", False: "denoiser."}
"""Whether they are the EMA -> what we write before each name, and what is taken if a file holds several networks."""
HOLDERS = {"state_dict": False, "ema": True, "state_dict_ema": True}
"""Keys of a file that may hold parameters by name -> whether these are the EMA whatever stands before them."""
ANCHOR = "s_embedder.proj.weight"
"""A name that each network has once: what stands before it stands before all of that network's names."""
LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What a torch file from before 1.6 begins with, behind a few bytes of pickle."""
PRESETS = {
    "PixelDiT-B": config.pixeldit_b,
    "PixelDiT-L": config.pixeldit_l,
    "PixelDiT-XL": config.pixeldit_xl,
    "PixelDiT-T2I": config.pixeldit_t2i,
}


class Names(NamedTuple):
    """Names that a network is recognised by and that differ between classes and text."""

    condition: str
    """The class table, or the text's linear layer."""
    q_norm: str
    gate: str
    """Of the patch FFN; GELU has none."""


CLASSES = Names(
    "y_embedder.embedding_table.weight", "patch_blocks.0.attn.q_norm.weight", "patch_blocks.0.mlp.w1.weight"
)
TEXT = Names("y_embedder.proj.weight", "patch_blocks.0.attn.q_norm_x.weight", "patch_blocks.0.mlp_x.w1.weight")


class Place(NamedTuple):
    """Where in a file a network's parameters are."""

    holder: str
    """Key of the file, one of HOLDERS; empty where the names are the file's own keys."""
    prefix: str
    """What stands before each name."""

    @property
    def ema(self) -> bool:
        """Whether they are the EMA: the key or a word of the prefix says so."""
        return HOLDERS.get(self.holder, False) or "ema" in re.split(r"[._]", self.prefix)

    def __str__(self) -> str:
        behind = f"behind {self.prefix!r}" if self.prefix else "without a prefix"
        return f"{self.holder or 'the file itself'}, {behind}"


@dataclass(frozen=True)
class Released:
    """One kind of weights out of a released checkpoint."""

    tensors: dict[str, Tensor]
    """Parameters by our name, in the dtypes of the file."""
    model: ModelConfig
    ema: bool
    place: Place
    ignored: tuple[str, ...]
    """Names in the file that belong to neither kind of weights."""


def read(path: Path, ema: bool | None = None, trust: bool = False) -> Released:
    """Read a released checkpoint, mapped into memory where the file allows it.

    Args:
        ema: the EMA or the raw weights; None takes the EMA if there is one.
        trust: unpickle whatever the file holds, which runs code that it may hold; else tensors and plain values only.

    Raises:
        InputError: not such a file, it holds more than tensors and `trust` is off, its tensors are no PixelDiT, or
            several of the same kind, none of them behind one of PREFIXES.
    """
    networks = _networks(path, trust)
    places = {kind: [place for place in networks if place and place.ema == kind] for kind in PREFIXES}
    kind = bool(places[True]) if ema is None else ema
    found = [place for place in places[kind] if place.prefix == PREFIXES[kind]] or places[kind]
    kinds = {True: "EMA", False: "raw"}
    if not found:
        there = "; ".join(map(str, places[not kind]))
        raise InputError(f"{path} holds {kinds[not kind]} weights ({there}), but the {kinds[kind]} ones were asked for")
    if len(found) > 1:
        raise InputError(f"{path} holds {kinds[kind]} weights of several networks: {'; '.join(map(str, found))}")
    place = found[0]
    tensors = networks[place]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in vectors.DTYPES or not _plain(tensor):
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{path}: {place.prefix}{name} is {what}; expected float32, bfloat16 or float16, dense")
    tensors = {name: tensor.resolve_neg() for name, tensor in tensors.items()}
    others = [None, *(other for other in places[kind] if other != place)]
    ignored = tuple(f"{other.prefix if other else ''}{name}" for other in others for name in networks.get(other, {}))
    return Released(tensors, recognise(shapes_of(tensors), str(path)), kind, place, ignored)


def _networks(path: Path, trust: bool) -> dict[Place | None, dict[str, Any]]:
    """What a file holds, by place and name; under None what belongs to no network."""
    found: dict[Place | None, dict[str, Any]] = {}
    for holder, state in _held(path, trust).items():
        prefixes = _prefixes(state)
        if not prefixes:
            raise InputError(
                f"{path}: no name in {holder} ends in {ANCHOR!r}, so there is no PixelDiT in it; "
                f"it holds {first(list(state))}"
            )
        for name, value in state.items():
            prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
            place = None if prefix is None else Place(holder, prefix)
            found.setdefault(place, {})[name.removeprefix(prefix or "")] = value
    return found


def _prefixes(names: Mapping[str, Any]) -> set[str]:
    """What stands before the names of a network; ours count even where the network is not whole."""
    found = {name.removesuffix(ANCHOR) for name in names if f".{name}".endswith(f".{ANCHOR}")}
    return found | {prefix for prefix in PREFIXES.values() if any(name.startswith(prefix) for name in names)}


def _held(path: Path, trust: bool) -> dict[str, dict[str, Any]]:
    """Holder -> name -> tensor, or whatever is there."""
    data = _load(path, trust)
    if not isinstance(data, Mapping):
        raise InputError(f"{path} has no state_dict: {type(data).__name__}; expected a released checkpoint")
    file = {str(key): value for key, value in data.items()}
    states = {key: file[key] for key in HOLDERS if isinstance(file.get(key), Mapping)}
    held = {
        key: {str(name): value for name, value in state.items()}
        for key, state in states.items()
        if any(isinstance(value, Tensor) for value in state.values())
    }
    if not held and _prefixes(file):
        held = {"": file}
    if not held:
        raise InputError(
            f"{path} has no state_dict with tensors: its keys are {first(list(file)) or 'none'}; "
            "expected a released checkpoint (.ckpt, .pth or .safetensors)"
        )
    return held


def _load(path: Path, trust: bool) -> Any:
    if released_files.holds_safetensors(path):
        return released_files.read(path)
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; expected a released checkpoint (.ckpt, .pth or .safetensors)")
    mapped, zipped = _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
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
                raise InputError(
                    f"{path} is no torch file, or not a whole one; expected a released checkpoint (.ckpt or .pth)"
                )
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

    Text or classes come from the names; width and patch size from `s_embedder`; heads from the length of the norm on
    each head; the pixel pathway's attention, which may be of another width, from the same in its first block; depths
    from the numbers of blocks; the patch FFN from its names; and the pixel modulation from the rows of its layer for
    each pixel and channel: 6 or 4.

    Raises:
        InputError: there is none; names the first tensors of `source` that are missing, unknown or of another shape.
    """

    def size(name: str, axis: int = 0) -> int:
        shape = shapes.get(name, ())
        if not -len(shape) <= axis < len(shape) or 0 in shape:
            found = f"has shape {shape}" if name in shapes else "is missing"
            raise InputError(f"{source}: {name} {found}: these are not the weights of a PixelDiT")
        return shape[axis]

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})

    def heads(norm: str, width: int) -> int:
        head = size(norm)
        if width % head or head % 4:
            raise InputError(
                f"{source}: {norm} is of heads of {head} channels: expected a multiple of 4 that divides the width, "
                f"{width}"
            )
        return width // head

    names = max(CLASSES, TEXT, key=lambda names: sum(name in shapes for name in names))
    width, patch = size(ANCHOR), max(1, math.isqrt(size(ANCHOR, 1) // 3))
    attention = width, heads(names.q_norm, width)
    pixel_width = size("pixel_embedder.proj.weight")
    if pixel_width % 4:
        raise InputError(f"{source}: a pixel width of {pixel_width}: expected a multiple of 4")
    inner = size("pixel_blocks.0.compress_to_attn.weight")
    own = inner, heads("pixel_blocks.0.attn.q_norm.weight", inner)
    own = (0, 0) if own == attention else own
    if names is TEXT:
        condition: dict[str, Any] = {
            "num_classes": 0,
            "text_width": size(names.condition, 1),
            "text_tokens": size("y_pos_embedding", -2),
        }
    else:
        condition = {"num_classes": size(names.condition) - 1}
        if not condition["num_classes"]:
            raise InputError(f"{source}: {names.condition} has 1 row, expected one more than classes")
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
        heads=attention[1],
        pixel_width=pixel_width,
        pixel_depth=blocks("pixel_blocks"),
        pixel_attention_width=own[0],
        pixel_heads=own[1],
        mlp="swiglu" if names.gate in shapes else "gelu",
        modulation="pre" if rows == 6 * channels else "post",
        **condition,
    )
    with torch.device("meta"):
        check_shapes(shapes_of(build(found).state_dict()), shapes, source)
    return found


def describe(model: ModelConfig) -> str:
    """The network in words, by its name if it is one of the paper's."""

    def sizes(of: ModelConfig) -> ModelConfig:
        return replace(of, mlp="gelu", modulation="pre", num_classes=0, text_tokens=1, convention="paper")

    name = next((name for name, preset in PRESETS.items() if sizes(preset()) == sizes(model)), "PixelDiT")
    own = (model.attention_width, model.attention_heads) != (model.width, model.heads)
    attention = f" (attention {model.attention_width} wide, {model.attention_heads} heads)" if own else ""
    text = f"text {model.text_width} wide, at most {model.text_tokens} tokens"
    return (
        f"{name}, {model.depth} + {model.pixel_depth} blocks, width {model.width}, {model.heads} heads, patch "
        f"{model.patch_size}, pixel width {model.pixel_width}{attention}, {model.mlp} FFN, "
        f"{model.modulation}-modulation, {text if model.text_width else f'{model.num_classes} classes'}"
    )


def weights_of(
    released: Released, image_size: int | None, source: Path, convention: Convention | None = None
) -> Weights:
    """Released weights with their `About`: the sampling of the preset of that image size; numbered classes, or the
    text options of the same convention.

    Args:
        image_size: height and width in pixels; None is 256, or with text 1024.
        convention: the network's; None is that of the authors' weights: with text their own.

    Raises:
        InputError: the patch size does not divide the image size, or a network with classes is to have that convention.
    """
    text = bool(released.model.text_width)
    model = replace(released.model, convention=convention or ("released" if text else "paper"))
    config.validate_model(model)
    size = (1024 if text else 256) if image_size is None else image_size
    if size < model.patch_size or size % model.patch_size:
        raise InputError(f"--image-size = {size}: expected a multiple of the patch size {model.patch_size}")
    if text:
        sampling = config.preset("t2i-1024-ms" if size >= 1024 else "t2i-512").sampling
    else:
        sampling = (config.imagenet_512 if size >= 512 else config.imagenet_256)(model).sampling
    options = config.released_text() if model.convention == "released" else TextConfig()
    options = replace(options, max_tokens=model.text_tokens) if text else options
    classes = tuple(str(number) for number in range(model.num_classes))
    about = About(model, sampling, size, options, classes, released.ema, str(source), images_seen=0, generator="philox")
    return Weights(released.tensors, about)


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

"""Weights out of runs, checkpoints and exported folders, on one process and without DeepSpeed.

A ZeRO-2 checkpoint holds each rank's piece of one flat fp32 vector (masters, and beside them the EMA); the pieces are
put together here and cut into parameters. Files are read with torch's weights-only unpickler: nothing in them is run.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapix import checkpoint, config
from megapix.checkpoint import MODEL_NAME
from megapix.config import Config, ModelConfig, SamplingConfig
from megapix.errors import InputError
from megapix.model import PixelDiT
from megapix.optim import EMA
from megapix.shards import write_atomic

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Weights:
    """Weights and what is needed to use them."""

    tensors: dict[str, Tensor]
    """Parameters by name, float32."""
    model: ModelConfig
    sampling: SamplingConfig
    image_size: int
    classes: tuple[str, ...]
    ema: bool
    source: str


class _Inert:
    """Stands in for DeepSpeed's own classes in its files, none of which is needed to read weights."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def load_model(path: str | Path, ema: bool = True, device: str | torch.device = "cpu") -> PixelDiT:
    """The network of a run, a checkpoint or an exported folder, in eval mode, with float32 weights.

    Call it as net(x, t, y): x [B, 3, H, W] in [-1, 1], t [B] in [0, 1], y [B] class indices; it returns the velocity.

    Args:
        path: run folder (its latest checkpoint is taken), checkpoint folder, or exported folder.
        ema: the EMA weights, or the raw ones. An exported folder holds one kind.

    Raises:
        InputError: none of the three is at `path`, or the weights asked for are not in it.
    """
    return network(load_weights(path, ema), device)


def network(weights: Weights, device: str | torch.device = "cpu") -> PixelDiT:
    """The network that `weights` belong to, in eval mode; it takes the tensors over.

    Raises:
        InputError: tensors and configuration do not belong together.
    """
    with torch.device("meta"):
        net = PixelDiT(weights.model)
    _check_shapes(net, weights)
    net.load_state_dict(weights.tensors, assign=True)
    return net.to(device).eval().requires_grad_(False)


def load_weights(path: str | Path, ema: bool = True) -> Weights:
    """Read weights from a run, a checkpoint or an exported folder; errors as in `load_model`."""
    folder = checkpoint.find_weights(Path(path))
    if (folder / MODEL_NAME).is_file():
        return _read_export(folder, ema)
    state = checkpoint.read_state(folder)
    checkpoint.check_files(folder, state)
    tensors = _read_zero(folder, state, ema)
    c: Config = state.config
    return Weights(tensors, c.model, c.sampling, c.data.image_size, state.classes, ema, str(folder))


def assign(net: PixelDiT, weights: Weights) -> None:
    """Copy `weights` into `net`.

    Raises:
        InputError: names the first tensor that is missing, extra or of another shape.
    """
    _check_shapes(net, weights)
    net.load_state_dict(weights.tensors)


def _check_shapes(net: PixelDiT, weights: Weights) -> None:
    own = net.state_dict()
    for name in sorted(own.keys() | weights.tensors.keys()):
        here, there = (tuple(d[name].shape) if name in d else None for d in (own, weights.tensors))
        if here != there:
            raise InputError(f"{weights.source}: {name} has shape {there}, but the network needs {here}")


def export(weights: Weights, folder: Path) -> None:
    """Write an exported folder: `model.safetensors` (float32) and `config.json`, each whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{MODEL_NAME}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, temporary)
    os.replace(temporary, folder / MODEL_NAME)
    about = {
        "model": config.to_dict(weights.model),
        "sampling": config.to_dict(weights.sampling),
        "image_size": weights.image_size,
        "classes": list(weights.classes),
        "ema": weights.ema,
        "source": weights.source,
    }
    write_atomic(folder / CONFIG_NAME, (json.dumps(about, indent=1) + "\n").encode())


def _read_export(folder: Path, ema: bool) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / CONFIG_NAME
    try:
        about = json.loads(path.read_text())
        if not isinstance(about["image_size"], int):
            raise ValueError(f"image_size is {about['image_size']!r}, not a number of pixels")
        if about["ema"] != ema:
            kinds = {True: "EMA", False: "raw"}
            raise InputError(f"{folder} holds {kinds[about['ema']]} weights, but the {kinds[ema]} ones were asked for")
        return Weights(
            load_file(folder / MODEL_NAME),
            config.from_dict(ModelConfig, about["model"], str(path)),
            config.from_dict(SamplingConfig, about["sampling"], str(path)),
            about["image_size"],
            tuple(about["classes"]),
            ema,
            str(folder),
        )
    except SafetensorError as error:
        raise InputError(f"{folder / MODEL_NAME}: cannot be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}") from error


def _read_zero(folder: Path, state: checkpoint.State, ema: bool) -> dict[str, Tensor]:
    ranks = [_load(folder / _shard_name(state, rank))["optimizer_state_dict"] for rank in range(state.ranks)]
    shapes = _load(folder / "mp_rank_00_model_states.pt")["param_shapes"]
    tensors: dict[str, Tensor] = {}
    for group, names in enumerate(shapes):
        if ema:
            states = [rank["base_optimizer_state"]["state"].get(group, {}) for rank in ranks]
            if not all(EMA in s for s in states):
                raise InputError(f"{folder} holds no EMA yet: no step was applied before it was saved")
            pieces = [s[EMA] for s in states]
        else:
            pieces = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        flat, start = torch.cat(pieces), 0
        for name, shape in names.items():
            tensors[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
    return tensors


def _shard_name(state: checkpoint.State, rank: int) -> str:
    prefix = "bf16_" if state.config.precision == "bf16" else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _load(path: Path) -> dict[str, Any]:
    allowed: list[Any] = [(_Inert, name) for name in _DEEPSPEED_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: cannot be read as a checkpoint shard: {error}") from error

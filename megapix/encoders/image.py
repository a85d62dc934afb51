"""The frozen encoder that REPA aligns with: DINOv2, with or without registers, or DINOv3's ViT, through transformers.

It stands beside the trained network: no optimizer, EMA or checkpoint knows of it. It sees the clean images in [0, 1],
normalised as ImageNet's are and resized, bicubic, so that each of its patches covers 16 × 16 pixels of the image: for
the 14 × 14 patches of DINOv2 by 14/16, which gives the grid of a network with patches of 16.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megapix.encoders.hub import check_name, check_whole, library, named
from megapix.errors import InputError

PIXELS = 16
"""Pixels of a training image, on a side, that one of the encoder's patches covers."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of colours in [0, 1]."""
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""`model_type` of the encoders whose output is a class token, register tokens if they have them, and the patches."""

IDENTITY = ("model_type", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps", "rope_theta")
"""What its configuration says that the shapes of its weights do not."""

EXAMPLE = "facebook/dinov2-base"
"""DINOv2 ViT-B/14, the paper's encoder, on the hub."""


class Encoder:
    """A frozen encoder of images; `load` makes one.

    Args:
        model: a transformers model of one of KINDS.
        dtype: what it computes in; resizing is fp32, and features are returned in fp32.
        micro_batch: images that it sees at once; 0 is all.
    """

    def __init__(self, model: Any, dtype: Literal["bf16", "fp32"] = "fp32", micro_batch: int = 0) -> None:
        config = model.config
        self.digest = digest(model)
        self.width: int = config.hidden_size
        self.patch = _side(config.patch_size)
        self._skip = 1 + getattr(config, "num_register_tokens", 0)  # DINOv2's configuration knows no registers
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._model = model.eval().requires_grad_(False)
        for weight in self._model.parameters():  # not the buffers: DINOv3's angles of rotary positions want fp32
            weight.data = weight.data.to(self._dtype)
        self._micro_batch = micro_batch

    def to(self, device: torch.device) -> Encoder:
        """Move it to a device; returns itself."""
        self._model.to(device)
        return self

    def parameters(self) -> list[Tensor]:
        """Its weights, none of which is trained."""
        return list(self._model.parameters())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of each patch: uint8 images [B, 3, H, W] -> float32 [B, rows, columns, width]."""
        rows, columns = grid_of(*images.shape[-2:])
        parts = []
        for some in torch.split(images, self._micro_batch or len(images)):
            pixels = prepare(some, (rows * self.patch, columns * self.patch)).to(self._dtype)
            parts.append(self._model(pixel_values=pixels).last_hidden_state[:, self._skip :].float())
        return torch.cat(parts).view(len(images), rows, columns, self.width)


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the encoder's patches on an image of height × width pixels, the nearest whole numbers."""
    return max(1, (height + PIXELS // 2) // PIXELS), max(1, (width + PIXELS // 2) // PIXELS)


def prepare(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What the encoder is shown: uint8 [B, 3, H, W] -> float32 [B, 3, *size], normalised, then resized (bicubic)."""
    # Filled there: a tensor made of a list would be copied from the host, and the copy waited for.
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=images.device) for value in values]) for values in (MEAN, STD)
    )
    pixels = (images.float() / 255.0 - mean) / std
    return pixels if size == pixels.shape[-2:] else F.interpolate(pixels, size, mode="bicubic", align_corners=False)


def digest(model: Any) -> str:
    """SHA-256 of what an encoder computes with, its sizes and its weights in fp32, whatever file they came from."""
    sizes = [str(getattr(model.config, name, None)) for name in IDENTITY]
    hashed = hashlib.sha256(json.dumps(sizes).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.float().cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def load(name: str, dtype: Literal["bf16", "fp32"], micro_batch: int, option: str = "repa.encoder") -> Encoder:
    """The encoder in a local folder, or of a name on the Hugging Face hub, on the CPU; `option` is where it was named.

    Raises:
        InputError: no such folder or name, another kind of model, or weights that are not all there.
    """
    check_name(name, option, EXAMPLE)
    transformers = library()
    with named(name, option):
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in KINDS:
            raise InputError(f"{option} = {name!r} is of kind {config.model_type!r}: expected {', '.join(KINDS)}")
        model, loading = transformers.AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        encoder = Encoder(model, dtype, micro_batch)
    check_whole(loading, name, option)
    return encoder


def _side(patch_size: Any) -> int:
    """The side of a square patch; configurations give a number or two."""
    with suppress(TypeError):
        rows, columns = patch_size
        if rows != columns:
            raise InputError(f"the encoder has patches of {rows}x{columns} pixels: expected square ones")
        return int(rows)
    return int(patch_size)

"""The network's blocks on "cuda", in bf16, with inputs of a micro batch. Only within `FakeTensorMode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapix.config import ModelConfig
from megapix.model.attention import key_bias
from megapix.model.embed import images_of, rope_table, text_rope_table
from megapix.model.layers import FinalLayer, PatchBlock, PiTBlock
from megapix.model.pixeldit_t2i import MMDiTBlock

DEVICE = torch.device("cuda", 0)
BF16: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}


class Output(nn.Module):
    """The output layer, and what makes images of its colours, as `PixelDiT.output`."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.patch = model.patch_size
        self.final_layer = FinalLayer(model.pixel_width, 3)

    def forward(self, tokens: Tensor, like: Tensor) -> Tensor:
        return images_of(self.final_layer(tokens), like, self.patch)


@dataclass(frozen=True)
class Subject:
    """A block, and what it is called with."""

    block: nn.Module
    inputs: tuple[Any, ...]
    unit: int
    """Numbers of its stream: tokens × width."""


def on_device(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with bf16 weights on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


def subject(
    kind: str,
    model: ModelConfig,
    batch: int,
    size: tuple[int, int],
    tokens: int,
    masked: bool = False,
    fused: bool = False,
) -> Subject:
    """A block of the network: 'patch' (of classes or text, as the model says), 'last' of text, 'pit' or 'final'.

    Args:
        batch: images.
        size: height and width in pixels.
        tokens: of a caption, with text.
        masked: whether its attention has a mask.
        fused: whether a PiT block is the one on Triton's kernels.
    """
    rows, columns = (side // model.patch_size for side in size)
    L, P, D, d = rows * columns, model.patch_size**2, model.width, model.pixel_width
    pixels = _stream(batch * L, P, d)
    if kind == "final":
        image = torch.empty(batch, 3, *size, **BF16)
        return Subject(on_device(lambda: Output(model)), (pixels, image), pixels.numel())
    if kind == "pit":
        rope = rope_table(rows, columns, model.attention_width // model.attention_heads, DEVICE)
        return Subject(
            on_device(lambda: _pit_block(fused)(model)), (pixels, _stream(batch, L, D), rope), pixels.numel()
        )
    rope = rope_table(rows, columns, D // model.heads, DEVICE)
    x, c = _stream(batch, L, D), _stream(batch, 1, D)
    if not model.text_width:
        return Subject(on_device(lambda: PatchBlock(model)), (x, c, rope), x.numel())
    text, text_rope = _stream(batch, tokens, D), text_rope_table(tokens, D // model.heads, DEVICE)
    bias = key_bias(torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE), L, torch.bfloat16) if masked else None
    block = on_device(lambda: MMDiTBlock(model, last=kind == "last"))
    return Subject(block, (x, text, c, rope, text_rope, bias), x.numel() + text.numel())


def _stream(*shape: int) -> Tensor:
    return torch.empty(shape, **BF16).requires_grad_()


def _pit_block(fused: bool) -> type[PiTBlock]:
    if not fused:
        return PiTBlock
    from megapix.model.fused_block import FusedPiTBlock  # late: Triton

    return FusedPiTBlock

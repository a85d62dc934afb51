"""The PixelDiT network (arXiv 2511.20645): `build(ModelConfig)`, called as `net(x, t, y)` or `net(x, t, y, mask)`."""

from __future__ import annotations

from megapix.config import ModelConfig
from megapix.model.layers import PiTBlock
from megapix.model.pixeldit import PixelDiT
from megapix.model.pixeldit_t2i import TextPixelDiT
from megapix.model.projector import AlignedPixelDiT, AlignedTextPixelDiT, Alignment

__all__ = ["AlignedPixelDiT", "AlignedTextPixelDiT", "Alignment", "PixelDiT", "TextPixelDiT", "build"]


def build(config: ModelConfig, alignment: Alignment | None = None, pit_block: type[PiTBlock] = PiTBlock) -> PixelDiT:
    """The network of a configuration, conditioned on classes or text, with REPA's projector if it is to be aligned.

    Args:
        alignment: the block to align, and the width of the encoder's features; None builds no projector.
        pit_block: class of the pixel pathway's blocks, PiTBlock or `fused_block.FusedPiTBlock`.
    """
    if alignment:
        aligned = AlignedTextPixelDiT if config.text_width else AlignedPixelDiT
        return aligned(config, alignment, pit_block)
    return (TextPixelDiT if config.text_width else PixelDiT)(config, pit_block)

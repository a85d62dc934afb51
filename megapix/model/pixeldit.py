"""PixelDiT: patch pathway for semantics, pixel pathway for texture (section 3); here conditioned on a class.

The condition enters the network in four places, which a subclass replaces (`pixeldit_t2i.py`): the layers that
`add_condition` makes, what `embed` makes of it with them, and what `ready` and `through_blocks` do before and after.

What is not a block lies in four functions of tensors alone, `embed`, `pixel_condition`, `pixel_tokens` and `output`
(PARTS), so that each can be compiled as the blocks are (`engine/checkpointing.py`); tables come from outside.

Shape suffixes: B batch, C = 3 colours, L patches, P pixels of a patch, N = B·L, D patch width, d pixel width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megapix.config import ModelConfig
from megapix.model.door import time_inside, velocity_outside
from megapix.model.embed import (
    ClassEmbedder,
    PatchEmbedder,
    PixelEmbedder,
    TimestepEmbedder,
    images_of,
    patches_of,
    pixel_position_table,
    pixels_of,
    rope_table,
    timestep_frequencies,
)
from megapix.model.layers import FinalLayer, PatchBlock, PiTBlock, Rope

CHANNELS = 3
PARTS = ("embed", "pixel_condition", "pixel_tokens", "output")
"""The methods that are all of the network but its blocks, and REPA's projector."""


class PixelDiT(nn.Module):
    """Velocity of the rectified flow, straight in pixels.

    Args:
        config: sizes and the two choices (patch FFN, pixel modulation).
        pit_block: class of the pixel pathway's blocks, PiTBlock or `fused_block.FusedPiTBlock`.
    """

    def __init__(self, config: ModelConfig, pit_block: type[PiTBlock] = PiTBlock) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.s_embedder = PatchEmbedder(CHANNELS * patch * patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.add_condition(config)
        self.pixel_embedder = PixelEmbedder(CHANNELS, config.pixel_width)
        self.pixel_blocks = nn.ModuleList(pit_block(config) for _ in range(config.pixel_depth))
        self.final_layer = FinalLayer(config.pixel_width, CHANNELS)

    def add_condition(self, config: ModelConfig) -> None:
        """The class table, whose last row is the null class, and the patch blocks."""
        self.y_embedder: nn.Module = ClassEmbedder(config.num_classes, config.width)
        self.patch_blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.depth))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: noisy images [B, 3, H, W], any float dtype; H and W divisible by the patch size.
            t: time [B] float32 in [0, 1]; 0 is noise, 1 the image.
            y: class indices [B] int64; num_classes is the null class.

        Returns:
            Velocity [B, 3, H, W] in the dtype of the weights.

        Raises:
            ValueError: H or W is not divisible by the patch size.
        """
        return self.with_tokens(x, t, (y,), 0)[0]

    def with_tokens(
        self, x: Tensor, t: Tensor, condition: tuple[Tensor | None, ...], after: int
    ) -> tuple[Tensor, Tensor]:
        """The velocity as `forward`, and the patch tokens [B, L, D] after block number `after`, counted from 1.

        Args:
            condition: cond tensors, what `forward` takes after x and t.
        """
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"image size {height}x{width} is not divisible by the patch size {patch}")
        x = x.to(self.s_embedder.proj.weight.dtype)
        time = time_inside(t, self.config.convention, self.training)
        s, tokens = self.patch_pathway(x, time, condition, after)  # [B, L, D] each
        return velocity_outside(self.pixel_pathway(x, s), self.config.convention), tokens  # [B, C, H, W], [B, L, D]

    def patch_pathway(
        self, x: Tensor, t: Tensor, condition: tuple[Tensor | None, ...], after: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Semantics: attention and FFN over patches; returns the pixel pathway's condition [B, L, D], and the tokens
        [B, L, D] after block number `after`, counted from 1; 0 gives those before the first."""
        c = self.config
        s, t_emb, *told = self.embed(x, t, timestep_frequencies(t.device), *self.ready(condition))
        tokens, blocks = s, self.through_blocks(s, self._rope(x, c.width // c.heads), *told)
        for number, s in enumerate(blocks, 1):
            tokens = s if number == after else tokens
        return self.pixel_condition(s, t_emb), tokens  # [B, L, D] each

    def ready(self, condition: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The condition in the shape that `embed` takes it."""
        return condition

    def embed(self, x: Tensor, t: Tensor, frequencies: Tensor, *condition: Tensor | None) -> tuple[Any, ...]:
        """Embedded patches [B, L, D] and time [B, 1, D], and what the blocks are told of the condition: c [B, 1, D].

        Args:
            frequencies: `timestep_frequencies` of the device.
        """
        (y,) = condition
        s, t_emb = self._embedded(x, t, frequencies)
        return s, t_emb, F.silu(t_emb + self.y_embedder(y)[:, None])

    def _embedded(self, x: Tensor, t: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        patches = patches_of(x, self.config.patch_size)
        return self.s_embedder(patches), self.t_embedder(t, frequencies)[:, None]  # [B, L, D], [B, 1, D]

    def through_blocks(self, s: Tensor, rope: Rope, *told: Any) -> Iterator[Tensor]:
        """The patch tokens [B, L, D] after each block, which are told what `embed` has made of the condition."""
        for block in self.patch_blocks:
            s = block(s, *told, rope)  # [B, L, D]
            yield s

    def pixel_condition(self, s: Tensor, t_emb: Tensor) -> Tensor:
        """What the pixel pathway is told: [B, L, D]."""
        return F.silu(t_emb + s)

    def _rope(self, x: Tensor, head_dim: int) -> Rope:
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        return rope_table(rows, columns, head_dim, x.device)

    def pixel_pathway(self, x: Tensor, s: Tensor) -> Tensor:
        """Texture: every pixel a token, conditioned on its patch's s [B, L, D]; returns the velocity [B, C, H, W]."""
        patch, (height, width), c = self.config.patch_size, x.shape[-2:], self.config
        rope = self._rope(x, c.attention_width // c.attention_heads)
        positions = pixel_position_table(height, width, patch, c.pixel_width, x.device, x.dtype)
        tokens = self.pixel_tokens(x, positions)  # [N, P, d]
        for block in self.pixel_blocks:
            tokens = block(tokens, s, rope)  # [N, P, d]
        return self.output(tokens, x)

    def pixel_tokens(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embedded pixels with their positions [L, P, d]: [N, P, d]."""
        return (self.pixel_embedder(pixels_of(x, self.config.patch_size)) + positions).flatten(0, 1)

    def output(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The velocity from the last block's pixel tokens [N, P, d]: [B, C, H, W], of the size of `like`."""
        return images_of(self.final_layer(tokens), like, self.config.patch_size)

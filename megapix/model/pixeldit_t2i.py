"""PixelDiT-T2I: the patch pathway attends to text in MM-DiT blocks; everything else is PixelDiT.

Text reaches only the patch pathway, as tokens of a second stream; the condition of every block is the time alone.

Shape suffixes: B batch, L patches, T text tokens, D patch width, H heads, h channels of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapix.config import ModelConfig
from megapix.model.attention import attention, key_bias
from megapix.model.embed import TextEmbedder, text_rope_table
from megapix.model.layers import RMSNorm, Rope, patch_mlp, projected, zero_linear
from megapix.model.pixeldit import PixelDiT

TOKENS_AT_ONCE = 64
"""Masked text is padded to a multiple of it, where it is padded at all: to 5 lengths of at most 300 tokens."""


class TextPixelDiT(PixelDiT):
    """Velocity of the rectified flow, conditioned on text features."""

    few_lengths = False
    """Whether masked text is padded to few lengths on CPUs, too: where blocks are compiled."""

    def add_condition(self, config: ModelConfig) -> None:
        """Embedder and learned positions of the text, and the MM-DiT blocks."""
        self.y_embedder = TextEmbedder(config.text_width, config.width)
        self.most_tokens = config.text_tokens  # of a caption: text is not padded beyond
        self.y_pos_embedding = nn.Parameter(torch.randn(1, config.text_tokens, config.width))
        blocks = (MMDiTBlock(config, last=number == config.depth) for number in range(1, config.depth + 1))
        self.patch_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the velocity.

        Args:
            x: noisy images [B, 3, H, W], any float dtype; H and W divisible by the patch size.
            t: time [B] float32 in [0, 1]; 0 is noise, 1 the image.
            y: text features [B, T, C_text], any float dtype; T at most `text_tokens`.
            mask: bool [B, T], true where a token is real; None if all are. What stands at the others changes nothing.

        Returns:
            Velocity [B, 3, H, W] in the dtype of the weights.

        Raises:
            ValueError: H or W is not divisible by the patch size, or more tokens than positions.
        """
        return self.with_tokens(x, t, (y, mask), 0)[0]

    def ready(self, condition: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Features and mask (or None) of text, padded to one of few lengths where each length costs something: on GPUs,
        where attention plans and allocates for it, and where blocks are compiled. What is padded is masked out.

        Raises:
            ValueError: more tokens than positions.
        """
        y, mask = (*condition, None)[:2]
        assert y is not None, "text features"
        tokens = y.shape[1]
        if tokens > self.config.text_tokens:
            raise ValueError(f"{tokens} text tokens: the position table has {self.config.text_tokens} rows")
        if mask is None or not (self.few_lengths or y.is_cuda):
            return y, mask
        most = max(tokens, self.most_tokens)
        missing = min(-(-tokens // TOKENS_AT_ONCE) * TOKENS_AT_ONCE, most) - tokens
        return (F.pad(y, (0, 0, 0, missing)), F.pad(mask, (0, missing))) if missing else (y, mask)

    def embed(self, x: Tensor, t: Tensor, frequencies: Tensor, *condition: Tensor | None) -> tuple[Any, ...]:
        """Embedded patches [B, L, D] and time [B, 1, D], and what the blocks are told: the text [B, T, D], c [B, 1, D],
        and the bias [B, 1, 1, T + L] of attention, None without a mask."""
        y, mask = condition
        assert y is not None, "text features"
        s, t_emb = self._embedded(x, t, frequencies)
        bias = None
        if mask is not None:
            y = y.where(mask[..., None], 0)  # whatever stands there, not even a NaN may come through
            bias = key_bias(mask, s.shape[1], s.dtype)
        text = self.y_embedder(y.to(s.dtype)) + self.y_pos_embedding[:, : y.shape[1]]  # [B, T, D]
        return s, t_emb, text, F.silu(t_emb), bias

    def through_blocks(self, s: Tensor, rope: Rope, *told: Any) -> Iterator[Tensor]:
        """The patch tokens [B, L, D] after each block."""
        text, c, bias = told
        table = text_rope_table(self.config.text_tokens, self.config.width // self.config.heads, s.device)
        text_rope = table[0][: text.shape[1]], table[1][: text.shape[1]]
        for block in self.patch_blocks:
            s, text = block(s, text, c, rope, text_rope, bias)  # [B, L, D], [B, T, D]
            yield s


class JointAttention(nn.Module):
    """Attention over text and image tokens together, text first; each stream has its own projections and norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.sdpa = heads, "auto"
        head = width // heads
        self.qkv_x, self.qkv_y = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))  # image, text
        self.q_norm_x, self.k_norm_x = RMSNorm(head), RMSNorm(head)
        self.q_norm_y, self.k_norm_y = RMSNorm(head), RMSNorm(head)
        self.proj_x, self.proj_y = (nn.Linear(width, width) for _ in range(2))

    def forward(
        self, x_BLD: Tensor, y_BTD: Tensor, rope: Rope, text_rope: Rope, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attended image and text tokens, before `proj_x` and `proj_y`."""
        image = projected(x_BLD, self.qkv_x, self.q_norm_x, self.k_norm_x, rope, self.heads)  # [B, L, H, h] each
        text = projected(y_BTD, self.qkv_y, self.q_norm_y, self.k_norm_y, text_rope, self.heads)  # [B, T, H, h] each
        q, k, v = (torch.cat(pair, 1) for pair in zip(text, image, strict=True))  # [B, T + L, H, h]
        out, tokens = attention(q, k, v, bias, self.sdpa), y_BTD.shape[1]  # [B, T + L, D]
        return out[:, tokens:], out[:, :tokens]


class MMDiTBlock(nn.Module):
    """MM-DiT block: two streams with norms, FFN and adaLN-Zero of their own, and joint attention.

    [B, L, D], [B, T, D] -> the same. After the last block nobody reads the text: it comes back as it went in, and
    `attn.q_norm_y`, `attn.proj_y`, `norm_y2` and `mlp_y`, which the released weights have there too, change nothing.
    """

    def __init__(self, config: ModelConfig, last: bool) -> None:
        super().__init__()
        width = config.width
        self.last = last
        self.norm_x1, self.norm_y1 = RMSNorm(width), RMSNorm(width)
        self.attn = JointAttention(width, config.heads)
        self.norm_x2, self.norm_y2 = RMSNorm(width), RMSNorm(width)
        self.mlp_x, self.mlp_y = patch_mlp(config), patch_mlp(config)
        self.adaLN_modulation_img = nn.Sequential(zero_linear(width, 6 * width))
        self.adaLN_modulation_txt = nn.Sequential(zero_linear(width, 6 * width))

    def forward(
        self, x_BLD: Tensor, y_BTD: Tensor, c_B1D: Tensor, rope: Rope, text_rope: Rope, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = self.adaLN_modulation_img(c_B1D).chunk(6, dim=-1)
        y_shift1, y_scale1, y_gate1, y_shift2, y_scale2, y_gate2 = self.adaLN_modulation_txt(c_B1D).chunk(6, dim=-1)
        x_normed = self.norm_x1.modulated(x_BLD, x_shift1, x_scale1)  # [B, L, D]
        y_normed = self.norm_y1.modulated(y_BTD, y_shift1, y_scale1)  # [B, T, D]
        x_attended, y_attended = self.attn(x_normed, y_normed, rope, text_rope, bias)
        x_BLD = torch.addcmul(x_BLD, x_gate1, self.attn.proj_x(x_attended))
        x_BLD = torch.addcmul(x_BLD, x_gate2, self.mlp_x(self.norm_x2.modulated(x_BLD, x_shift2, x_scale2)))
        if not self.last:
            y_BTD = torch.addcmul(y_BTD, y_gate1, self.attn.proj_y(y_attended))
            y_BTD = torch.addcmul(y_BTD, y_gate2, self.mlp_y(self.norm_y2.modulated(y_BTD, y_shift2, y_scale2)))
        return x_BLD, y_BTD

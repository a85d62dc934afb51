"""Embedders of images, timesteps, classes and text, and the position tables.

Shape suffixes: B batch, L patches, P pixels of a patch, D patch width, d pixel width, h channels of one head.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from megapix.model.layers import RMSNorm, narrow_linear

TIMESTEP_CHANNELS = 256
TIMESTEP_MAX_PERIOD = 10.0
"""t lies in [0, 1], so the slowest sinusoid has period 10 (the authors' configuration), not DiT's 10,000."""
ROPE_THETA = 10_000.0
SIZES = 256
"""Sizes of images whose tables are kept: more than there are aspect buckets (docs/data.md)."""
ROPE_EXTENT = 16.0
"""Patch positions run from 0 to 16 on each axis whatever the resolution."""


def patches_of(x: Tensor, patch: int) -> Tensor:
    """Images as patches, row-major: [B, C, H, W] -> [B, L, C·P], channels first."""
    images, channels, height, width = x.shape
    grid = x.reshape(images, channels, height // patch, patch, width // patch, patch)  # [B, C, r, i, q, j]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixels_of(x: Tensor, patch: int) -> Tensor:
    """The same, pixel by pixel: [B, C, H, W] -> [B, L, P, C]."""
    images, channels, height, width = x.shape
    grid = x.reshape(images, channels, height // patch, patch, width // patch, patch)  # [B, C, r, i, q, j]
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def images_of(pixels_NPC: Tensor, like: Tensor, patch: int) -> Tensor:
    """Images from the pixels of `pixels_of`, [B·L, P, C] -> [B, C, H, W], of the size of `like`."""
    images, height, width = len(like), like.shape[2] // patch, like.shape[3] // patch
    grid = pixels_NPC.reshape(images, height, width, patch, patch, -1)  # [B, r, q, i, j, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbedder(nn.Module):
    """One linear layer from a flattened patch to the patch width (section 3.1): [B, L, C·P] -> [B, L, D]."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, width)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches_BLK: Tensor) -> Tensor:
        return self.proj(patches_BLK)  # [B, L, D]


class PixelEmbedder(nn.Module):
    """Every pixel is a token: one linear layer from its colour to the pixel width, [B·L, P, C] -> [B·L, P, d]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width)

    def forward(self, pixels_NPC: Tensor) -> Tensor:
        return narrow_linear(self.proj, pixels_NPC)  # [B·L, P, d]


class TimestepEmbedder(nn.Module):
    """Sinusoids of t in fp32, then Linear, SiLU, Linear: t [B] in [0, 1] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(TIMESTEP_CHANNELS, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(second.weight, std=0.02)

    def forward(self, t_B: Tensor, frequencies: Tensor | None = None) -> Tensor:
        """`frequencies` is `timestep_frequencies` of the device; a compiled graph would make that table again."""
        table = timestep_frequencies(t_B.device) if frequencies is None else frequencies
        angle = t_B.float()[:, None] * table  # [B, 128]
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1)  # [B, 256]
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoids.to(dtype))  # [B, D]


class ClassEmbedder(nn.Module):
    """A table of num_classes + 1 rows; the last is the null class for guidance: y [B] -> [B, D]."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)  # [B, D]


class TextEmbedder(nn.Module):
    """RMSNorm(linear(y)) of text features of C_text channels: y [B, T, C_text] -> [B, T, D]."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, width)
        self.norm = RMSNorm(width)

    def forward(self, y_BTC: Tensor) -> Tensor:
        return self.norm(self.proj(y_BTC))  # [B, T, D]


# ---------------------------------------------------------------------------------------------------------------------
# Position tables: fp32, computed once for a size and device, never inside a step
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def timestep_frequencies(device: torch.device) -> Tensor:
    """Frequencies 10^(-k/128), k = 0..127: [128] float32."""
    half = TIMESTEP_CHANNELS // 2
    k = torch.arange(half, dtype=torch.float64)
    return torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * k / half).float().to(device)


@lru_cache(maxsize=SIZES)
def rope_table(rows: int, cols: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2D rotary angles of a rows × cols grid of patches, each [L, head_dim / 2] float32.

    Pair 2k is rotated by x·f_k and pair 2k+1 by y·f_k, f_k = 10000^(-4k/head_dim), x the column and y the row position,
    both `linspace(0, 16, n)`; patches row-major.
    """
    k = torch.arange(head_dim // 4, dtype=torch.float64)
    frequency = ROPE_THETA ** (-4.0 * k / head_dim)  # [h/4]
    y = torch.linspace(0.0, ROPE_EXTENT, rows, dtype=torch.float64)
    x = torch.linspace(0.0, ROPE_EXTENT, cols, dtype=torch.float64)
    y_L, x_L = (grid.flatten() for grid in torch.meshgrid(y, x, indexing="ij"))
    angle = torch.stack([x_L[:, None] * frequency, y_L[:, None] * frequency], dim=-1).flatten(1)  # [L, h/2]
    return angle.cos().float().to(device), angle.sin().float().to(device)


@lru_cache(maxsize=8)
def text_rope_table(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of text positions 0, 1, 2, …, each [T, head_dim / 2] float32.

    Pair k is rotated by position·f_k, f_k = 10000^(-2k/head_dim). A caption's are the first rows of the longest one's.
    """
    k = torch.arange(head_dim // 2, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * ROPE_THETA ** (-2.0 * k / head_dim)  # [T, h/2]
    return angle.cos().float().to(device), angle.sin().float().to(device)


@lru_cache(maxsize=SIZES)
def pixel_position_table(
    height: int, width: int, patch: int, channels: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fixed 2D sin-cos positions of all pixels, by patch like the pixel tokens: [L, P, d], rounded from float32.

    The first d/2 channels use the column, the rest the row (integers from 0); in each half d/4 sines, then d/4
    cosines, with frequencies 10000^(-k/(d/4)).
    """
    quarter = channels // 4
    k = torch.arange(quarter, dtype=torch.float64)
    frequency = 10_000.0 ** (-k / quarter)

    def axis(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # [n, d/2]

    cols = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    table = torch.cat([cols, rows], dim=-1)  # [H, W, d]
    table = rearrange(table, "(r i) (q j) d -> (r q) (i j) d", i=patch, j=patch)
    return table.float().contiguous().to(device, dtype)

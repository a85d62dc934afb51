"""PixelDiT with REPA's projector: the network of a run that aligns patch tokens with a frozen encoder's features.

The projector is a part of the network, so it is trained, sharded and saved with it; its names come last and begin with
PROJECTOR, so what needs the velocity alone (sampling, exported models) leaves it out.

Shape suffixes: B batch, L patches, G cells of the encoder's grid, D patch width, F width of the encoder's features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapix.config import ModelConfig
from megapix.model.layers import PiTBlock
from megapix.model.pixeldit import PixelDiT
from megapix.model.pixeldit_t2i import TextPixelDiT

PROJECTOR = "projector."
"""Beginning of the names of the projector's parameters."""


@dataclass(frozen=True)
class Alignment:
    """Which patch tokens the projector takes, and the features that it is aligned with."""

    layer: int
    """Patch block, counted from 1, after which it takes the tokens."""
    features: int
    """Width of the encoder's features (F)."""


class _Aligned(PixelDiT):
    """A network with a three-layer SiLU projector (D → D → D → F) on the tokens after one of its patch blocks."""

    def __init__(self, config: ModelConfig, alignment: Alignment, pit_block: type[PiTBlock] = PiTBlock) -> None:
        super().__init__(config, pit_block)
        self.layer = alignment.layer
        width = config.width
        # Made last: the network's own initial weights are those that it has without it.
        self.projector = nn.Sequential(
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, alignment.features),
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, *condition: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity [B, 3, H, W] as without the projector; with the encoder's grid (rows, columns) also the
        projected tokens [B, G, F], brought to that grid."""
        if grid is None:
            return super().forward(x, t, *condition)
        velocity, tokens_BLD = self.with_tokens(x, t, condition, self.layer)
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        tokens_BGD = regrid(tokens_BLD, (height // patch, width // patch), grid)
        return velocity, self.project(tokens_BGD)  # [B, C, H, W], [B, G, F]

    def project(self, tokens_BGD: Tensor) -> Tensor:
        """The projector, by a name that can be compiled as the network's other parts: [B, G, D] -> [B, G, F]."""
        return self.projector(tokens_BGD)


class AlignedPixelDiT(_Aligned, PixelDiT):
    """PixelDiT with REPA's projector."""


class AlignedTextPixelDiT(_Aligned, TextPixelDiT):  # type: ignore[misc]
    """PixelDiT-T2I with REPA's projector."""


def regrid(tokens_BLD: Tensor, have: tuple[int, int], want: tuple[int, int]) -> Tensor:
    """Tokens of a grid of `have` (rows, columns) on one of `want`: [B, L, D] -> [B, G, D], row-major.

    A larger grid is averaged over the cells of the smaller one (`adaptive_avg_pool2d`), a smaller one interpolated
    bilinearly, both in fp32. torch's average has no deterministic backward on GPUs: where that is asked for, it is two
    products with matrices of weights.
    """
    if have == want:
        return tokens_BLD
    image = tokens_BLD.transpose(1, 2).reshape(len(tokens_BLD), -1, *have).float()  # [B, D, rows, columns]
    if have[0] >= want[0] and have[1] >= want[1]:
        image = _averaged(image, want) if _exactly(image) else F.adaptive_avg_pool2d(image, want)
    else:
        image = F.interpolate(image, want, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(tokens_BLD.dtype)


def _exactly(image: Tensor) -> bool:
    return image.is_cuda and torch.are_deterministic_algorithms_enabled()


def _averaged(image: Tensor, want: tuple[int, int]) -> Tensor:
    """`adaptive_avg_pool2d` by matrices [want, have] of rows and columns: cell i of n takes those from floor(i·have/n)
    to ceil((i + 1)·have/n), each with the same weight."""
    matrices = []
    for have, cells in zip(image.shape[-2:], want, strict=True):
        place, cell = torch.arange(have, device=image.device), torch.arange(cells, device=image.device)[:, None]
        taken = (place >= cell * have // cells) & (place < -(-(cell + 1) * have // cells))
        matrices.append(taken.to(image.dtype) / taken.sum(1, keepdim=True))
    return matrices[0] @ image @ matrices[1].T

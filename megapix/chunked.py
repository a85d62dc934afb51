"""A PiT block some patches at a time: the modulation and the MLP of all pixels at once are a block's largest tensors.

All that a PiT block does beside attention it does to each pixel by itself. So the part before attention and the part
after it keep their inputs alone, and both passes take a chunk of patches from the input to the output, or from the
output's gradient to the input's, before the next. Attention keeps what autograd saves; it is not computed again.

Each part takes its columns of the modulation, so none is computed twice in a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megapix.config import CHUNK
from megapix.model.layers import FinalLayer, PiTBlock, Rope, wide

Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def chunked(block: nn.Module, wrap: Wrap) -> Callable[..., Tensor]:
    """The `forward` of a PiT block or the output layer in chunks.

    Args:
        wrap: what becomes of each part of it: torch.compile, or nothing.
    """
    if isinstance(block, FinalLayer):
        return _Part(wrap(MethodType(FinalLayer.forward, block)), 1, list(block.parameters()))
    assert isinstance(block, PiTBlock)
    before = _Part(wrap(MethodType(_before, block)), 1 if block.post else 2, [block.norm1.weight])
    after = _Part(wrap(MethodType(_after, block)), 3, [block.norm2.weight, *block.mlp.parameters()])
    attend = wrap(MethodType(PiTBlock.attend, block))

    def forward(x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        s_ND = s_BLD.flatten(0, 1)
        *first, second = zip(*(_columns(block, p) for p in block.adaLN_modulation[0].parameters()), strict=True)
        normed = before(x_NPd, s_ND, *first[0]) if first else before(x_NPd)  # [N, P, d]
        return after(x_NPd, attend(normed, s_BLD, rope), s_ND, *second)  # [N, P, d]

    return forward


def _columns(block: PiTBlock, parameter: Tensor) -> tuple[Tensor, ...]:
    """Of the modulation's weight or bias [P·chunks·d, …]: those for the part before attention, if it has any, and those
    for the part after it, [P, chunks of it, d, …] each."""
    columns = parameter.view(-1, block.chunks, block.norm1.weight.shape[0], *parameter.shape[1:])
    return columns.split((4,) if block.post else (2, 4), 1)  # type: ignore[no-untyped-call]


def _modulation(x: Tensor, s_ND: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    columns = F.linear(s_ND, weight.flatten(0, 2), bias.flatten())
    return columns.view(*x.shape[:-1], -1).chunk(weight.shape[1], dim=-1)  # [N, P, d] each


def _before(block: PiTBlock, x_NPd: Tensor, *modulation: Tensor) -> Tensor:
    return block.before(x_NPd, *(_modulation(x_NPd, *modulation) if modulation else ()))


def _after(block: PiTBlock, x_NPd: Tensor, attended_NPd: Tensor, *modulation: Tensor) -> Tensor:
    return block.after(x_NPd, attended_NPd, *_modulation(x_NPd, *modulation))


@dataclass(frozen=True)
class _Part:
    """A function whose first `rows` tensors, and whose result, have a row for each patch; of the others it needs all.

    Beside them it reads the parameters `own`.
    """

    run: Callable[..., Tensor]
    rows: int
    own: list[nn.Parameter]

    def __call__(self, *tensors: Tensor) -> Tensor:
        return _InChunks.apply(self, *tensors, *self.own)  # type: ignore[no-untyped-call]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: _Part, *tensors: Tensor) -> Tensor:
        ctx.part = part
        tensors = tensors[: len(tensors) - len(part.own)]
        ctx.save_for_backward(*tensors)
        rows, others = tensors[: part.rows], [t.contiguous() for t in tensors[part.rows :]]
        return torch.cat([part.run(*chunk, *others) for chunk in _cut(rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part, tensors = ctx.part, ctx.saved_tensors
        rows, others = tensors[: part.rows], [_leaf(t.contiguous()) for t in tensors[part.rows :]]
        whole = [*others, *part.own]
        d_rows = [torch.empty_like(t) for t in rows]
        d_whole = [torch.zeros_like(wide(t.detach())) for t in whole]  # chunks are added up in fp32
        for (g,), d_chunk, chunk in zip(_cut(grads), _cut(d_rows), _cut(rows), strict=True):
            leaves = [_leaf(t) for t in chunk]
            with torch.enable_grad():
                out = part.run(*leaves, *others)
            found = torch.autograd.grad(out, [*leaves, *whole], g)
            for d, t in zip(d_chunk, found, strict=False):
                d.copy_(t)
            for d, t in zip(d_whole, found[part.rows :], strict=True):
                d.add_(t)
        return (None, *d_rows, *(d.to(t.dtype) for d, t in zip(d_whole, whole, strict=True)))


def _cut(rows: Any) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(CHUNK) for t in rows), strict=True))


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()

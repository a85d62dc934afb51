"""A PiT block in chunks of patches: the modulation and the MLP of all pixels at once are its largest tensors.

Beside attention a PiT block treats each pixel by itself. So the part before attention and the part after it keep only
their inputs, and both passes take a chunk of patches from input to output, or from the output's gradient to the
input's, before the next. Attention keeps what autograd saves and is not recomputed.

Each part computes only the columns of the modulation that it needs, and none is computed by both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megapix.config import CHUNK
from megapix.model.layers import FinalLayer, PiTBlock, Rope, wide

Run = Callable[..., Tensor]
Wrap = Callable[[Run], Run]


def chunked(block: nn.Module, wrap: Wrap) -> Run:
    """The `forward` of a PiT block or the output layer in chunks.

    Args:
        wrap: applied to each part: torch.compile, or the identity.
    """
    return MethodType(_output_layer(wrap) if isinstance(block, FinalLayer) else _pit_block(wrap), block)


def _output_layer(wrap: Wrap) -> Run:
    run = wrap(FinalLayer.forward)

    def forward(layer: FinalLayer, x_NPd: Tensor) -> Tensor:
        return _in_chunks(partial(run, layer), [x_NPd], [], [*layer.parameters()])  # [N, P, C]

    return forward


def _pit_block(wrap: Wrap) -> Run:
    before, attend, after = wrap(_before), wrap(PiTBlock.attend), wrap(_after)

    def forward(block: PiTBlock, x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        s_ND = s_BLD.flatten(0, 1)
        if block.adaLN_modulation._forward_hooks:  # its norms are logged (`monitoring/block_norms.py`)
            with torch.no_grad():
                for start in range(0, len(s_ND), CHUNK):
                    block.adaLN_modulation(s_ND[start : start + CHUNK])
        weight, bias = block.adaLN_modulation.parameters()
        *first, second = zip(_columns(block, weight), _columns(block, bias), strict=True)
        rows = [x_NPd, s_ND] if first else [x_NPd]
        normed = _in_chunks(partial(before, block), rows, [t for two in first for t in two], [block.norm1.weight])
        rows = [x_NPd, attend(block, normed, s_BLD, rope), s_ND]  # [N, P, d], [N, P, d], [N, D]
        own = [block.norm2.weight, *block.mlp.parameters()]
        return _in_chunks(partial(after, block), rows, second, own)  # [N, P, d]

    return forward


def _columns(block: PiTBlock, parameter: Tensor) -> tuple[Tensor, ...]:
    """The modulation's weight or bias [P·chunks·d, …], split into the columns for the part before attention, if it has
    any, and those for the part after it: [P, chunks of it, d, …] each."""
    columns = parameter.view(-1, block.chunks, block.norm1.weight.shape[0], *parameter.shape[1:])
    return columns.split((4,) if block.post else (2, 4), 1)  # type: ignore[no-untyped-call]


def _modulation(x: Tensor, s_ND: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    columns = F.linear(s_ND, weight.flatten(0, 2), bias.flatten())
    return columns.view(*x.shape[:-1], -1).chunk(weight.shape[1], dim=-1)  # [N, P, d] each


def _before(block: PiTBlock, x_NPd: Tensor, *modulation: Tensor) -> Tensor:
    return block.before(x_NPd, *(_modulation(x_NPd, *modulation) if modulation else ()))


def _after(block: PiTBlock, x_NPd: Tensor, attended_NPd: Tensor, *modulation: Tensor) -> Tensor:
    return block.after(x_NPd, attended_NPd, *_modulation(x_NPd, *modulation))


def _in_chunks(run: Run, rows: Any, others: Any, own: Any) -> Tensor:
    """`run` on a chunk of rows at a time; only its inputs are kept for backward.

    Args:
        run: its result has one row per patch.
        rows: its first arguments, with one row per patch.
        others: its other arguments, which every chunk needs whole.
        own: parameters that it reads besides.
    """
    return _InChunks.apply(run, len(rows), len(own), *rows, *others, *own)  # type: ignore[no-untyped-call]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, rows: int, own: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.rows, ctx.own = run, rows, tensors[len(tensors) - own :]
        ctx.save_for_backward(*tensors[: len(tensors) - own])
        tensors = tuple(t.detach() for t in tensors[: len(tensors) - own])  # a compiled part is one for all that ask
        others = [t.contiguous() for t in tensors[rows:]]
        starts = range(0, len(tensors[0]), CHUNK)
        return torch.cat([run(*(t[n : n + CHUNK] for t in tensors[:rows]), *others) for n in starts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, rows, needed = ctx.saved_tensors, ctx.rows, ctx.needs_input_grad[3:]
        whole = [*(_leaf(t.contiguous(), need) for t, need in zip(saved[rows:], needed[rows:], strict=False)), *ctx.own]
        others = whole[: len(saved) - rows]
        totals = [torch.empty_like(t) for t in saved[:rows]]
        totals += [torch.zeros(t.shape, dtype=wide(t[:0]).dtype, device=t.device) for t in whole]
        for start in range(0, len(grads[0]), CHUNK):
            here = slice(start, start + CHUNK)
            cut = [_leaf(t[here], need) for t, need in zip(saved[:rows], needed, strict=False)]
            with torch.enable_grad():
                out = ctx.run(*cut, *others)
            wanted = [t for t in (*cut, *whole) if t.requires_grad]
            gradients = iter(torch.autograd.grad(out, wanted, grads[0][here]))
            for number, total in enumerate(totals):
                if needed[number] and number < rows:
                    total[here] = next(gradients)
                elif needed[number]:
                    total += next(gradients)  # of all chunks, in fp32
            del out, gradients  # before the next chunk's are made
        tensors = zip(totals, (*saved[:rows], *whole), needed, strict=True)
        return None, None, None, *(total.to(t.dtype) if need else None for total, t, need in tensors)


def _leaf(t: Tensor, need: bool) -> Tensor:
    return t.detach().requires_grad_(need)

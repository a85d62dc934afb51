"""The PiT block on Triton kernels: one kernel before its attention, another after it.

Two custom operations with a backward each (`pixel_kernels.py`), which torch.compile and activation checkpointing see as
four opaque operations of the namespace megapix.

Autograd adds up the gradients of a tensor with two readers: the tail's and the norm's shares of the stream x, and
their disjoint columns of the modulation, which is six times as large. Here they are passed on instead. The norm returns
x and the modulation beside its output, and only the tail reads these; so the norm's backward, which comes last, is
given the tail's gradients of both. It adds its share of x in its own kernel, and writes its columns of the modulation
into the tensor that the tail's backward has made and left them open in. Nothing is filled with zeros, copied or added.

Shape suffixes: B batch, L patches, P pixels of a patch, N = B·L, D patch width, d pixel width, M chunks·d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megapix.model import pixel_kernels
from megapix.model.layers import EPS, PiTBlock, Rope

NORM_BLOCK = 128
"""Rows that a program of the norm's kernels takes at once."""
TAIL_BLOCK = 32
"""The same of the tail's forward kernel."""
TAIL_BACKWARD_BLOCK = {2: 32, 4: 16}
"""The same of its backward kernel, by the bytes of a number: it holds more of a row, and in bf16 twice as many overflow
a thread's registers by 600 bytes."""
SUMS_BLOCK = {"ROWS": 256, "COLUMNS": 16}
"""Rows and columns of `sums` that a program of `add_rows` takes at once."""
COMPILED = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
"""How Triton compiles each kernel: two stages, so that the next block of rows is fetched while one is computed."""
TAIL_COMPILED = COMPILED | {"num_warps": 2}
"""The same of the tail's forward kernel: a warp has 16 rows, the height of a matmul on tensor cores, to itself. Fewer
than four warps also keep a Hopper's and a Blackwell's matmuls of whole warp groups, made for larger ones, out of it."""
TAIL_BACKWARD_COMPILED = {2: TAIL_COMPILED | {"num_stages": 3}, 4: COMPILED}
"""The same of its backward kernel, by the bytes of a number. With four warps each would compute a neighbour's rows once
more, with one it had no registers for the sums. As two have room for eight warps on a multiprocessor only, two blocks
of rows are on their way while one is computed."""
PROGRAMS = 2048
"""Programs of a backward kernel at most, each with a row of sums to be added: a constant, so that the order of a sum
is the same on every device. About four times as many as run at once, so that none waits long for the last."""


def _check(x: Tensor, modulation: Tensor, chunks: int, *others: Tensor) -> None:
    """Kernels read by address, so what is not as they expect must not reach them."""
    width = x.shape[-1]
    if modulation.shape != (*x.shape[:-1], chunks * width):
        raise ValueError(f"modulation {tuple(modulation.shape)}: expected {chunks} chunks for x {tuple(x.shape)}")
    if width < 16 or width & (width - 1):
        raise ValueError(f"pixel width {width}: expected a power of two, at least 16")
    for tensor in (modulation, *others):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{tensor.dtype} on {tensor.device} beside x of {x.dtype} on {x.device}")


def _blocks(x: Tensor, block: int) -> int:
    return triton.cdiv(x.numel() // x.shape[-1], block)


def _launch(kernel: Any, programs: int, *tensors: Tensor, **constants: int) -> None:
    """Run a kernel on the device of its tensors, the first of which has a row for each pixel."""
    width = tensors[0].shape[-1]
    rows = tensors[0].numel() // width
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*tensors, rows, EPS=EPS, D=width, **(COMPILED | constants))


def _added(sums: Tensor) -> Tensor:
    """The sum of the rows of [programs, columns], fp32, in the order of `add_rows`."""
    programs, columns = sums.shape
    out = sums.new_empty(columns)
    with torch.cuda.device_of(sums):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(columns, SUMS_BLOCK["COLUMNS"]),)
        pixel_kernels.add_rows[grid](sums, out, programs, columns, **SUMS_BLOCK, **COMPILED)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Before attention
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("megapix::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
    _check(x, modulation, 6, weight)
    x, modulation = x.contiguous(), modulation.contiguous()
    out = torch.empty_like(x)
    kernel, programs = pixel_kernels.norm_modulate_forward, _blocks(x, NORM_BLOCK)
    _launch(kernel, programs, x, weight, modulation, out, BLOCK=NORM_BLOCK)
    return out


@_norm_modulate.register_fake
def _(x: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megapix::norm_modulate_backward", mutates_args=("d_modulation",))
def _norm_modulate_backward(
    g_out: Tensor, g_rest: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, d_modulation: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, that of its other reader included, and of the weight; those of shift1 and scale1 are written
    into their columns of `d_modulation`, which is contiguous."""
    _check(x, modulation, 6, weight, g_out, g_rest)
    _check(x, d_modulation, 6)
    g_out, g_rest, x, modulation = (t.contiguous() for t in (g_out, g_rest, x, modulation))
    programs = min(_blocks(x, NORM_BLOCK), PROGRAMS)
    d_x, sums = torch.empty_like(x), x.new_empty((programs, weight.numel()), dtype=torch.float32)
    inputs, outputs = (g_out, g_rest, x, weight, modulation), (d_x, d_modulation, sums)
    _launch(pixel_kernels.norm_modulate_backward, programs, *inputs, *outputs, BLOCK=NORM_BLOCK)
    return d_x, _added(sums).to(weight.dtype)


@_norm_modulate_backward.register_fake
def _(
    g_out: Tensor, g_rest: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, d_modulation: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


class _NormModulate(torch.autograd.Function):
    """norm(x)·(1 + scale1) + shift1, and x and the modulation themselves, of which the caller makes one use each.

    A function and not `register_autograd`, since a custom operation may not return what it was given.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, modulation)
        return _norm_modulate(x, weight, modulation), x.view_as(x), modulation.view_as(modulation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g_out, g_rest, d_modulation = grads
        d_modulation = d_modulation.contiguous()  # as the tail makes it
        d_x, d_weight = _norm_modulate_backward(g_out, g_rest, *ctx.saved_tensors, d_modulation)
        return d_x, d_weight, d_modulation


# ---------------------------------------------------------------------------------------------------------------------
# After attention
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("megapix::tail", mutates_args=())
def _tail(
    x: Tensor,
    attended: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    post: bool,
) -> Tensor:
    chunks, weights = 4 if post else 6, (norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(x, modulation, chunks, attended, *weights)
    x, attended, modulation = x.contiguous(), attended.contiguous(), modulation.contiguous()
    out = torch.empty_like(x)
    inputs, programs = (x, attended, modulation, *weights), _blocks(x, TAIL_BLOCK)
    _launch(pixel_kernels.tail_forward, programs, *inputs, out, CHUNKS=chunks, BLOCK=TAIL_BLOCK, **TAIL_COMPILED)
    return out


@_tail.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megapix::tail_backward", mutates_args=())
def _tail_backward(
    g_out: Tensor,
    x: Tensor,
    attended: Tensor,
    modulation: Tensor,
    norm_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    post: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of attended and of the modulation, of which 'pre' leaves the first two chunks open, and those of
    the five weights, fc2's transposed, one after another in fp32."""
    chunks, weights = 4 if post else 6, (norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(x, modulation, chunks, attended, g_out, *weights)
    g_out, x, attended, modulation = (t.contiguous() for t in (g_out, x, attended, modulation))
    d_x, d_attended, d_modulation = (torch.empty_like(t) for t in (x, attended, modulation))
    block = TAIL_BACKWARD_BLOCK[x.element_size()]
    programs = min(_blocks(x, block), PROGRAMS)
    sums = x.new_empty((programs, sum(w.numel() for w in weights)), dtype=torch.float32)
    inputs, outputs = (g_out, x, attended, modulation, *weights), (d_x, d_attended, d_modulation, sums)
    constants = {"CHUNKS": chunks, "BLOCK": block, **TAIL_BACKWARD_COMPILED[x.element_size()]}
    _launch(pixel_kernels.tail_backward, programs, *inputs, *outputs, **constants)
    return d_x, d_attended, d_modulation, _added(sums)


@_tail_backward.register_fake
def _(g_out: Tensor, x: Tensor, attended: Tensor, modulation: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sums = sum(w.numel() for w in rest[:5])
    return (*(t.new_empty(t.shape) for t in (x, attended, modulation)), x.new_empty(sums, dtype=torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.post = inputs
    ctx.save_for_backward(*tensors)


def _tail_gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
    weights = saved[3:]
    *streams, sums = _tail_backward(g_out, *saved, ctx.post)
    shapes = [w.t().shape if index == 3 else w.shape for index, w in enumerate(weights)]
    parts = [part.view(shape) for part, shape in zip(sums.split([s.numel() for s in shapes]), shapes, strict=True)]
    parts[3] = parts[3].t()
    return (*streams, *(part.to(w.dtype) for part, w in zip(parts, weights, strict=True)), None)


_tail.register_autograd(_tail_gradients, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------------------
# The block
# ---------------------------------------------------------------------------------------------------------------------


class FusedPiTBlock(PiTBlock):
    """A PiT block with the same parameters and result, but for rounding, on two kernels: [N, P, d] -> [N, P, d].

    With post-modulation the norm before attention, which nothing modulates, is torch's.

    Raises:
        ValueError: d is not a power of two of at least 16, or tensors differ in dtype or device.
    """

    def forward(self, x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        modulation_NPM = self.adaLN_modulation(s_BLD).view(*x_NPd.shape[:-1], -1)  # [N, P, chunks·d]
        if self.post:
            normed = self.norm1(x_NPd)  # [N, P, d]
        else:
            normed, x_NPd, modulation_NPM = _NormModulate.apply(x_NPd, self.norm1.weight, modulation_NPM)  # type: ignore[no-untyped-call]
        attended = self.attend(normed, s_BLD, rope)  # [N, P, d]
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        weights = (self.norm2.weight, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return _tail(x_NPd, attended, modulation_NPM, *weights, self.post)  # [N, P, d]

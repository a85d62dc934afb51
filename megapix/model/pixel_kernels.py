"""Triton kernels of the pixel pathway, row by row.

A row is one pixel of one patch: R = N·P rows of d numbers, and chunks·d numbers of modulation. Every kernel reads each
input once and writes each output once. Inside, numbers are fp32; they are rounded to the tensors' dtype where the
PyTorch block rounds them (`layers.py`): the residual stream, the input of each linear layer and its output.

Sums over all rows, the weights' gradients, are taken in a fixed order: each program adds up the blocks of rows that
fall to it and writes its sum as one row of `sums`, which `fused_block.py` adds. No atomics, and no launch is chosen
by a timer (autotuning): a run that is repeated or resumed has to give the same bits.

D is d, a power of two and at least 16 (the shortest side of a matmul on tensor cores); the hidden layer is 4·D
wide. CHUNKS is the modulation's, 6 ('pre') or 4 ('post').
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs these kernels, on CPU tensors: decided, as by Triton, when they are imported."""


@triton.jit
def _row_numbers(block, BLOCK: tl.constexpr):
    """Rows of a block. 64 bits: a row times its width passes 2^31 in large batches."""
    return (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)


@triton.jit
def _dot(a, b):
    """a @ b, summed in fp32. The interpreter would multiply the bits of bf16 as integers; in fp32 such a product is
    the same number as on tensor cores."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _inverse_rms(x, EPS: tl.constexpr, D: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]


@triton.jit
def _norm_gradient(g, unit, weight, rstd, D: tl.constexpr):
    """Gradient of x where unit = x·rstd and g is the gradient of unit·weight."""
    g_unit = g * weight
    return (g_unit - unit * (tl.sum(g_unit * unit, axis=1) / D)[:, None]) * rstd


@triton.jit
def norm_modulate_forward(x, weight, modulation, out, rows, EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = norm(x)·(1 + scale1) + shift1; of the modulation [R, 6·D] the chunks 0 (shift1) and 1 (scale1)."""
    row = _row_numbers(tl.program_id(0), BLOCK)
    inside = (row < rows)[:, None]
    column = tl.arange(0, D)[None, :]
    at = row[:, None] * D + column
    chunk = modulation + row[:, None] * (6 * D) + column

    w = tl.load(weight + column).to(tl.float32)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(chunk, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(chunk + D, mask=inside, other=0.0).to(tl.float32)
    normed = v * _inverse_rms(v, EPS, D) * w
    tl.store(out + at, (normed * (1.0 + scale) + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_modulate_backward(
    g_out,
    g_rest,
    x,
    weight,
    modulation,
    d_x,
    d_modulation,
    sums,
    rows,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes d_x, g_rest (x's gradient from its other reader) included, chunks 0 and 1 of d_modulation [R, 6·D], and
    this program's part of the weight's gradient, a row of sums [programs, D]."""
    column = tl.arange(0, D)[None, :]
    w = tl.load(weight + column).to(tl.float32)
    d_w = tl.zeros((BLOCK, D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = _row_numbers(block, BLOCK)
        inside = (row < rows)[:, None]
        at = row[:, None] * D + column
        chunk = row[:, None] * (6 * D) + column

        g = tl.load(g_out + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        rest = tl.load(g_rest + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(modulation + chunk + D, mask=inside, other=0.0).to(tl.float32)
        rstd = _inverse_rms(v, EPS, D)
        unit = v * rstd
        g_normed = g * (1.0 + scale)
        d_w += g_normed * unit
        d_v = rest + _norm_gradient(g_normed, unit, w, rstd, D)

        dtype = d_x.dtype.element_ty
        tl.store(d_x + at, d_v.to(dtype), mask=inside)
        tl.store(d_modulation + chunk, g.to(dtype), mask=inside)
        tl.store(d_modulation + chunk + D, (g * unit * w).to(dtype), mask=inside)
    tl.store(sums + tl.program_id(0) * D + tl.arange(0, D), tl.sum(d_w, axis=0))


@triton.jit
def _tail_inputs(x, attended, modulation, row, rows, CHUNKS: tl.constexpr, D: tl.constexpr):
    """Both streams and the last four chunks of the modulation, fp32 [BLOCK, D] each."""
    inside = (row < rows)[:, None]
    column = tl.arange(0, D)[None, :]
    at = row[:, None] * D + column
    chunk = modulation + row[:, None] * (CHUNKS * D) + (CHUNKS - 4) * D + column
    return (
        tl.load(x + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(attended + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + D, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + 2 * D, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + 3 * D, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _first_residual(x, attended, m0, m1, dtype: tl.constexpr, CHUNKS: tl.constexpr):
    """The residual stream after attention, rounded, as fp32."""
    if CHUNKS == 6:
        return (x + m0 * attended).to(dtype).to(tl.float32)
    return (x + (attended * (1.0 + m0) + m1).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _mlp_input(normed, m1, m2, dtype: tl.constexpr, CHUNKS: tl.constexpr):
    if CHUNKS == 6:
        return (normed * (1.0 + m2) + m1).to(dtype)
    return normed.to(dtype)


@triton.jit
def _mlp(h, w1_t, b1, w2_t, b2, dtype: tl.constexpr):
    """fc2(gelu(fc1(h))) and what its backward needs: y, the hidden layer before and after GELU, and Φ of the first."""
    z = (_dot(h, w1_t) + b1).to(dtype).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    hidden = (z * cdf).to(dtype)
    y = (_dot(hidden, w2_t) + b2).to(dtype).to(tl.float32)
    return y, z, hidden, cdf


@triton.jit
def tail_forward(
    x,
    attended,
    modulation,
    norm_weight,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    out,
    rows,
    EPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of a PiT block after its attention. The names m0 to m3 stand for the modulation's last four chunks:

    'pre'   m0 gate1, m1 shift2, m2 scale2, m3 gate2
    'post'  m0 scale1, m1 shift1, m2 scale2, m3 shift2
    """
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, D)
    unit_column = tl.arange(0, 4 * D)
    w1_t = tl.load(fc1_weight + unit_column[None, :] * D + column[:, None])  # [D, 4·D]
    w2_t = tl.load(fc2_weight + column[None, :] * (4 * D) + unit_column[:, None])  # [4·D, D]
    b1 = tl.load(fc1_bias + unit_column)[None, :].to(tl.float32)
    b2 = tl.load(fc2_bias + column)[None, :].to(tl.float32)
    w = tl.load(norm_weight + column)[None, :].to(tl.float32)

    row = _row_numbers(tl.program_id(0), BLOCK)
    v, a, m0, m1, m2, m3 = _tail_inputs(x, attended, modulation, row, rows, CHUNKS, D)
    middle = _first_residual(v, a, m0, m1, dtype, CHUNKS)
    normed = middle * _inverse_rms(middle, EPS, D) * w
    y, _, _, _ = _mlp(_mlp_input(normed, m1, m2, dtype, CHUNKS), w1_t, b1, w2_t, b2, dtype)
    result = middle + (m3 * y if CHUNKS == 6 else (y * (1.0 + m2) + m3).to(dtype).to(tl.float32))
    tl.store(out + row[:, None] * D + column[None, :], result.to(dtype), mask=(row < rows)[:, None])


@triton.jit
def tail_backward(
    g_out,
    x,
    attended,
    modulation,
    norm_weight,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    d_x,
    d_attended,
    d_modulation,
    sums,
    rows,
    EPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes d_x, d_attended, the last four chunks of d_modulation [R, CHUNKS·D], and this program's part of the
    weights' gradients, a row of sums: norm_weight, fc1_weight, fc1_bias, fc2_weight transposed, fc2_bias.

    Rows beyond the last have a zero g, and so add nothing to any sum.
    """
    dtype: tl.constexpr = d_x.dtype.element_ty
    column = tl.arange(0, D)
    unit_column = tl.arange(0, 4 * D)
    w1_t = tl.load(fc1_weight + unit_column[None, :] * D + column[:, None])  # [D, 4·D]
    w2_t = tl.load(fc2_weight + column[None, :] * (4 * D) + unit_column[:, None])  # [4·D, D]
    b1 = tl.load(fc1_bias + unit_column)[None, :].to(tl.float32)
    b2 = tl.load(fc2_bias + column)[None, :].to(tl.float32)
    w = tl.load(norm_weight + column)[None, :].to(tl.float32)

    d_w = tl.zeros((BLOCK, D), dtype=tl.float32)
    d_w1 = tl.zeros((4 * D, D), dtype=tl.float32)
    d_b1 = tl.zeros((4 * D,), dtype=tl.float32)
    d_w2_t = tl.zeros((4 * D, D), dtype=tl.float32)
    d_b2 = tl.zeros((BLOCK, D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = _row_numbers(block, BLOCK)
        inside = (row < rows)[:, None]
        at = row[:, None] * D + column[None, :]
        v, a, m0, m1, m2, m3 = _tail_inputs(x, attended, modulation, row, rows, CHUNKS, D)
        g = tl.load(g_out + at, mask=inside, other=0.0).to(tl.float32)

        middle = _first_residual(v, a, m0, m1, dtype, CHUNKS)
        rstd = _inverse_rms(middle, EPS, D)
        unit = middle * rstd
        h = _mlp_input(unit * w, m1, m2, dtype, CHUNKS)
        y, z, hidden, cdf = _mlp(h, w1_t, b1, w2_t, b2, dtype)

        d_y = (g * (m3 if CHUNKS == 6 else 1.0 + m2)).to(dtype)
        d_hidden = _dot(d_y, tl.trans(w2_t))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d_z = (d_hidden * (cdf + z * density)).to(dtype)
        d_h = _dot(d_z, tl.trans(w1_t))

        d_b2 += d_y.to(tl.float32)
        d_w2_t += _dot(tl.trans(hidden), d_y)
        d_b1 += tl.sum(d_z.to(tl.float32), axis=0)
        d_w1 += _dot(tl.trans(d_z), h)

        g_normed = d_h * (1.0 + m2) if CHUNKS == 6 else d_h
        d_w += g_normed * unit
        d_middle = g + _norm_gradient(g_normed, unit, w, rstd, D)
        chunk = d_modulation + row[:, None] * (CHUNKS * D) + (CHUNKS - 4) * D + column[None, :]
        tl.store(d_x + at, d_middle.to(dtype), mask=inside)
        tl.store(chunk, (d_middle * a).to(dtype), mask=inside)
        if CHUNKS == 6:
            tl.store(d_attended + at, (d_middle * m0).to(dtype), mask=inside)
            tl.store(chunk + D, d_h.to(dtype), mask=inside)
            tl.store(chunk + 2 * D, (d_h * unit * w).to(dtype), mask=inside)
            tl.store(chunk + 3 * D, (g * y).to(dtype), mask=inside)
        else:
            tl.store(d_attended + at, (d_middle * (1.0 + m0)).to(dtype), mask=inside)
            tl.store(chunk + D, d_middle.to(dtype), mask=inside)
            tl.store(chunk + 2 * D, (g * y).to(dtype), mask=inside)
            tl.store(chunk + 3 * D, g.to(dtype), mask=inside)

    mine = sums + tl.program_id(0) * (8 * D * D + 6 * D)
    matrix = unit_column[:, None] * D + column[None, :]
    tl.store(mine + column, tl.sum(d_w, axis=0))
    tl.store(mine + D + matrix, d_w1)
    tl.store(mine + D + 4 * D * D + unit_column, d_b1)
    tl.store(mine + 5 * D + 4 * D * D + matrix, d_w2_t)
    tl.store(mine + 5 * D + 8 * D * D + column, tl.sum(d_b2, axis=0))

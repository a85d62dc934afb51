"""Triton kernels of the pixel pathway, row by row.

A row is one pixel of one patch: R = N·P rows of d numbers, and chunks·d numbers of modulation. Every kernel reads each
input once and writes each output once. Inside, numbers are fp32; they are rounded to the tensors' dtype where the
PyTorch block rounds them (`layers.py`): the residual stream, the input of each linear layer and its output.

Sums over all rows, the weights' gradients, are taken in a fixed order: each program adds up the blocks of rows that
fall to it and writes its sum as one row of `sums`, which `add_rows` adds. No atomics, and no launch is chosen by a
timer (autotuning): a run that is repeated or resumed has to give the same bits.

In the time that an H100 needs to read and write a row of `tail_backward` it has room for some 145 instructions of a
warp (`python -m benchmarks.kernel_count`). Hence the few lines of PTX below, where Triton's own operations take several
instructions.

D is d, a power of two and at least 16 (the shortest side of a matmul on tensor cores); the hidden layer is 4·D
wide. CHUNKS is the modulation's, 6 ('pre') or 4 ('post').
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs these kernels, on CPU tensors: decided, as by Triton, when they are imported."""

SAME = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) else 16)
"""Equal columns of a matmul that adds up rows: the fewest that Triton takes."""


@triton.jit
def _first_row(block, BLOCK: tl.constexpr):
    """Number of a block's first row. 64 bits: a row times its width passes 2^31 in large batches."""
    return tl.cast(block, tl.int64) * BLOCK


@triton.jit
def _dot(a, b):
    """a @ b, summed in fp32. The interpreter would multiply the bits of bf16 as integers; in fp32 such a product is
    the same number as on tensor cores."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x rounded to dtype, as fp32. Triton takes an instruction for each number that it rounds to bf16 and widens again;
    here two numbers share it."""
    if dtype != tl.bfloat16 or INTERPRETED:
        return x.to(dtype).to(tl.float32)
    return tl.inline_asm_elementwise(
        "{.reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000;}",
        "=f,=f,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _reciprocal(x):
    """1 / x to one unit in the last place, in one instruction."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _power_of_two(x):
    """2^x to two units in the last place, in one instruction; below 2^-126 zero."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _with_sign(size, sign):
    """size, which is not negative, with the sign of `sign`."""
    if INTERPRETED:
        return tl.where(sign < 0, -size, size)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80000000, 0xd8;", "=f,f,f", [size, sign], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _normal(z):
    """Cumulative distribution Φ and density φ of the normal distribution.

    Φ as in Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17: 1 - φ(z)·(b1·t + ... + b5·t⁵) with
    t = 1 / (1 + p·z) for z >= 0, within 7.5e-8, in fp32 3e-7. It shares φ's exponential, where erf would
    take one of its own.
    """
    density = _power_of_two(z * z * -0.7213475204444817 - 1.3257480647361593)  # log2(e)/2, log2(√(2π))
    t = _reciprocal(1.0 + 0.2316419 * tl.abs(z))
    p = 1.330274429 * t - 1.821255978
    p = p * t + 1.781477937
    p = p * t - 0.356563782
    p = p * t + 0.319381530
    return 0.5 + _with_sign(0.5 - p * (t * density), z), density


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
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    first = _first_row(tl.program_id(0), BLOCK)
    inside = (row < rows - tl.program_id(0) * BLOCK)[:, None]
    at = row[:, None] * D + column
    chunk = modulation + first * (6 * D) + (row[:, None] * (6 * D) + column)

    w = tl.load(weight + column).to(tl.float32)
    v = tl.load(x + first * D + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(chunk, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(chunk + D, mask=inside, other=0.0).to(tl.float32)
    normed = v * _inverse_rms(v, EPS, D) * w
    tl.store(out + first * D + at, (normed * (1.0 + scale) + shift).to(out.dtype.element_ty), mask=inside)


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
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)[None, :]
    at = row[:, None] * D + column
    chunk = row[:, None] * (6 * D) + column
    w = tl.load(weight + column).to(tl.float32)
    d_w = tl.zeros((BLOCK, D), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        first = _first_row(block, BLOCK)
        inside = (row < rows - block * BLOCK)[:, None]
        g = tl.load(g_out + first * D + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + first * D + at, mask=inside, other=0.0).to(tl.float32)
        rest = tl.load(g_rest + first * D + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(modulation + first * (6 * D) + (chunk + D), mask=inside, other=0.0).to(tl.float32)
        rstd = _inverse_rms(v, EPS, D)
        unit = v * rstd
        g_normed = g * (1.0 + scale)
        d_w += g_normed * unit
        d_v = rest + _norm_gradient(g_normed, unit, w, rstd, D)

        dtype = d_x.dtype.element_ty
        d_chunk = d_modulation + first * (6 * D) + chunk
        tl.store(d_x + first * D + at, d_v.to(dtype), mask=inside)
        tl.store(d_chunk, g.to(dtype), mask=inside)
        tl.store(d_chunk + D, (g * unit * w).to(dtype), mask=inside)
    tl.store(sums + tl.program_id(0) * D + tl.arange(0, D), tl.sum(d_w, axis=0))


@triton.jit
def add_rows(sums, out, programs, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [columns] = the sum of the rows of sums [programs, columns], fp32, in an order that nothing but the number of
    programs decides: torch's own sum may divide its work by the card's multiprocessors."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(sums + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def _tail_inputs(x, attended, modulation, first, inside, CHUNKS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Both streams and the last four chunks of the modulation, fp32 [BLOCK, D] each."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, D)[None, :]
    at = row * D + column
    chunk = modulation + first * (CHUNKS * D) + (row * (CHUNKS * D) + (CHUNKS - 4) * D + column)
    return (
        tl.load(x + first * D + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(attended + first * D + at, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + D, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + 2 * D, mask=inside, other=0.0).to(tl.float32),
        tl.load(chunk + 3 * D, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _first_residual(x, attended, m0, m1, dtype: tl.constexpr, CHUNKS: tl.constexpr):
    """The residual stream after attention, rounded, as fp32."""
    if CHUNKS == 6:
        return _rounded(x + m0 * attended, dtype)
    return _rounded(x + _rounded(attended * (1.0 + m0) + m1, dtype), dtype)


@triton.jit
def _mlp_input(normed, m1, m2, dtype: tl.constexpr, CHUNKS: tl.constexpr):
    if CHUNKS == 6:
        return (normed * (1.0 + m2) + m1).to(dtype)
    return normed.to(dtype)


@triton.jit
def _hidden(h, w1_t, b1, dtype: tl.constexpr):
    """z = fc1(h), fp32 but rounded, gelu(z) and gelu's derivative at z."""
    z = _rounded(_dot(h, w1_t) + b1, dtype)
    cdf, density = _normal(z)
    return (z * cdf).to(dtype), cdf + z * density


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
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    unit_column = tl.arange(0, 4 * D)
    w1_t = tl.load(fc1_weight + unit_column[None, :] * D + column[:, None])  # [D, 4·D]
    w2_t = tl.load(fc2_weight + column[None, :] * (4 * D) + unit_column[:, None])  # [4·D, D]
    b1 = tl.load(fc1_bias + unit_column)[None, :].to(tl.float32)
    b2 = tl.load(fc2_bias + column)[None, :].to(tl.float32)
    w = tl.load(norm_weight + column)[None, :].to(tl.float32)

    first = _first_row(tl.program_id(0), BLOCK)
    inside = (row < rows - tl.program_id(0) * BLOCK)[:, None]
    v, a, m0, m1, m2, m3 = _tail_inputs(x, attended, modulation, first, inside, CHUNKS, D, BLOCK)
    middle = _first_residual(v, a, m0, m1, dtype, CHUNKS)
    h = _mlp_input(middle * _inverse_rms(middle, EPS, D) * w, m1, m2, dtype, CHUNKS)
    hidden, _ = _hidden(h, w1_t, b1, dtype)
    y = (_dot(hidden, w2_t) + b2).to(dtype).to(tl.float32)
    result = middle + (m3 * y if CHUNKS == 6 else _rounded(y * (1.0 + m2) + m3, dtype))
    tl.store(out + first * D + (row[:, None] * D + column[None, :]), result.to(dtype), mask=inside)


@triton.jit
def _half_mlp(h, d_y, y, d_h, w1_t, b1, w2_t, d_w1, d_b1, d_w2_t, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Adds half of the hidden layer's units: to y, the MLP's result without its bias, to d_h, the gradient of its
    input, and to the three sums, given d_y, the gradient of y."""
    d_hidden = _dot(d_y, tl.trans(w2_t))
    hidden, slope = _hidden(h, w1_t, b1, dtype)
    d_z = (d_hidden * slope).to(dtype)
    y += _dot(hidden, w2_t)
    d_h += _dot(d_z, tl.trans(w1_t))
    d_w1 += _dot(tl.trans(d_z), h)
    d_w2_t += _dot(tl.trans(hidden), d_y)
    d_b1 += _dot(tl.trans(d_z), tl.full((BLOCK, SAME), 1.0, tl.float32).to(dtype))  # a sum over rows without shuffles
    return y, d_h, d_w1, d_b1, d_w2_t


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

    The hidden layer is taken in two halves, lo and hi, since a thread has no registers for all of it beside the sums.
    Rows beyond the last have a zero g, and so add nothing to any sum.
    """
    dtype: tl.constexpr = d_x.dtype.element_ty
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    lo = tl.arange(0, 2 * D)
    hi = 2 * D + lo
    w1_t_lo = tl.load(fc1_weight + lo[None, :] * D + column[:, None])  # [D, 2·D]
    w1_t_hi = tl.load(fc1_weight + hi[None, :] * D + column[:, None])
    w2_t_lo = tl.load(fc2_weight + column[None, :] * (4 * D) + lo[:, None])  # [2·D, D]
    w2_t_hi = tl.load(fc2_weight + column[None, :] * (4 * D) + hi[:, None])
    b1_lo = tl.load(fc1_bias + lo)[None, :].to(tl.float32)
    b1_hi = tl.load(fc1_bias + hi)[None, :].to(tl.float32)
    b2 = tl.load(fc2_bias + column)[None, :].to(tl.float32)
    w = tl.load(norm_weight + column)[None, :].to(tl.float32)

    d_w = tl.zeros((BLOCK, D), dtype=tl.float32)
    d_b2 = tl.zeros((BLOCK, D), dtype=tl.float32)
    d_w1_lo = tl.zeros((2 * D, D), dtype=tl.float32)
    d_w1_hi = tl.zeros((2 * D, D), dtype=tl.float32)
    d_b1_lo = tl.zeros((2 * D, SAME), dtype=tl.float32)
    d_b1_hi = tl.zeros((2 * D, SAME), dtype=tl.float32)
    d_w2_t_lo = tl.zeros((2 * D, D), dtype=tl.float32)
    d_w2_t_hi = tl.zeros((2 * D, D), dtype=tl.float32)
    at = row[:, None] * D + column[None, :]
    chunk = row[:, None] * (CHUNKS * D) + (CHUNKS - 4) * D + column[None, :]
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        first = _first_row(block, BLOCK)
        inside = (row < rows - block * BLOCK)[:, None]
        v, a, m0, m1, m2, m3 = _tail_inputs(x, attended, modulation, first, inside, CHUNKS, D, BLOCK)
        g = tl.load(g_out + first * D + at, mask=inside, other=0.0).to(tl.float32)

        middle = _first_residual(v, a, m0, m1, dtype, CHUNKS)
        rstd = _inverse_rms(middle, EPS, D)
        unit = middle * rstd
        h = _mlp_input(unit * w, m1, m2, dtype, CHUNKS)
        d_y = (g * (m3 if CHUNKS == 6 else 1.0 + m2)).to(dtype)
        y = tl.zeros((BLOCK, D), dtype=tl.float32)
        d_h = tl.zeros((BLOCK, D), dtype=tl.float32)
        y, d_h, d_w1_lo, d_b1_lo, d_w2_t_lo = _half_mlp(
            h, d_y, y, d_h, w1_t_lo, b1_lo, w2_t_lo, d_w1_lo, d_b1_lo, d_w2_t_lo, dtype, BLOCK
        )
        y, d_h, d_w1_hi, d_b1_hi, d_w2_t_hi = _half_mlp(
            h, d_y, y, d_h, w1_t_hi, b1_hi, w2_t_hi, d_w1_hi, d_b1_hi, d_w2_t_hi, dtype, BLOCK
        )
        y = (y + b2).to(dtype).to(tl.float32)
        d_h = d_h.to(dtype).to(tl.float32)
        d_b2 += d_y.to(tl.float32)

        g_normed = d_h * (1.0 + m2) if CHUNKS == 6 else d_h
        d_w += g_normed * unit
        d_middle = g + _norm_gradient(g_normed, unit, w, rstd, D)
        d_chunk = d_modulation + first * (CHUNKS * D) + chunk
        tl.store(d_x + first * D + at, d_middle.to(dtype), mask=inside)
        tl.store(d_chunk, (d_middle * a).to(dtype), mask=inside)
        if CHUNKS == 6:
            tl.store(d_attended + first * D + at, (d_middle * m0).to(dtype), mask=inside)
            tl.store(d_chunk + D, d_h.to(dtype), mask=inside)
            tl.store(d_chunk + 2 * D, (d_h * unit * w).to(dtype), mask=inside)
            tl.store(d_chunk + 3 * D, (g * y).to(dtype), mask=inside)
        else:
            tl.store(d_attended + first * D + at, (d_middle * (1.0 + m0)).to(dtype), mask=inside)
            tl.store(d_chunk + D, d_middle.to(dtype), mask=inside)
            tl.store(d_chunk + 2 * D, (g * y).to(dtype), mask=inside)
            tl.store(d_chunk + 3 * D, g.to(dtype), mask=inside)

    mine = sums + tl.program_id(0) * (8 * D * D + 6 * D)
    d_fc1, d_fc1_bias, d_fc2_t = mine + D, mine + D + 4 * D * D, mine + 5 * D + 4 * D * D
    matrix = lo[:, None] * D + column[None, :]
    tl.store(mine + column, tl.sum(d_w, axis=0))
    tl.store(d_fc1 + matrix, d_w1_lo)
    tl.store(d_fc1 + 2 * D * D + matrix, d_w1_hi)
    tl.store(d_fc1_bias + lo, tl.sum(d_b1_lo, axis=1) / SAME)
    tl.store(d_fc1_bias + hi, tl.sum(d_b1_hi, axis=1) / SAME)
    tl.store(d_fc2_t + matrix, d_w2_t_lo)
    tl.store(d_fc2_t + 2 * D * D + matrix, d_w2_t_hi)
    tl.store(mine + 5 * D + 8 * D * D + column, tl.sum(d_b2, axis=0))

"""The fused pixel kernels in Triton's interpreter, against formulas in fp64 and against the plain block.

usage: TRITON_INTERPRET=1 python -m tests.programs.fused_kernels operations|faults|memory|compiled

The interpreter rounds to bf16 by cutting off, twice the error of a GPU's rounding; hence the bound of bf16.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.activation_memory import pixel_pathway
from megapix.config import MachineConfig, ModelConfig, PixelPolicy
from megapix.costs import activations
from megapix.engine.network import build_network
from megapix.model import fused_block as fused
from megapix.model.pixel_kernels import _normal

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest element."""
FUNCTIONAL = ("test_schema", "test_autograd_registration", "test_faketensor")
"""What opcheck may test where columns of a result are left open: it would compare them."""
ALL = (*FUNCTIONAL, "test_aot_dispatch_dynamic")
WIDTH = 16
MODEL = ModelConfig(patch_size=2, width=16, depth=1, heads=2, pixel_width=WIDTH, pixel_depth=2, num_classes=3)
POST = replace(MODEL, modulation="post")
OWN_WIDTH = replace(MODEL, pixel_attention_width=24, pixel_heads=3)


def norm(x: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
    """The formula of the kernel before attention, written with nothing of megapix."""
    shift, scale = modulation[..., :WIDTH], modulation[..., WIDTH : 2 * WIDTH]
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight * (1 + scale) + shift


def tail(
    x: Tensor, attended: Tensor, modulation: Tensor, w: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """That of the kernel after it: pre-modulation with six chunks, post-modulation with four."""
    chunks = modulation.shape[-1] // WIDTH
    parts = modulation.unflatten(-1, (chunks, WIDTH)).unbind(-2)
    middle = x + parts[2] * attended if chunks == 6 else x + attended * (1 + parts[0]) + parts[1]
    h = middle / (middle.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    if chunks == 6:
        h = h * (1 + parts[4]) + parts[3]
    z = h @ w1.T + b1
    y = (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ w2.T + b2
    return middle + (parts[5] * y if chunks == 6 else y * (1 + parts[2]) + parts[3])


def numbers(*shape: int, seed: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    """The result and the gradients of all inputs, in fp64."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, g))]


def differs(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of a tensor, relative to its largest element."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def check_norm(inputs: list[Tensor]) -> None:
    shape, dtype = inputs[0].shape, inputs[0].dtype
    g = numbers(*shape, seed=9, dtype=dtype)
    found = gradients(lambda *t: fused._NormModulate.apply(*t)[0], inputs, g)
    difference = differs(found, gradients(norm, [t.double() for t in inputs], g.double()))
    assert difference < BOUND[dtype], ("norm_modulate", shape, dtype, difference)


def tail_inputs(shape: tuple[int, int], chunks: int, dtype: torch.dtype) -> list[Tensor]:
    streams = [numbers(*shape, width, seed=width, dtype=dtype) for width in (WIDTH, 3 * WIDTH, chunks * WIDTH)]
    attended = streams[1][..., WIDTH : 2 * WIDTH]  # not contiguous
    sizes = ((WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    weights = [numbers(*size, seed=i, dtype=dtype, size=0.5) for i, size in enumerate(sizes)]
    return [streams[0], attended, streams[2], *weights]


def run_tail(*inputs: Tensor) -> Tensor:
    return fused._tail(*inputs, inputs[2].shape[-1] == 4 * WIDTH)


def check_tail(shape: tuple[int, int], chunks: int, dtype: torch.dtype, g: Tensor) -> None:
    inputs = tail_inputs(shape, chunks, dtype)
    expected = gradients(tail, [t.double() for t in inputs], g.double())
    found = gradients(run_tail, inputs, g)
    if chunks == 6:  # columns that norm_modulate's backward fills
        for values in (found, expected):
            values[3] = values[3][..., 2 * WIDTH :]
    difference = differs(found, expected)
    assert difference < BOUND[dtype], ("tail", shape, chunks, dtype, difference)


def network(c: ModelConfig, checkpointing: str, kernels: str, compiled: bool = False) -> list[Tensor]:
    """Velocity and gradients of every parameter of a network none of whose weights is zero, by name."""
    machine = MachineConfig(pixel_checkpointing=checkpointing, pixel_kernels=kernels, compile=compiled)
    net = build_network(c, 0, machine)
    with torch.no_grad():
        for seed, p in enumerate(net.parameters()):
            p.add_(numbers(*p.shape, seed=seed, dtype=p.dtype, size=0.2))
    x, t, y = numbers(1, 3, 4, 6, seed=1, dtype=torch.float32), torch.tensor([0.3]), torch.tensor([2])
    out = net(x, t, y)
    out.square().mean().backward()
    named = dict(sorted(net.named_parameters()))
    assert all(p.grad is not None for p in named.values())
    return [out.detach(), *(p.grad for p in named.values() if p.grad is not None)]


def check_network(c: ModelConfig, checkpointing: str) -> None:
    difference = differs(network(c, checkpointing, "triton"), network(c, "none", "plain"))
    assert difference < BOUND[torch.float32], (c, checkpointing, difference)


def check_norm_of(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = numbers(*shape, 2 * WIDTH, seed=1, dtype=dtype)[..., ::2]  # not contiguous
    check_norm([x, numbers(WIDTH, seed=3, dtype=dtype), numbers(*shape, 6 * WIDTH, seed=2, dtype=dtype)])


def finds(name: str, fault: Callable[..., Any], check: Callable[[], None]) -> None:
    """`check` fails while the operation of that name is the wrong one that `fault` makes of it."""
    right = getattr(fused, name)
    setattr(fused, name, functools.partial(fault, right))
    try:
        check()
    except AssertionError:
        return
    finally:
        setattr(fused, name, right)
    raise AssertionError(f"{name}: a planted fault is not found")


@triton.jit
def normal(z: Any, cdf: Any, density: Any, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    found = _normal(tl.load(z + at))
    tl.store(cdf + at, found[0])
    tl.store(density + at, found[1])


def check_normal() -> None:
    """Within the bound of the approximation, 7.5e-8, and of the fp32 that it is computed in."""
    z = torch.cat([torch.linspace(-14, 14, 4095), torch.zeros(1)])
    cdf, density = torch.empty_like(z), torch.empty_like(z)
    normal[(1,)](z, cdf, density, len(z))
    x = z.double()
    assert (cdf - torch.special.ndtr(x)).abs().max() < 3e-7
    assert (density - torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5).abs().max() < 1e-7


def check_sums() -> None:
    """Numbers of rows and columns that no block of `add_rows` divides, and the same bits again."""
    sums = numbers(517, 37, seed=1, dtype=torch.float32)
    assert differs([fused._added(sums).double()], [sums.double().sum(0)]) < 1e-6
    assert torch.equal(fused._added(sums), fused._added(sums.clone()))


def check_bits(chunks: int, dtype: torch.dtype) -> None:
    """Two runs give the same bits: results and the sums over rows."""
    g = numbers(1, 67, WIDTH, seed=9, dtype=dtype)
    inputs = tail_inputs((1, 67), chunks, dtype)
    first, second = (fused._tail_backward(g, *inputs, chunks == 4) for _ in range(2))
    opened = slice(2 * WIDTH if chunks == 6 else 0, None)
    for a, b in zip(first, second, strict=True):
        a, b = (a[..., opened], b[..., opened]) if a.shape[-1] == chunks * WIDTH else (a, b)
        assert torch.equal(a, b), (chunks, dtype)


def operations() -> None:
    """Shapes whose last block of rows is ragged or the only one, and programs that add up several blocks."""
    fused.PROGRAMS = 2
    check_normal()
    check_sums()
    fused.SUMS_BLOCK = {"ROWS": 2, "COLUMNS": 1024}  # a program costs the interpreter more than what it adds
    for dtype in (torch.float32, torch.bfloat16):
        check_norm_of((1, 3), dtype)
        check_norm_of((5, 65), dtype)
        for chunks in (6, 4):
            check_tail((1, 67), chunks, dtype, numbers(1, 67, WIDTH, seed=9, dtype=dtype))
        check_bits(6 if dtype == torch.bfloat16 else 4, dtype)
    check_tail((2, 2), 6, torch.float32, torch.ones(()).expand(2, 2, WIDTH))
    for c, checkpointing in ((MODEL, "none"), (MODEL, "full"), (POST, "full"), (OWN_WIDTH, "full")):
        check_network(c, checkpointing)


def faults() -> None:
    """A gradient that is not handed on, a norm and a sum of weights' gradients that are off by 1 %."""
    small, g = (1, 5), numbers(1, 5, WIDTH, seed=9, dtype=torch.float32)
    finds("_norm_modulate", lambda right, x, *rest: 1.01 * right(x, *rest), lambda: check_norm_of(small, g.dtype))
    finds(
        "_norm_modulate_backward",
        lambda right, g_out, g_rest, *rest: right(g_out, 0.0 * g_rest, *rest),
        lambda: check_network(MODEL, "none"),
    )
    finds(
        "_tail_backward",
        lambda right, *inputs: (*(found := right(*inputs))[:3], 1.01 * found[3]),
        lambda: check_tail(small, 6, g.dtype, g),
    )


def memory() -> None:
    """Bytes that fused blocks hold between forward and backward, counted by hand."""
    for c in (replace(MODEL, width=32), replace(POST, width=32), OWN_WIDTH):
        for policy in typing.get_args(PixelPolicy):
            machine = MachineConfig(pixel_checkpointing=policy, pixel_kernels="triton")
            held, counted = pixel_pathway(c, machine, 8), activations.per_image(c, 8, 2, machine)["pixel"]
            assert counted == held.device, (c, policy, counted, held)
            assert activations.on_host(c, 8, 2, machine) == held.host, (c, policy)


def compiled() -> None:
    """opcheck of the four operations, and compiled blocks with checkpointing."""
    x, attended, modulation, *weights = tail_inputs((1, 3), 6, torch.float32)
    g = numbers(1, 3, WIDTH, seed=9, dtype=torch.float32)
    opcheck = torch.library.opcheck
    opcheck(fused._norm_modulate, (x, weights[0], modulation))
    opcheck(fused._norm_modulate_backward, (g, g, x, weights[0], modulation, torch.zeros_like(modulation)))
    opcheck(fused._tail_backward, (g, x, attended, modulation, *weights, False), test_utils=FUNCTIONAL)
    for chunks in (6, 4):
        leaves = [t.detach().requires_grad_() for t in tail_inputs((1, 3), chunks, torch.float32)]
        opcheck(fused._tail, (*leaves, chunks == 4), test_utils=FUNCTIONAL if chunks == 6 else ALL)
    difference = differs(network(MODEL, "full", "triton", compiled=True), network(MODEL, "none", "plain"))
    assert difference < BOUND[torch.float32], difference


if __name__ == "__main__":
    {"operations": operations, "faults": faults, "memory": memory, "compiled": compiled}[sys.argv[1]]()

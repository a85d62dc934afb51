"""How near a PiT block comes to its limit: the time of its matmuls alone, over the time of the whole block.

    python -m benchmarks.pixel_block            b-256 (4 images, bf16 and fp32), and a tiny shape (64 images, fp32)

The matmuls are the five large linear layers, both layers of the pixel MLP, and attention, forward and backward, with
the block's shapes and dtype. They and the blocks take turns; shares are of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain_eager
from megapix.config import ModelConfig, pixeldit_b
from megapix.model.embed import rope_table
from megapix.model.layers import PiTBlock, Rope


@dataclass(frozen=True)
class Shape:
    """A block's sizes and its micro batch."""

    model: ModelConfig
    size: int
    batch: int
    dtype: torch.dtype

    @property
    def patches(self) -> int:
        """Patches of an image (L)."""
        return (self.size // self.model.patch_size) ** 2


TINY = ModelConfig(patch_size=4, width=96, depth=1, heads=4, pixel_depth=1)
SHAPES = {
    "b-256, 4 images, bf16": Shape(pixeldit_b(), 256, 4, torch.bfloat16),
    "b-256, 4 images, fp32": Shape(pixeldit_b(), 256, 4, torch.float32),
    "width 96, patch 4, 32 px, 64 images, fp32": Shape(TINY, 32, 64, torch.float32),
}
Work = Callable[[], None]


class PlainBlock(plain_eager.PiTBlock):
    """The block of `benchmarks.plain_eager`, called as ours."""

    def forward(self, x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        return super().forward(x_NPd.unflatten(0, s_BLD.shape[:2]), s_BLD, *rope).flatten(0, 1)


def matmuls(shape: Shape, device: torch.device) -> Work:
    """The block's matmuls alone, forward and backward."""
    m, rows = shape.model, shape.batch * shape.patches
    P, D, d = m.patch_size**2, m.width, m.pixel_width
    linears = [(rows, D, P * 6 * d), (rows, P * d, D), (rows, D, 3 * D), (rows, D, D), (rows, D, P * d)]
    linears += [(rows * P, d, 4 * d), (rows * P, 4 * d, d)]

    def tensor(*sizes: int, grad: bool = True) -> Tensor:
        return torch.randn(sizes, device=device).to(shape.dtype).requires_grad_(grad)

    made = [
        (tensor(n, i), tensor(o, i), None if o == 3 * D else tensor(o), tensor(n, o, grad=False)) for n, i, o in linears
    ]
    heads = shape.batch, m.heads, shape.patches, D // m.heads
    q, k, v, g = tensor(*heads), tensor(*heads), tensor(*heads), tensor(*heads, grad=False)
    leaves = [t for x, weight, bias, _ in made for t in (x, weight, bias) if t is not None] + [q, k, v]

    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        for x, weight, bias, gradient in made:
            F.linear(x, weight, bias).backward(gradient)
        F.scaled_dot_product_attention(q, k, v).backward(g)

    return work


def block(shape: Shape, device: torch.device, make: Callable[[ModelConfig], nn.Module], compiled: bool) -> Work:
    """A block, forward and backward, with weights that let gradients reach everything."""
    torch.manual_seed(0)
    net = make(shape.model)
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    net.to(device, shape.dtype)
    m, P, side = shape.model, shape.model.patch_size**2, shape.size // shape.model.patch_size
    rope = rope_table(side, side, m.width // m.heads, device)
    pixels = shape.batch * shape.patches, P, m.pixel_width
    x, gradient = (torch.randn(pixels, device=device).to(shape.dtype) for _ in range(2))
    s = torch.randn(shape.batch, shape.patches, m.width, device=device).to(shape.dtype).requires_grad_()
    x.requires_grad_()
    run = torch.compile(net, fullgraph=True) if compiled else net

    def work() -> None:
        net.zero_grad(set_to_none=True)
        x.grad = s.grad = None
        run(x, s, rope).backward(gradient)

    return work


def measure(works: dict[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 3):  # the first three warm up, and compile
        for name, work in works.items():
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print a row for each shape and block."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixel_block", description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| shape | block | matmuls, ms | block, ms | from | to | share |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        works = {
            "matmuls": matmuls(shape, device),
            "plain eager": block(shape, device, PlainBlock, compiled=False),
            "ours": block(shape, device, PiTBlock, compiled=False),
            "ours, compiled": block(shape, device, PiTBlock, compiled=True),
        }
        times = {which: [1e3 * t for t in found] for which, found in measure(works, options.repeats, device).items()}
        limit = statistics.median(times["matmuls"])
        for which, found in list(times.items())[1:]:
            median = statistics.median(found)
            row = [f"{limit:.1f}", f"{median:.1f}", f"{min(found):.1f}", f"{max(found):.1f}", f"{limit / median:.3f}"]
            print(f"| {name} | {which} | {' | '.join(row)} |", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""The machine's own peak: the fastest matrix product that it makes, in a run's number format and with its threads."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megapix.bench.stopwatch import Stopwatch
from megapix.config import Config

WARMUP, REPEATS = 2, 7
SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Product:
    """A linear layer's product: [rows, inputs] by [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """A multiply-add is two."""
        return 2 * self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        return f"{self.rows} x {self.inputs} x {self.outputs}"


def products(config: Config, micro: int, kind: str) -> list[Product]:
    """Squares, and the network's own largest products for a micro batch, on a device of that kind."""
    m, size = config.model, config.data.image_size
    rows = micro * (size // m.patch_size) ** 2
    pixels = m.patch_size**2 * m.pixel_width
    own = [(m.width, 3 * m.width), (m.width, 4 * m.width), (4 * m.width, m.width), (m.width, 6 * pixels)]
    own.append((pixels, m.width))
    return [Product(n, n, n) for n in SQUARES[kind]] + [Product(rows, *shape) for shape in own]


def measure(todo: list[Product], precision: str, device: torch.device) -> dict[Product, float]:
    """TFLOP/s of each product: the median of 7 after 2 that are not timed."""
    dtype, watch, found = DTYPES[precision], Stopwatch(device), {}
    for product in todo:
        x = torch.randn(product.rows, product.inputs, dtype=dtype, device=device)
        weight = torch.randn(product.outputs, product.inputs, dtype=dtype, device=device)
        seconds = []
        for repeat in range(WARMUP + REPEATS):
            with watch.part("product"):
                F.linear(x, weight)
            took = watch.read()["product"]
            if repeat >= WARMUP:
                seconds.append(took)
        found[product] = product.flops / statistics.median(seconds) / 1e12
    return found

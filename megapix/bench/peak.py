"""The machine's own peak: its fastest matmul in a run's dtype and with its threads."""

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
class Matmul:
    """A linear layer's matmul: [rows, inputs] by [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        return f"{self.rows} x {self.inputs} x {self.outputs}"


def matmuls(config: Config, micro: int, kind: str) -> list[Matmul]:
    """Squares, and the network's own largest matmuls for a micro batch, on a device of that kind."""
    m, size = config.model, config.data.image_size
    rows = micro * (size // m.patch_size) ** 2
    pixels = m.patch_size**2 * m.pixel_width
    own = [(m.width, 3 * m.width), (m.width, 4 * m.width), (4 * m.width, m.width), (m.width, 6 * pixels)]
    own.append((pixels, m.width))
    return [Matmul(n, n, n) for n in SQUARES[kind]] + [Matmul(rows, *shape) for shape in own]


def measure(todo: list[Matmul], precision: str, device: torch.device) -> dict[Matmul, float]:
    """TFLOP/s per matmul: the median of 7 after 2 that are not timed."""
    dtype, watch, tflops = DTYPES[precision], Stopwatch(device), {}
    for matmul in todo:
        x = torch.randn(matmul.rows, matmul.inputs, dtype=dtype, device=device)
        weight = torch.randn(matmul.outputs, matmul.inputs, dtype=dtype, device=device)
        seconds = []
        for repeat in range(WARMUP + REPEATS):
            with watch.part("matmul"):
                F.linear(x, weight)
            took = watch.read()["matmul"]
            if repeat >= WARMUP:
                seconds.append(took)
        tflops[matmul] = matmul.flops / statistics.median(seconds) / 1e12
    return tflops

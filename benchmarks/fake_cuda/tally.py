"""Kernels added up by what bounds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from benchmarks.fake_cuda import roofline
from benchmarks.fake_cuda.inductor import Graph
from benchmarks.fake_cuda.recorder import Kernel

SMALL = roofline.LAUNCH * roofline.BANDWIDTH * roofline.STREAMED
"""Bytes that a kernel moves while it is launched."""
NARROW = 128
"""A matmul with a side of at most so many numbers is bound by memory."""
CHUNKS = {"norm_modulate": (2, 0), "norm_modulate_backward": (1, 2), "tail": (4, 0), "tail_backward": (4, 4)}
"""Operation of `model/fused_block.py` -> chunks of the modulation that it reads, and whose gradients it writes."""
SUMS = ("aten.sum.", "aten.mean.")


@dataclass
class Tally:
    """Kernels of a pass."""

    launches: int = 0
    """All kernels."""
    matmuls: int = 0
    """Of these, matmuls and attention."""
    small: int = 0
    """Of these, element-wise kernels and sums that take no longer than their launch."""
    elementwise: int = 0
    """Bytes read and written by element-wise kernels."""
    sums: int = 0
    """Bytes read and written by kernels that only sum up."""
    narrow: int = 0
    """Bytes read and written by matmuls that are bound by memory."""
    elementwise_s: float = 0.0
    """Seconds of element-wise kernels and sums (`roofline.py`)."""
    matmul_s: float = 0.0
    attention_s: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Tally:
        return Tally(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Of all kernels, one after the other."""
        return self.elementwise_s + self.matmul_s + self.attention_s

    def add(self, moved: int, summing: bool) -> None:
        """An element-wise kernel, or one that only sums up."""
        self.launches += 1
        self.small += moved < SMALL
        self.sums += moved if summing else 0
        self.elementwise += 0 if summing else moved
        self.elementwise_s += roofline.seconds(moved, summing=summing)

    def add_matmul(self, kernel: Kernel) -> None:
        """A matmul, or attention."""
        self.launches += 1
        self.matmuls += 1
        if "attention" in kernel.name:
            self.attention_s += roofline.seconds(kernel.bytes, kernel.flops, attention=True)
            return
        self.narrow += kernel.bytes if narrow(kernel) else 0
        self.matmul_s += roofline.seconds(kernel.bytes, kernel.flops)


def narrow(kernel: Kernel) -> bool:
    """Whether a matmul has a short side that is not the batch: the pixel MLP, colours."""
    a, b = [shape for shape in kernel.inputs if len(shape) > 1][-2:]
    return min(*a, *b) <= NARROW and max(*a, *b) >= NARROW**2


def of_kernels(kernels: Iterable[Kernel]) -> Tally:
    """Of operations that run one by one."""
    tally = Tally()
    for kernel in kernels:
        if kernel.flops:
            tally.add_matmul(kernel)
        elif kernel.name.startswith("megapix."):
            tally.add(own_bytes(kernel), summing=False)
        else:
            tally.add(kernel.bytes, kernel.name.startswith(SUMS))
    return tally


def of_graph(graph: Graph) -> Tally:
    """Of a compiled graph: Inductor's kernels, the graph's own matmuls and attention, and operations of ours."""
    tally = Tally()
    for launch in graph.launches:
        tally.add(launch.bytes, 8 * launch.written < launch.bytes and "_poi_" not in launch.name)
    for kernel in graph.kernels:
        if kernel.flops:
            tally.add_matmul(kernel)
        elif kernel.name.startswith("megapix."):
            tally.add(own_bytes(kernel), summing=False)
    return tally


def own_bytes(kernel: Kernel) -> int:
    """Bytes of an operation of `model/fused_block.py`: each tensor once, and of the modulation the chunks in use."""
    width = next(shape[-1] for shape in kernel.inputs if len(shape) == 3)
    modulation = next(shape for shape in kernel.inputs if len(shape) == 3 and shape[-1] > width)
    chunks, chunk = modulation[-1] // width, 2 * math.prod(modulation[:-1]) * width
    read, written = CHUNKS[kernel.name.split(".")[1]]
    backward = written > 0
    return kernel.bytes - chunk * (chunks - read + backward * (chunks - written))

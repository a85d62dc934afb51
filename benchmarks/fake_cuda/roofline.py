"""Seconds of a kernel on an H100: the most of its bytes, its FLOPs, and a launch."""

from __future__ import annotations

BANDWIDTH = 3.35e12
"""Bytes per second of an H100 SXM's memory (NVIDIA's data sheet)."""
PEAK = 989e12
"""Its dense bf16 FLOPs per second (the same)."""
STREAMED = 0.80
"""Share of the bandwidth that element-wise kernels reach."""
SUMMED = 0.60
"""The same of kernels that only sum up."""
MATMULS = 0.68
"""Share of the peak that large matmuls reach."""
ATTENTION = 200e12
"""FLOPs per second of fused attention."""
LAUNCH = 2e-6
"""Seconds of a kernel at least."""


def seconds(moved: float, flops: float = 0.0, summing: bool = False, attention: bool = False) -> float:
    """Of one kernel that moves so many bytes, with the constants above."""
    if attention:
        return max(flops / ATTENTION, LAUNCH)
    share = SUMMED if summing else STREAMED
    return max(moved / (BANDWIDTH * share), flops / (PEAK * MATMULS), LAUNCH)

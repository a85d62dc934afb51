"""glibc's allocator, for processes with large CPU tensors."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Options of glibc's mallopt (malloc.h): when to give memory back, how much to take at once, the size from which a
block is mapped by itself, maps in all."""
AT_ONCE = 1 << 28
LARGEST_KEPT = 32 << 20
"""Bytes of a block: glibc takes no larger M_MMAP_THRESHOLD."""


def keep_freed_memory() -> None:
    """Let glibc reuse what this process frees, unless the environment tunes it.

    By default glibc returns each large block to the kernel, which fills it with zeros for the next one: 12 to 16 % of
    b-256's step, and most of the time of a feature extractor at batch 64 (docs/performance.md).
    The process grows to its peak and to holes beside it, then stays as it is.
    """
    _tune((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, AT_ONCE))


def keep_small_freed_memory() -> None:
    """As `keep_freed_memory`, for a process of which a host has dozens: blocks above 32 MiB are given back, and so is
    what is free at the heap's end, above 128 MiB."""
    _tune((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, 4 * LARGEST_KEPT), (M_TOP_PAD, 2 * LARGEST_KEPT))


def _tune(*options: tuple[int, int]) -> None:
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not tuned:
        for option, value in options:
            libc.mallopt(option, value)

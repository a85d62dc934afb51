"""glibc's allocator, for processes with large CPU tensors."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt (malloc.h): when to give memory back, how much to take at once, maps in all."""
AT_ONCE = 1 << 28


def keep_freed_memory() -> None:
    """Let glibc reuse what this process frees, unless the environment tunes it.

    By default glibc returns each large block to the kernel, which fills it with zeros for the next one: 12 to 16 % of
    b-256's step, and most of the time of a feature extractor at batch 64 (docs/performance.md).
    The process grows to its peak and to holes beside it, then stays as it is.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not tuned:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, AT_ONCE)):
            libc.mallopt(option, value)

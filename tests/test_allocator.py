"""What glibc keeps of freed memory, counted by the kernel: a page that was given back is a fault when used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PAGES = 16_384
"""Of the tensor that is made and dropped."""
PROGRAM = """
import resource
import torch
from megapix import allocator

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(PAGES * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
allocator.keep_freed_memory()
faults(20)
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
@pytest.mark.parametrize(
    ("environment", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["kept", "tuned by the user"]
)
def test_a_large_tensor_is_made_in_kept_memory(environment: dict[str, str], kept: bool) -> None:
    program = PROGRAM.replace("PAGES", str(PAGES))
    tuning = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < PAGES / 100 if kept else int(done.stdout) > 3 * PAGES

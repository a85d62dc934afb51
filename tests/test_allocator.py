"""What glibc keeps of freed memory, counted by the kernel: a page that was given back is a fault when used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PAGES = 16_384
"""Of the tensor that is made and dropped: 64 MiB."""
SMALL = 1_536
"""Of one as large as 32 images of 256 pixels in uint8: 6 MiB."""
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
allocator.KEEP()
faults(20)
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
@pytest.mark.parametrize(
    ("environment", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["kept", "tuned by the user"]
)
def test_a_large_tensor_is_made_in_kept_memory(environment: dict[str, str], kept: bool) -> None:
    found = faults("keep_freed_memory", PAGES, environment)
    assert found < PAGES / 100 if kept else found > 3 * PAGES


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no mallopt")
def test_a_process_of_many_keeps_what_its_batches_take_and_no_more() -> None:
    assert faults("keep_small_freed_memory", SMALL) < SMALL / 100
    assert faults("keep_small_freed_memory", PAGES) > 3 * PAGES


def faults(keep: str, pages: int, environment: dict[str, str] | None = None) -> int:
    """Of four tensors of so many pages, in a process that has begun with `keep` and made 20 such tensors before."""
    program = PROGRAM.replace("PAGES", str(pages)).replace("KEEP", keep)
    tuning = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    env = clean | (environment or {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)

"""The loader's workers: what they load, and how they hand arrays over."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from megapix.data import handover
from megapix.data.arrays import Arrays


def test_workers_load_no_torch() -> None:
    code = "import sys, megapix.data.workers; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("remote", [False, True])
def test_the_server_loads_what_remote_data_need(remote: bool) -> None:
    """Once, and not each worker."""
    child = "import sys; sys.exit(7 * ('aiohttp' in sys.modules))"
    code = f"""
from megapix.data import workers
if __name__ == "__main__":
    worker = workers.context({remote}).Process(target=exec, args=({child!r},))
    worker.start()
    worker.join()
    raise SystemExit(worker.exitcode)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7 * remote


def test_arrays_are_handed_over() -> None:
    """Of odd sizes and none, in memory that is nobody else's; values without arrays too."""
    here, there = multiprocessing.Pipe()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 3, 7, 5), np.uint8)
    text = (generator.integers(0, 9, (3, 11, 1)).astype(np.int16), np.zeros((3, 0), bool))
    sent = Arrays(images, np.array([5, 1, 2]), np.arange(3), ("one",), features=None, captions=("a",), text=text)
    before = len(os.listdir("/proc/self/fd"))
    for value in (sent, "alone"):
        handover.send(there, value)
    found = handover.receive(here)
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [5, 1, 2]
    assert all(np.array_equal(a, b) for a, b in zip(found.text, text, strict=True))
    assert (found.replaced, found.captions) == (("one",), ("a",))
    found.images[:] = 0  # it can be written to
    assert images.any()
    assert handover.receive(here) == "alone"
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "mmap keeps one descriptor of the memory that is held"
    there.close()
    with pytest.raises(EOFError):
        handover.receive(here)

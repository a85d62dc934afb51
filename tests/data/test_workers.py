"""The loader's workers: what they load, and how they hand arrays over."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from megapix.data.arrays import Arrays
from megapix.data.handover import Receiver, Sender


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
    sender, receiver, there = pair()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 3, 7, 5), np.uint8)
    text = (generator.integers(0, 9, (3, 11, 1)).astype(np.int16), np.zeros((3, 0), bool))
    sent = Arrays(images, np.array([5, 1, 2]), np.arange(3), ("one",), features=None, captions=("a",), text=text)
    before = len(os.listdir("/proc/self/fd"))
    for value in (sent, "alone"):
        sender.send(value)
    found = receiver.receive()
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [5, 1, 2]
    assert all(np.array_equal(a, b) for a, b in zip(found.text, text, strict=True))
    assert (found.replaced, found.captions) == (("one",), ("a",))
    found.images[:] = 0  # it can be written to
    assert images.any()
    assert receiver.receive() == "alone"
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "mmap keeps a descriptor of the memory, at each end"
    for _ in range(2):
        sender.wait()
    there.close()
    with pytest.raises(EOFError):
        receiver.receive()


def test_memory_is_used_again_when_nothing_of_a_batch_is_left() -> None:
    """Not before: a part of a tensor in its memory is something of it."""
    sender, receiver, _ = pair()
    before = maps()

    def handed_over(value: int, size: int) -> torch.Tensor:
        sender.send(np.full((2, size), value, np.int32))
        received = receiver.receive()
        sender.wait()
        return torch.from_numpy(received)[1:, 1:]

    parts = [handed_over(value, 10_001) for value in range(3)]
    assert maps() == before + 2 * 3, "each has memory of its own, which both ends map"
    del parts[1]
    parts.append(handed_over(3, 9_001))  # the answer to it says what is free
    assert maps() == before + 2 * 4
    parts.append(handed_over(4, 9_001))
    assert maps() == before + 2 * 4
    assert [part.unique().tolist() for part in parts] == [[0], [2], [3], [4]]


def test_memory_that_is_too_small_is_given_back() -> None:
    sender, receiver, _ = pair()
    before = maps()
    for size in (3, 5_000, 70_001, 1, 900_001, 5):
        for _ in range(4):
            sender.send(np.arange(size))
            assert np.array_equal(receiver.receive(), np.arange(size))
            sender.wait()
    assert maps() == before + 2 * 2, "one that is full, and one of which the sender does not know that it is free"


def pair() -> tuple[Sender, Receiver, Connection]:
    """Both ends, and the sender's connection."""
    here, there = multiprocessing.Pipe()
    return Sender(there), Receiver(here), there


def maps() -> int:
    """Of memory that batches are handed over in, in this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("megapix-batch")

"""Starting real ranks: the environment that `deepspeed` and `torchrun` set, one process a rank, gloo between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300
"""Seconds after which a launch counts as hung."""


@dataclass
class Rank:
    """What one finished rank left."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(ranks: int, module: str, arguments: Sequence[str | Path]) -> list[Rank]:
    """Run `python -m module arguments` on `ranks` ranks and return them all; a hang fails the test."""
    shared = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # DeepSpeed's op builder calls ninja, which is installed beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for segment in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{shared['MASTER_PORT']}_*"):
            segment.unlink(missing_ok=True)
    return [Rank(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def succeed(ranks: int, module: str, arguments: Sequence[str | Path]) -> list[Rank]:
    """`start`, and fail with the first bad rank's output."""
    done = start(ranks, module, arguments)
    for number, rank in enumerate(done):
        assert rank.code == 0, f"rank {number} ended with {rank.code}\n{rank.out}\n{rank.err}"
    return done

"""`megapix ARGUMENTS` on ranks with a GPU each, which the CPU plays (`tests.support.fake_cuda`).

usage: python -m tests.programs.on_gpus ARGUMENTS…

Environment:
    RECORD   folder; rank r writes what it asked of its GPU to rank-r.json, a list in order: {"copy": …} or [name, …]
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from megapix.bench import peak
from megapix.cli import main as cli
from megapix.dist import World
from megapix.engine.comm_op import load_comm_op
from megapix.model import layers
from tests.support.fake_cuda import Copy, FakeCuda


class Accelerator(CPU_Accelerator):
    """DeepSpeed's word for those GPUs; its collectives are gloo's."""

    cuda: FakeCuda

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def set_device(self, device_index: int) -> None:
        import torch

        torch.cuda.set_device(device_index)

    def current_device(self) -> int:
        return self.cuda.current

    def current_device_name(self) -> str:
        return f"cuda:{self.cuda.current}"


def main() -> int:
    # The collectives are gloo's: built under our lock, so that a killed test leaves no lock of torch's to wait for.
    load_comm_op(World())
    Accelerator.cuda = cuda = FakeCuda(setattr)
    get_accelerator().__class__ = Accelerator
    layers.aligned = lambda x: False  # the CPU that plays them shall compute what a CPU computes, to the bit
    peak.SQUARES = peak.SQUARES | {"cuda": (16, 24)}  # a GPU's own would keep a CPU busy for minutes

    def write() -> None:
        calls: list[Any] = [
            {"copy": asdict(call) | {"dtype": str(call.dtype)}} if isinstance(call, Copy) else call
            for call in cuda.calls
        ]
        path = Path(os.environ["RECORD"]) / f"rank-{os.environ['RANK']}.json"
        path.write_text(json.dumps(calls, default=str))

    atexit.register(write)
    with cuda:
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())

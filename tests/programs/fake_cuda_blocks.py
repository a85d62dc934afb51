"""Blocks of PixelDiT-B on a CUDA device that computes nothing: kernels and bytes, and machine code of compiled ones.

usage: python -m tests.programs.fake_cuda_blocks KIND:WAY:POLICY[:CAPABILITY…]...

A line of JSON for each: the row of `megapix/costs/kernels.json` that it should have, and for each compute capability
the kernels that were compiled for it, with those that spill.
"""

# ruff: noqa: E402

from __future__ import annotations

from benchmarks.fake_cuda import guard

guard.load()

import dataclasses
import json
import os
import sys

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import step_cost
from benchmarks.fake_cuda import attention, cubins, inductor
from megapix.config import ModelConfig, pixeldit_b

BATCH, SIZE, TOKENS = 8, 320, 160


def network(kind: str) -> ModelConfig:
    """A network of other sizes than the table's that has such a block."""
    of, way = kind.split() if " " in kind else (kind, "")
    made = dataclasses.replace(pixeldit_b(), num_classes=10)
    if of in ("text", "last"):
        made = dataclasses.replace(made, num_classes=0, text_width=1024)
    return dataclasses.replace(made, **{"modulation" if of == "pit" else "mlp": way} if way else {})


def main(asked: list[str]) -> None:
    attention.choose()
    inductor.pretend()
    for one in asked:
        kind, way, policy, *capabilities = one.split(":")
        subject = step_cost.kinds()[kind][0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            found, unit = step_cost.one(subject, network(kind), BATCH, SIZE, TOKENS, way, policy)
        code = [cubin for n in capabilities for graph in found.graphs for cubin in cubins.compile_for(graph, int(n))]
        row = step_cost.row(found, unit, way)
        print(
            json.dumps({"asked": one, "row": row, "code": [dataclasses.astuple(cubin) for cubin in code]}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)

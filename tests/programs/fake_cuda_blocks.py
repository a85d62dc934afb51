"""Blocks on a CUDA device that computes nothing: kernels and bytes, and machine code of compiled ones.

usage: python -m tests.programs.fake_cuda_blocks same|other KIND:WAY:POLICY[:CAPABILITY…]...

'same' has the networks and sizes that the plan's table was made with, 'other' PixelDiT-B in other sizes.

A line of JSON for each: its row as counted, as `megapix/costs/kernels.json` has it, and for each compute capability the
kernels that were compiled for it, with those that spill.
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
from megapix.costs.kernels import row_of

BATCH, SIZE, TOKENS = 8, 320, 160


def network(kind: str) -> ModelConfig:
    """A network of other sizes than the table's that has such a block."""
    of, way = kind.split() if " " in kind else (kind, "")
    made = dataclasses.replace(pixeldit_b(), num_classes=10)
    if of in ("text", "last"):
        made = dataclasses.replace(made, num_classes=0, text_width=1024)
    return dataclasses.replace(made, **{"modulation" if of == "pit" else "mlp": way} if way else {})


def main(sizes: str, *asked: str) -> None:
    attention.choose()
    inductor.pretend()
    for one in asked:
        kind, way, policy, *capabilities = one.split(":")
        subject, model = step_cost.kinds()[kind]
        how = step_cost.sizes_of(model)
        if sizes == "other":
            model, how = network(kind), (BATCH, SIZE, TOKENS)
        with FakeTensorMode(allow_non_fake_inputs=True):
            found, unit = step_cost.one(subject, model, *how, way, policy)
        code = [cubin for n in capabilities for graph in found.graphs for cubin in cubins.compile_for(graph, int(n))]
        row, expected = step_cost.row(found, unit, way), row_of(kind, way, policy, model)
        about = {"asked": one, "row": row, "expected": expected, "code": [dataclasses.astuple(cubin) for cubin in code]}
        print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)

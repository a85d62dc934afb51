"""The GPU path on a CUDA device that computes nothing: devices, waits, kernels and bytes, and machine code.

The device has to be loaded before torch is, so each part is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

STEP_WAITS = ["tolist: megapix/engine/clipping.py: divisor"]
"""What the host waits for in a step of one micro batch, outside DeepSpeed: the norm, and what ranks agree on."""
UNREAD = [
    f"patch_blocks.1.{name}"
    for name in ("attn.proj_y.weight", "attn.proj_y.bias", "norm_y2.weight", *(f"mlp_y.w{n}.weight" for n in (1, 2, 3)))
]
"""Parameters of the last MM-DiT block that change nothing (`model/pixeldit_t2i.py`)."""
EXPECTED = {"text": (STEP_WAITS, UNREAD), "text, masked": (STEP_WAITS, UNREAD)}
EXPECTED |= {f"sampler, {name}": ([], []) for name in ("euler", "heun", "ab2")}
"""Case -> waits, and parameters without a gradient; the others have STEP_WAITS and none."""
QUICK = ("classes", "text, masked", "repa, online", "sampler, ab2", "policies, selective_modulation, 2")
ALL = 9 + 6 * 3
KINDS = (
    "patch gelu",
    "patch swiglu",
    "text gelu",
    "text swiglu",
    "last gelu",
    "last swiglu",
    "pit pre",
    "pit post",
    "final",
)


def lines(program: str, *arguments: str) -> list[Any]:
    """What a program prints, a line of JSON each."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", f"tests.programs.{program}", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_recorder_counts_as_by_hand() -> None:
    lines("fake_cuda_kernels")


@pytest.mark.parametrize("cases", [pytest.param(QUICK, id="some"), pytest.param((), id="all", marks=pytest.mark.long)])
def test_steps_and_samplers_wait_for_nothing_else(cases: tuple[str, ...]) -> None:
    """Every tensor of a step is where it should be, every parameter gets its gradient, and the waits are known."""
    found = lines("fake_cuda_steps", *cases)
    assert len(found) == len(cases or range(ALL))
    for case in found:
        waits, without = EXPECTED.get(case["case"], (STEP_WAITS, []))
        assert case["waits"] == waits, case["case"]
        assert case["wrong"] == without, case["case"]
        assert case["kernels"] > 300


def asked(kinds: tuple[str, ...], compiled: bool, capabilities: str = "") -> list[str]:
    ways = {True: " compiled", False: ""}[compiled]
    some = [f"{kind}:plain{ways}:{policy}{capabilities}" for kind in kinds for policy in ("none", "full")]
    return some + [f"{kind}:triton{ways}:none{capabilities}" for kind in kinds if kind.startswith("pit")]


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(["final:plain compiled:none:90"], id="some", marks=pytest.mark.long),
        pytest.param(asked(("patch gelu",), compiled=False), id="eager", marks=pytest.mark.long),
    ],
)
def test_blocks_cost_what_the_plan_s_table_says(blocks: list[str]) -> None:
    """At other widths, sizes and batches than those that it was made with; and no kernel of Inductor's spills."""
    from megapix.costs.kernels import table

    columns, known = table()["columns"], table()["blocks"]
    found = lines("fake_cuda_blocks", *blocks)
    assert [one["asked"] for one in found] == blocks
    for one in found:
        kind, way, policy, *capabilities = one["asked"].split(":")
        expected, row = known[kind][way][policy], one["row"]
        for part in ("forward", "backward"):
            counted, wanted = (dict(zip(columns, of[part], strict=True)) for of in (row, expected))
            assert counted["matmuls"] == wanted["matmuls"], one["asked"]
            # A sum of many rows takes one kernel or two, as their number says.
            assert counted["launches"] == pytest.approx(wanted["launches"], abs=0 if way == "plain" else 6), one[
                "asked"
            ]
            moved, should = (of["elementwise"] + of["sums"] + of["narrow"] for of in (counted, wanted))
            assert moved == pytest.approx(should, rel=0.05), (one["asked"], part)
        assert row.get("kept", 0) == pytest.approx(expected.get("kept", 0), rel=0.05), one["asked"]
        assert len({capability for _, capability, *_ in one["code"]}) == len(capabilities)
        assert not [name for name, _, _, spilled in one["code"] if spilled], one["asked"]


def test_the_table_is_of_this_torch() -> None:
    """Another release's Inductor fuses in another way: `python -m benchmarks.step_cost --write` counts again."""
    import torch

    from megapix.costs.kernels import table

    assert table()["torch"] == torch.__version__.split("+")[0]

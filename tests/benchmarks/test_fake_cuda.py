"""The GPU path on a CUDA device that computes nothing: devices, waits, kernels and bytes, and machine code.

The device has to be loaded before torch is, so each part is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
QUICK = ("classes", "text, masked")
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


@pytest.mark.long
def test_the_plan_s_table_is_frozen_and_no_kernel_spills() -> None:
    """The kinds of blocks that a step has, compiled: each kernel and byte, and machine code for three GPUs."""
    blocks = [f"{kind}:plain compiled:none:80:90:100" for kind in ("patch gelu", "text swiglu", "pit pre", "final")]
    for one, (row, expected) in counted("same", blocks):
        for part in ("forward", "backward"):
            assert row[part] == pytest.approx(expected[part], abs=1e-3), (one["asked"], part)
        assert row["kept"] == pytest.approx(expected["kept"], abs=1e-3), one["asked"]
        assert {capability for _, capability, *_ in one["code"]} == {80, 90, 100}
        assert not [name for name, _, _, spilled in one["code"] if spilled], one["asked"]


@pytest.mark.long
def test_the_plan_s_table_holds_for_other_sizes() -> None:
    """Eager blocks move what it says. Of compiled ones, Inductor fuses and splits sums by size: within a sixth."""
    eager = [f"{kind}:plain:{policy}" for kind in KINDS for policy in ("none", "full")] + ["pit pre:triton:none"]
    compiled = [f"{kind}:plain compiled:none" for kind in ("patch gelu", "pit pre")]
    for one, rows in counted("other", [*eager, *compiled]):
        within = 0.05 if one["asked"] in eager else 0.16
        for part in ("forward", "backward"):
            found, expected = (moved(row[part]) for row in rows)
            assert found == pytest.approx(expected, rel=within), (one["asked"], part)
        assert rows[0].get("kept", 0) == pytest.approx(rows[1].get("kept", 0), rel=0.05), one["asked"]


def counted(sizes: str, blocks: list[str]) -> Iterator[tuple[dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]]:
    """Each block: what the program says of it, and its row as counted and as in the table."""
    found = lines("fake_cuda_blocks", sizes, *blocks)
    assert [one["asked"] for one in found] == blocks
    for one in found:
        yield one, (one["row"], one["expected"])


def moved(passed: list[float]) -> float:
    """Bytes per number of a pass, whatever moves them."""
    return sum(passed[3:])


def test_the_table_is_of_this_torch() -> None:
    """Another release's Inductor fuses in another way: `python -m benchmarks.step_cost --write` counts again."""
    import torch

    from megapix.costs.kernels import table

    assert table()["torch"] == torch.__version__.split("+")[0]

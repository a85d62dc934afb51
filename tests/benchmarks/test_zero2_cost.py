"""The recorder on operations whose bytes are known, and ZeRO-2's own bytes against a count by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zero2_cost import Recorder
from tests.support.launch import succeed

N = 1000


def recorded(*names: str) -> dict[str, tuple[int, int, int]]:
    """Operation -> kernels, bytes, waits."""
    a, b, low = torch.ones(N), torch.ones(N), torch.ones(N, dtype=torch.bfloat16)
    todo = {
        "view": lambda: a.view(10, -1).narrow(0, 0, 2),
        "empty": lambda: torch.empty(N),
        "zeros": lambda: torch.zeros(N),
        "add": lambda: a + b,
        "add in place": lambda: a.add_(b),
        "widen": lambda: low.float(),
        "narrow": lambda: low.copy_(a),
        "one number for all": lambda: torch.ones(1).expand(N).add(a),
        "join": lambda: torch.cat([a, b]),
        "read": lambda: a.sum().item(),
    }
    found = {}
    for name in names or todo:
        recorder = Recorder(phase="hooks")
        with recorder:
            todo[name]()
        rows = recorder.moved.values()
        found[name] = tuple(sum(getattr(row, part) for row in rows) for part in ("kernels", "bytes", "waits"))
    return found  # type: ignore[return-value]


def test_bytes_of_known_operations() -> None:
    assert recorded() == {
        "view": (0, 0, 0),
        "empty": (0, 0, 0),
        "zeros": (1, 4 * N, 0),
        "add": (1, 12 * N, 0),
        "add in place": (1, 12 * N, 0),
        "widen": (1, 6 * N, 0),
        "narrow": (1, 6 * N, 0),
        "one number for all": (2, 4 + 8 * N + 4, 0),
        "join": (1, 16 * N, 0),
        "read": (1, 4 * N + 4, 1),
    }


MICRO = {
    # into the bucket 4, one rank: wide 6, added to the partition 12
    1: 4 + 6 + 12,
    # into the bucket 4, made one vector 4 and wide 6; and of the owner's half: back into bf16 6, added 12, copied 6
    2: 4 + 4 + 6 + (6 + 12 + 6) / 2,
}
STEP = 4 + (8 + 28) + 12 + 6
"""Norm, clipping and AdamW (its own division would take 4), EMA, weights from masters: of a rank's share."""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_bytes_of_zero2_by_hand(ranks: int) -> None:
    """Two micro batches a step. The partition of summed gradients, 4 bytes a step, is zeroed in the first one."""
    arguments = ["--preset", "tiny", "--accumulation", "2", "--steps", "1"]
    rows = succeed(ranks, "benchmarks.zero2_cost", arguments)[0].out.splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")] for row in rows if row[:1] == "|"}
    micro, whole = cells["a micro batch"], cells["a step"]
    assert float(micro[4]) == pytest.approx(MICRO[ranks] + 4 / ranks / 2, rel=0.01)
    assert float(whole[4]) == pytest.approx(STEP / ranks, rel=0.01)
    assert int(whole[5]) <= 24, "a few kernels, however many parameters there are"
    assert whole[7] == "0", "the one read, of the norm, is a list, which is no operation of a CPU's"

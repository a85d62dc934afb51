"""Whether a bf16 result is the exact one, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_rounded_once(found: Tensor, exact: Tensor, what: str = "") -> None:
    """`found` is `exact` (fp64) in bf16. Where the exact number lies so near the middle of two bf16 numbers that the
    last bits of fp32 decide, either of them will do."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    slack = 2.0**-19 * exact.abs().max()
    low, high = (exact - slack).bfloat16(), (exact + slack).bfloat16()
    wrong = int(((found < low) | (found > high)).sum())
    assert wrong == 0, f"{what}: {wrong} of {found.numel()} numbers are not the exact one rounded once"

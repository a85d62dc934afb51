"""What 'selective' keeps on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from megapix.engine import checkpointing

SCHEMAS = sorted(
    name.removeprefix("aten::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("aten::_scaled_dot_product_") and "backward" not in name
)
"""Every way in which torch computes attention in one operation, here or elsewhere."""
ELSEWHERE = ("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable")
"""Not one operation but its parts, and other makers' devices."""
OURS = [name for name in SCHEMAS if not name.startswith(ELSEWHERE) and "." not in name and "quantized" not in name]


def test_there_are_the_ways_of_cpus_and_gpus() -> None:
    assert {name.removeprefix("_scaled_dot_product_") for name in OURS} >= {
        *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    }


@pytest.mark.parametrize("name", OURS)
def test_attention_is_not_computed_again(name: str) -> None:
    """However a GPU computes it."""
    operation = getattr(torch.ops.aten, name).default
    kept = CheckpointPolicy.MUST_SAVE
    assert checkpointing._all(None, operation) == kept
    but_the_first = checkpointing._AllButTheFirst()
    context = SimpleNamespace(is_recompute=False)
    assert but_the_first(context, torch.ops.aten.addmm.default) != kept
    assert but_the_first(context, operation) == kept

"""The condition of guidance and dropout: text of several lengths, of one, and without a mask."""

from __future__ import annotations

import pytest
import torch

from megapix.diffusion.condition import Condition


def test_text_without_a_mask_has_none_after_dropout_and_guidance() -> None:
    y, null = torch.randn(3, 5, 4), torch.randn(1, 5, 4)
    condition = Condition((y,), (null,))
    (dropped,) = condition.dropped(torch.tensor([True, False, True]))
    assert torch.equal(dropped, torch.cat([null, y[1:2], null]))
    (both,) = condition.with_null()
    assert torch.equal(both, torch.cat([y, null, null, null]))


def test_lengths_that_differ_need_masks() -> None:
    y, null, mask = torch.randn(3, 5, 4), torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    for condition in (Condition((y,), (null,)), Condition((y,), (null, mask))):
        with pytest.raises(ValueError, match=r"text of 5 tokens, null of 2: expected masks, or one length"):
            condition.with_null()
    masked = Condition((y, torch.ones(3, 5, dtype=torch.bool)), (null, mask))
    assert masked.with_null()[1].tolist() == [[True] * 5] * 3 + [[True] * 2 + [False] * 3] * 3

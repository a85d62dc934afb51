"""A micro batch on its way to a GPU."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from megapix.data.batch import Batch, ReadTimes
from tests.support.fake_cuda import FakeCuda

TENSORS = ("images", "labels", "features", "text")
"""Fields of a batch that hold tensors."""


def numbers(*shape: int, first: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(first, first + int(np.prod(shape))).view(shape).to(dtype)


def full() -> Batch:
    """Every field set, no two tensors alike."""
    return Batch(
        images=numbers(3, 3, 4, 4, first=0, dtype=torch.uint8),
        labels=numbers(3, first=200, dtype=torch.int64),
        positions=np.array([5, 7, 11]),
        replaced=("one",),
        times=ReadTimes(0.5, 0.25, 3, 1),
        features=numbers(3, 2, 2, 5, first=1000, dtype=torch.bfloat16),
        captions=("a", "b", "c"),
        text=(numbers(3, 6, 5, first=2000, dtype=torch.bfloat16), numbers(3, 6, first=0, dtype=torch.int64) % 2 == 0),
    )


def test_pinning_keeps_every_field_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr) as cuda:
        batch = full()
        pinned = batch.pin_memory()
        for field in fields(Batch):
            before, after = getattr(batch, field.name), getattr(pinned, field.name)
            if field.name not in TENSORS:
                assert after is before
                continue
            assert after is not None, field.name
            before, after = ((part,) if isinstance(part, Tensor) else part for part in (before, after))
            assert len(after) == len(before)
            for old, new in zip(before, after, strict=True):
                assert torch.equal(new, old), field.name
                assert new.dtype == old.dtype
                assert cuda.pinned(new), field.name


def test_what_a_batch_has_not_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr):
        pinned = Batch(full().images, full().labels, full().positions).pin_memory()
    assert (pinned.features, pinned.text, pinned.captions, pinned.replaced) == (None, None, (), ())

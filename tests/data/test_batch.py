"""A micro batch on its way to a GPU."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from megapix.data.arrays import ReadTimes
from megapix.data.batch import Batch
from tests.support.fake_cuda import FakeCuda

HINTS = get_type_hints(Batch)
PLAIN = {
    "positions": np.array([5, 7, 11]),
    "replaced": ("one",),
    "times": ReadTimes(0.5, 0.25, 3, 1),
    "captions": ("a", "b", "c"),
}
"""Fields that the host keeps. Every other one holds a tensor, or a pair of them."""


def tensors(hint: Any) -> int:
    """How many tensors a field of that type holds; any number counts as two."""
    parts = get_args(hint)
    if parts[1:] == (...,):
        return 2 * tensors(parts[0])
    return 1 if hint is Tensor else sum(map(tensors, parts))


def full() -> Batch:
    """Every field set, no two tensors alike; of a field that is new, too."""
    values, first = dict[str, Any](PLAIN), 0
    for name, hint in HINTS.items():
        if name not in PLAIN:
            count, first = tensors(hint), first + 100
            assert count, f"{name}: neither a tensor nor one of PLAIN"
            made = tuple(torch.arange(first + 10 * n, first + 10 * n + 6).view(3, 2) for n in range(count))
            values[name] = made if count > 1 else made[0]
    return Batch(**values)


def parts(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def test_pinning_keeps_every_field_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds a tensor is pinned, and each tensor once."""
    with FakeCuda(monkeypatch.setattr) as cuda:
        batch = full()
        pinned = batch.pin_memory()
        for field in fields(Batch):
            before, after = getattr(batch, field.name), getattr(pinned, field.name)
            if field.name in PLAIN:
                assert after is before
                continue
            assert after is not None, field.name
            for old, new in zip(parts(before), parts(after), strict=True):
                assert torch.equal(new, old), field.name
                assert new.dtype == old.dtype
                assert cuda.pinned(new), field.name
        assert len(cuda.calls) == sum(tensors(HINTS[field.name]) for field in fields(Batch))


def test_what_a_batch_has_not_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr):
        pinned = Batch(full().images, full().labels, full().positions).pin_memory()
    assert (pinned.features, pinned.text, pinned.captions, pinned.draws) == (None, None, (), ())

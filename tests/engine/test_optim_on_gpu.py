"""AdamW with an EMA on a GPU: its state lies where its parameters do."""

from __future__ import annotations

import pytest
import torch

from megapix.engine.optim import EMA, AdamWWithEMA
from tests.support.fake_cuda import FakeCuda


@pytest.mark.parametrize(("fused", "count"), [(True, "cuda:1"), (False, "cpu")])
def test_steps_are_counted_where_nobody_waits_for_them(
    fused: bool, count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused AdamW reads the count on the GPU; the other one on the host, and would wait for a GPU's."""
    with FakeCuda(monkeypatch.setattr) as cuda:
        p = torch.ones(5, device="cuda:1").requires_grad_()
        optimizer = AdamWWithEMA([p], 0.5, (0.9, 0.999), 0.0, 0.75, fused=fused)
        optimizer.begin()
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
        places = {key: str(cuda.place(value)) for key, value in optimizer.state[p].items()}
        assert places == {"step": count, "exp_avg": "cuda:1", "exp_avg_sq": "cuda:1", EMA: "cuda:1"}
    assert torch.allclose(p, torch.full((5,), 0.5))
    assert torch.allclose(optimizer.state[p][EMA], torch.full((5,), 0.875))

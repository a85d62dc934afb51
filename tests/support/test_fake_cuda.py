"""GPUs that are not there complain as real ones do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.fake_cuda import FakeCuda, WrongPlace


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.ones(2, device="cuda:1") + torch.ones(2),
        lambda: torch.cat([torch.ones(2, device="cuda:1"), torch.ones(2, device="cuda:2")]),
        lambda: torch.ones(2, device="cuda:1") + torch.from_numpy(np.ones(2, np.float32)),
        lambda: torch.nn.Linear(2, 3).to("cuda:1")(torch.ones(1, 2)),
        lambda: torch.empty(3, device="cuda:1").normal_(generator=torch.Generator("cpu")),
        lambda: torch.ones(2, device="cuda:1").numpy(),
        lambda: np.asarray(torch.ones(2, device="cuda:1")),
        lambda: torch.distributed.all_reduce(torch.ones(2)),
    ],
)
def test_what_lies_elsewhere_is_an_error(wrong: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr), pytest.raises(WrongPlace):
        wrong()


def test_places_and_numbers_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr) as cuda:
        x = torch.tensor([1.0, 2.0, 4.0]).to("cuda:1")
        assert x.is_cuda
        assert not x.cpu().is_cuda
        for made in (
            x[1:],
            x * 2.0,
            torch.zeros_like(x),
            x.double(),
            x.new_ones(2),
            torch.stack([x, x]),
            x.to("cuda:1"),
        ):
            assert made.device == torch.device("cuda", 1)
        x[0] = torch.tensor(5.0)
        assert (x * torch.tensor(2.0)).cpu().numpy().tolist() == [10.0, 4.0, 8.0]
        weights = torch.nn.Parameter(torch.ones(3, device="cuda:1"))
        (weights * x).sum().backward()
        assert isinstance(weights.grad, Tensor)
        assert weights.grad.tolist() == [5.0, 2.0, 4.0]
        (gradient,) = torch.autograd.grad((weights * x).sum(), [weights])
        assert cuda.place(gradient) == torch.device("cuda", 1)
        assert cuda.copies == [], "none of ours"


def test_a_copy_to_pinned_memory_lands_when_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr) as cuda:
        x, host = torch.ones(3, device="cuda:1"), torch.zeros(3, pin_memory=True)
        host.copy_(x, non_blocking=True)
        x.fill_(2.0)
        assert host.isnan().all()
        assert host.to("cuda:1", non_blocking=True).tolist() == [1.0, 1.0, 1.0], "in the order of the stream"
        host.copy_(x, non_blocking=True)
        torch.cuda.synchronize()
        assert host.tolist() == [2.0, 2.0, 2.0]
        torch.zeros(3).copy_(x, non_blocking=True)
        assert cuda.calls == [("pinned", (3,), torch.float32), ("synchronize",)]
        late = x.to("cpu", non_blocking=True)
        assert late.isnan().all()
        torch.cuda.synchronize()
        assert late.tolist() == [2.0, 2.0, 2.0]

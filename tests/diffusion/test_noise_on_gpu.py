"""Noise on a GPU: where it lies, and on a real one that its bits are the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megapix import rng
from megapix.diffusion.noise import keys_of, normal
from megapix.rng import Purpose
from tests.support.fake_cuda import FakeCuda

BITS = rng.bits(5, Purpose.NOISE, np.arange(3))
SHAPE = (3, 9, 7)


def test_keys_are_copied_without_a_wait_and_all_else_is_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = normal(keys_of(BITS), SHAPE, torch.device("cpu"), "philox")
    with FakeCuda(monkeypatch.setattr) as cuda:
        keys = keys_of(BITS).pin_memory()
        normal(keys, SHAPE, torch.device("cuda:1"), "philox")  # the table is copied once
        before = len(cuda.calls)
        found = normal(keys, SHAPE, torch.device("cuda:1"), "philox")
        copies = [call for call in cuda.calls[before:] if hasattr(call, "non_blocking")]
        assert str(cuda.place(found)) == "cuda:1"
        assert [(copy.shape, copy.target, copy.pinned, copy.non_blocking) for copy in copies] == [
            ((3,), "cuda:1", True, True)
        ]
        assert torch.equal(found.cpu(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(9, 7), (256, 256), (512, 520)])
def test_a_gpu_has_the_bits_of_the_cpu(size: tuple[int, int]) -> None:
    on_gpu, on_cpu = (normal(keys_of(BITS), (3, *size), torch.device(kind), "philox").cpu() for kind in ("cuda", "cpu"))
    assert torch.equal(on_gpu, on_cpu)

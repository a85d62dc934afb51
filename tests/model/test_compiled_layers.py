"""What layers compute where torch.compile makes kernels of them: the same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megapix.model import layers
from megapix.model.layers import GeluMlp, PixelMlp, RMSNorm, modulation_of

F64 = {"dtype": torch.float64}


def gradients(run: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The result, and gradients of the leaves from one that is not constant."""
    out = run()
    g = torch.arange(out.numel(), **F64).view_as(out).cos()
    return out, *torch.autograd.grad(out, leaves, g)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 7, 6), (2, 3, 5, 6)])
def test_a_wide_layers_bias_is_a_column_of_its_weights_gradient(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Sequential(nn.Linear(6, 31, **F64)), random(*shape)
    expected = gradients(lambda: layer(x), x, *layer.parameters())
    assert all(
        torch.equal(*pair)
        for pair in zip(gradients(lambda: modulation_of(layer, x), x, *layer.parameters()), expected, strict=True)
    )
    monkeypatch.setattr(layers, "compiled_for_gpu", lambda x: True)
    found = gradients(lambda: modulation_of(layer, x), x, *layer.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.is_contiguous()


def test_a_pixel_mlp_sums_its_biases_up_by_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, plain, x = PixelMlp(6).double(), GeluMlp(6).double(), random(5, 7, 6)
    plain.load_state_dict(pixels.state_dict())
    expected = gradients(lambda: plain(x), x, *plain.parameters())
    monkeypatch.setattr(layers, "compiled_for_gpu", lambda x: True)
    for a, b in zip(gradients(lambda: pixels(x), x, *pixels.parameters()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wide", [(3, 1, 6), (3, 5, 6)], ids=["an image's", "a pixel's"])
def test_a_norms_weight_out_of_the_sums_of_its_scale(wide: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, shift, scale = RMSNorm(6).double(), random(3, 5, 6), random(*wide, seed=1), random(*wide, seed=2)
    nn.init.normal_(norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(3))

    def plain() -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + layers.EPS).rsqrt() * norm.weight
        return normed * (1 + scale) + shift

    leaves = x, norm.weight, shift, scale
    expected = gradients(plain, *leaves)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        found = gradients(lambda: norm.modulated(x, shift, scale), *leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

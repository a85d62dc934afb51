"""Products of few channels, which GPUs want padded: the same numbers, forward and backward, under the same names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megapix.model import embed, layers
from megapix.model.layers import narrow_linear
from megapix.model.projector import _averaged
from tests.model.test_pixeldit import SMALL, inputs, randomised


class Products(TorchDispatchMode):
    """Sizes that products add over and give."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            left, right = args[-2:]
            self.sizes |= {*left.shape, *right.shape}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("given", "made"), [(3, 16), (16, 3), (8, 16), (5, 7)])
def test_padded_by_hand(given: int, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(given, made, dtype=torch.float64)
    x = torch.randn(5, 4, given, dtype=torch.float64, generator=generator)
    g = torch.randn(5, 4, made, dtype=torch.float64, generator=generator)
    results = []
    for padded in (False, True):
        monkeypatch.setattr(layers, "aligned", lambda x, padded=padded: padded)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = narrow_linear(layer, leaf)
        out.backward(g)
        results.append((out, leaf.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_network_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The colours take no part in any product any more, and names and shapes are what they were."""
    sizes, outs, gradients, names = [], [], [], []
    for padded in (False, True):
        monkeypatch.setattr(layers, "aligned", lambda x, padded=padded: padded)
        net = randomised(SMALL)
        with Products() as products:
            out = net(*inputs())
            out.square().mean().backward()
        sizes.append(products.sizes)
        outs.append(out)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
        names.append({name: tuple(p.shape) for name, p in net.named_parameters()})
    assert 3 in sizes[0]
    assert 3 not in sizes[1]
    assert names[0] == names[1]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    for name, expected in gradients[0].items():
        scale = float(expected.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=5e-6 * scale, msg=name)


def test_cpus_take_the_layer_as_it_is() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(4, 3)
    assert torch.equal(narrow_linear(layer, x), layer(x))
    with Products() as products:
        narrow_linear(layer, x)
    assert products.sizes == {3, 4, 5}


@pytest.mark.parametrize(("have", "want"), [((6, 6), (3, 2)), ((7, 5), (3, 4)), ((5, 9), (5, 1)), ((16, 13), (14, 13))])
def test_an_average_without_atomics(have: tuple[int, int], want: tuple[int, int]) -> None:
    """torch's own, and its gradient."""
    image = torch.randn(2, 3, *have, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.nn.functional.adaptive_avg_pool2d(image, want)
    found = _averaged(image, want)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    g = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = zip(torch.autograd.grad(found, image, g), torch.autograd.grad(expected, image, g), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_patches_and_pixels_of_images() -> None:
    """By hand, number by number, of an image that is not square; and back."""
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches, pixels = embed.patches_of(x, 2), embed.pixels_of(x, 2)
    assert patches.shape == (2, 6, 12)
    assert pixels.shape == (2, 6, 4, 3)
    for b, c, i, j in ((0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 1), (1, 0, 1, 4)):
        patch, inside = i // 2 * 3 + j // 2, i % 2 * 2 + j % 2
        assert patches[b, patch, c * 4 + inside] == x[b, c, i, j]
        assert pixels[b, patch, inside, c] == x[b, c, i, j]
    assert torch.equal(embed.images_of(pixels.flatten(0, 1), x, 2), x)

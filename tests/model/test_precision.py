"""fp32 inside bf16: what is promised to be rounded once is the fp64 result rounded once, on random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapix.config import ModelConfig
from megapix.model import build
from megapix.model.attention import attention, key_bias
from megapix.model.embed import TimestepEmbedder
from megapix.model.layers import Attention, RMSNorm, modulate, projected
from megapix.model.pixeldit_t2i import JointAttention
from tests.support import second_network
from tests.support.rounding import assert_rounded_once

SIZES = {"patch_size": 4, "width": 36, "depth": 1, "heads": 3, "pixel_width": 8, "pixel_depth": 1}
NETWORKS = {
    "classes": ModelConfig(**SIZES, num_classes=3),
    "text": ModelConfig(**SIZES, num_classes=0, text_width=10, text_tokens=5),
}


def random(*shape: int, seed: int = 0, around: float = 0.0) -> Tensor:
    """bf16 numbers."""
    return (around + torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def compare(ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """The result and the gradient of each input, bf16 against fp64."""
    here = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    there = {name: x.double().requires_grad_() for name, x in inputs.items()}
    out, expected = ours(**here), exact(**there)
    assert_rounded_once(out, expected.detach(), "result")
    g = random(*out.shape, seed=99)
    out.backward(g)
    expected.backward(g.double())
    for name, x in here.items():
        assert x.grad is not None
        assert_rounded_once(x.grad, there[name].grad, f"gradient of {name}")


def with_weight(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight))
    del norm.weight
    norm.weight = weight  # not a parameter of its own: its gradient is looked at
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Norm, modulation and rotation
# ---------------------------------------------------------------------------------------------------------------------


def test_the_norm() -> None:
    inputs = {"x": random(5, 7, 36), "weight": random(36, seed=1, around=1.0)}
    compare(lambda x, weight: with_weight(weight)(x), second_network.rms, inputs)


@pytest.mark.parametrize("rows", [1, 7])
def test_the_norm_and_its_modulation(rows: int) -> None:
    inputs = {"x": random(5, 7, 36), "weight": random(36, seed=1, around=1.0)}
    inputs |= {"shift": random(5, rows, 36, seed=2), "scale": random(5, rows, 36, seed=3)}

    def ours(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return with_weight(weight).modulated(x, shift, scale)

    compare(ours, lambda x, weight, shift, scale: second_network.rms(x, weight) * (1 + scale) + shift, inputs)


def test_the_modulation_alone() -> None:
    inputs = {"x": random(5, 7, 36), "shift": random(5, 7, 36, seed=2), "scale": random(5, 7, 36, seed=3)}
    compare(modulate, lambda x, shift, scale: x * (1 + scale) + shift, inputs)


@pytest.mark.parametrize("compiling", [False, True])
def test_the_norm_and_the_rotation_of_queries_and_keys(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As real numbers, too, which is how torch.compile is shown the rotation."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    turns = second_network.rope_turns(3, 5, 12)
    rope = turns.real.float(), turns.imag.float()

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        normed = second_network.rms(x, weight)
        cos, sin = (table.double()[:, None] for table in rope)
        a, b = normed[..., 0::2], normed[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    inputs = {"x": random(2, 15, 3, 12), "weight": random(12, seed=1, around=1.0)}
    compare(lambda x, weight: with_weight(weight).rotated(x, rope), exact, inputs)


def test_queries_and_keys_are_those_of_the_linear_layer_normed_and_turned() -> None:
    torch.manual_seed(0)
    qkv, q_norm, k_norm = nn.Linear(36, 108, bias=False).bfloat16(), RMSNorm(12).bfloat16(), RMSNorm(12).bfloat16()
    with torch.no_grad():
        for seed, norm in enumerate((q_norm, k_norm)):
            norm.weight.copy_(random(12, seed=seed, around=1.0))
    turns, x = second_network.rope_turns(3, 5, 12), random(2, 15, 36)
    q, k, v = projected(x, qkv, q_norm, k_norm, (turns.real.float(), turns.imag.float()), heads=3)
    parts = qkv(x).double().view(2, 15, 3, 3, 12).unbind(2)
    for found, part, norm in ((q, parts[0], q_norm), (k, parts[1], k_norm)):
        normed = second_network.rms(part, norm.weight.double())
        turned = torch.complex(normed[..., 0::2], normed[..., 1::2]) * turns[:, None]
        assert_rounded_once(found.detach(), torch.view_as_real(turned).flatten(-2).detach())
    assert torch.equal(v.double(), parts[2])


# ---------------------------------------------------------------------------------------------------------------------
# Attention, times, tables
# ---------------------------------------------------------------------------------------------------------------------


def test_the_softmax() -> None:
    """Scores of some dozens, which in bf16 would be 10 % wrong after the exponential."""
    q, k, v = 6 * random(2, 37, 3, 12), 6 * random(2, 37, 3, 12, seed=1), random(2, 37, 3, 12, seed=2)
    mask = (torch.arange(37) < torch.tensor([[20], [12]])) | (torch.arange(37) >= 20)  # 20 tokens of text, 17 patches
    wide = [part.double().transpose(1, 2) for part in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(-1, -2) / math.sqrt(12)
    for some in (None, mask):
        masked = scores if some is None else scores.masked_fill(~some[:, None, None], -math.inf)
        expected = (masked.softmax(-1) @ wide[2]).transpose(1, 2).flatten(2)
        bias = None if some is None else key_bias(some[:, :20], 17, q.dtype)
        error = (attention(q, k, v, bias).double() - expected).norm() / expected.norm()
        assert error < 0.003, "three times what rounding the result alone makes"


def test_the_sinusoids_of_the_time() -> None:
    embedder, seen = TimestepEmbedder(8).bfloat16(), []
    embedder.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    t = torch.rand(23, generator=torch.Generator().manual_seed(0))
    embedder(t)
    angle = t.double()[:, None] * 10.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    assert_rounded_once(seen[0], torch.cat([angle.cos(), angle.sin()], -1))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_attention_of_a_bf16_network_turns_by_fp32_tables(name: str) -> None:
    config = NETWORKS[name]
    net = build(config).bfloat16()
    tables: list[Any] = []
    for module in net.modules():
        if isinstance(module, Attention | JointAttention):
            module.register_forward_pre_hook(
                lambda _, inputs: tables.append(inputs[-1:] if len(inputs) < 3 else inputs[2:4])
            )
    told = (torch.tensor([0, 3]),) if name == "classes" else (random(2, 5, 10), torch.ones(2, 5, dtype=torch.bool))
    net(torch.zeros(2, 3, 12, 20), torch.rand(2), *told)
    assert len(tables) == 2, "one in a patch block, one in a PiT block"
    patches = second_network.rope_turns(3, 5, 12)
    words = torch.exp(1j * torch.arange(5)[:, None] * 10_000.0 ** (-torch.arange(6, dtype=torch.float64) / 6))
    for found in tables:
        for (cos, sin), exact in zip(found, (patches, words), strict=False):
            assert cos.dtype == sin.dtype == torch.float32
            torch.testing.assert_close(torch.complex(cos.double(), sin.double()), exact, rtol=0, atol=1e-7)

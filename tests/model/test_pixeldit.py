"""The network against a second implementation, hand counts, and the faults it must not have."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapix.config import ModelConfig, pixeldit_b, pixeldit_l, pixeldit_xl, preset
from megapix.model import PixelDiT, build, embed, layers, pixeldit
from megapix.model import pixeldit_t2i as text
from tests.model.test_pixeldit_t2i import TEXT
from tests.support import second_network

SMALL = ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=3)


def randomised(config: ModelConfig, seed: int = 0) -> PixelDiT:
    """A network none of whose parameters is at its (often zero) initial value."""
    torch.manual_seed(seed)
    net = PixelDiT(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def inputs(batch: int = 2, height: int = 8, width: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.tensor([3, 1])[:batch]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("modulation", ["pre", "post"])
@pytest.mark.parametrize(
    "size",
    [(8, 12), pytest.param((12, 8), marks=pytest.mark.long), (4, 16), pytest.param((8, 8), marks=pytest.mark.long)],
)
def test_matches_the_reference(mlp: str, modulation: str, size: tuple[int, int]) -> None:
    config = ModelConfig(**{**SMALL.__dict__, "mlp": mlp, "modulation": modulation})
    net = randomised(config)
    x, t, y = inputs(2, *size)
    expected = second_network.pixeldit(net.state_dict(), config.patch_size, x, t, y)
    torch.testing.assert_close(net(x, t, y).double(), expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1, "the network does something"


def test_bf16_is_bf16_with_fp32_inside_the_sensitive_operations() -> None:
    net = randomised(SMALL).bfloat16()
    x, t, y = inputs()
    seen: dict[str, torch.dtype] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, i, o, name=name: seen.update({name: (i[0].dtype, o.dtype)}))
    out = net(x, t, y)
    assert out.dtype == torch.bfloat16
    assert set(seen.values()) == {(torch.bfloat16, torch.bfloat16)}
    assert any("adaLN" in name for name in seen)
    # Norm statistics of values whose squares overflow nothing but whose bf16 sum would stall: 4096 equal entries.
    norm = layers.RMSNorm(4096).bfloat16()
    torch.testing.assert_close(norm(torch.full((1, 4096), 3.0, dtype=torch.bfloat16)), torch.ones(1, 4096).bfloat16())
    # x·(1+scale)+shift is rounded once: 1.0·(1 + 2^-9) + (-1) is 2^-9, which bf16 arithmetic would lose.
    tiny = torch.full((1, 16), 2.0**-9, dtype=torch.bfloat16)
    one, minus = torch.ones(1, 16).bfloat16(), -torch.ones(1, 16).bfloat16()
    assert layers.modulate(one, minus, tiny)[0, 0].item() == 2.0**-9
    normed = layers.RMSNorm(16).bfloat16().modulated(one, minus, tiny)[0, 0].item()
    assert normed == pytest.approx(2.0**-9, rel=1e-3), "norm and modulation are rounded once, at the end"


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 5, 8)])
def test_norm_and_modulation_against_the_formula(shape: tuple[int, ...]) -> None:
    x, weight = doubles(2, 5, 8), doubles(8)
    shift, scale = doubles(*shape, seed=1), doubles(*shape, seed=2)
    expected = second_network.rms(x, weight) * (1 + scale) + shift
    agrees(norm_of(weight).modulated(x, shift, scale), expected)
    assert torch.autograd.gradcheck(layers._NormModulate.apply, (x, weight, shift, scale))


def test_norm_alone_and_modulation_alone_against_the_formula() -> None:
    x, weight, shift, scale = doubles(2, 5, 8), doubles(8), doubles(2, 5, 8, seed=1), doubles(2, 5, 8, seed=2)
    agrees(norm_of(weight)(x), second_network.rms(x, weight))
    assert torch.autograd.gradcheck(layers._Norm.apply, (x, weight))
    agrees(layers.modulate(x, shift, scale), x * (1 + scale) + shift)
    assert torch.autograd.gradcheck(layers._Modulate.apply, (x, shift, scale))


def test_norm_and_rotation_against_complex_numbers() -> None:
    x, weight = doubles(2, 6, 3, 8), doubles(8)
    turns = second_network.rope_turns(2, 3, 8)
    rope = turns.real.contiguous(), turns.imag.contiguous()
    normed = second_network.rms(x, weight)
    expected = torch.complex(normed[..., 0::2], normed[..., 1::2]) * turns[None, :, None, :]
    agrees(norm_of(weight).rotated(x, rope), torch.stack([expected.real, expected.imag], -1).flatten(-2))
    assert torch.autograd.gradcheck(layers._NormRotate.apply, (x, weight, *rope))


def test_attention_that_is_not_fused_gives_the_same_gradients() -> None:
    """Where no fused kernel fits, torch takes plain products, whose gradients lie otherwise in memory."""

    def gradients(net: PixelDiT) -> list[torch.Tensor]:
        net.zero_grad()
        net(*inputs()).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    net = randomised(SMALL)
    expected = gradients(net)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(gradients(net), expected, rtol=1e-4, atol=1e-5)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def norm_of(weight: torch.Tensor) -> layers.RMSNorm:
    norm = layers.RMSNorm(len(weight)).double()
    norm.weight = nn.Parameter(weight.detach().clone())
    return norm


def agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def hand_count(c: ModelConfig) -> int:
    """Parameters counted with pencil and paper, layer by layer."""
    D, d, P, C, h = c.width, c.pixel_width, c.patch_size**2, 3, c.width // c.heads
    attention = D * 3 * D + (D * D + D) + 2 * h
    gelu, swiglu = D * 4 * D + 4 * D + 4 * D * D + D, 3 * D * int(2 / 3 * 4 * D)
    patch_block = 2 * D + attention + (gelu if c.mlp == "gelu" else swiglu) + (D * 6 * D + 6 * D)
    chunks = 6 if c.modulation == "pre" else 4
    pit_block = (
        2 * d
        + (P * d * D + D)
        + attention
        + (D * P * d + P * d)
        + (d * 4 * d + 4 * d + 4 * d * d + d)
        + (D * P * chunks * d + P * chunks * d)
    )
    embedders = (C * P * D + D) + (256 * D + D + D * D + D) + (c.num_classes + 1) * D + (C * d + d)
    return embedders + c.depth * patch_block + c.pixel_depth * pit_block + d + (d * C + C)


@pytest.mark.parametrize(
    ("config", "depths", "millions"),
    [
        (pixeldit_b(), (12, 2, 768, 12), {("swiglu", "pre"): 184.7, ("gelu", "pre"): 184.8}),
        (pixeldit_l(), (22, 4, 1024, 16), {("swiglu", "pre"): 569.6, ("gelu", "pre"): 569.8}),
        (
            pixeldit_xl(),
            (26, 4, 1152, 16),
            {("swiglu", "pre"): 797.4, ("gelu", "pre"): 797.5, ("swiglu", "post"): 759.6, ("gelu", "post"): 759.8},
        ),
    ],
)
def test_parameter_counts(config: ModelConfig, depths: tuple[int, ...], millions: dict[tuple[str, str], float]) -> None:
    assert (config.depth, config.pixel_depth, config.width, config.heads) == depths
    assert (config.mlp, config.modulation, config.patch_size, config.pixel_width) == ("gelu", "pre", 16, 16)
    for (mlp, modulation), expected in millions.items():
        variant = ModelConfig(**{**config.__dict__, "mlp": mlp, "modulation": modulation})
        with torch.device("meta"):
            net = PixelDiT(variant)
        total = sum(p.numel() for p in net.parameters())
        assert total == hand_count(variant)
        assert round(total / 1e6, 1) == expected
        assert (len(net.patch_blocks), len(net.pixel_blocks)) == (config.depth, config.pixel_depth)


def test_presets_use_these_networks() -> None:
    networks = {"b": pixeldit_b(), "l": pixeldit_l(), "xl": pixeldit_xl()}
    for name, network in networks.items():
        for size in (256, 512):
            config = preset(f"{name}-{size}")
            assert config.model == network
            assert config.data.image_size == size


def test_patch_mlp_is_gelu_unless_swiglu_is_asked_for() -> None:
    assert isinstance(PixelDiT(SMALL).patch_blocks[0].mlp, layers.GeluMlp)
    swiglu = PixelDiT(ModelConfig(**{**SMALL.__dict__, "mlp": "swiglu"}))
    assert isinstance(swiglu.patch_blocks[0].mlp, layers.SwiGluMlp)
    assert isinstance(swiglu.pixel_blocks[0].mlp, layers.GeluMlp), "the pixel MLP is GELU in both"


def test_patch_embedding_is_one_linear_layer() -> None:
    net = PixelDiT(SMALL)
    embedding = [m for m in net.s_embedder.modules() if not list(m.children())]
    assert [type(m) for m in embedding] == [nn.Linear]
    assert tuple(embedding[0].weight.shape) == (SMALL.width, 3 * SMALL.patch_size**2)
    assert not any(isinstance(m, nn.Conv2d) for m in net.modules())


def test_every_layer_class_is_used() -> None:
    configs = [SMALL, ModelConfig(**{**SMALL.__dict__, "mlp": "swiglu"}), TEXT]
    used = {type(m) for config in configs for m in build(config).modules()}
    defined = {
        cls
        for module in (embed, layers, pixeldit, text)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__.startswith("megapix")
    }
    assert len(defined) >= 10
    assert defined <= used, f"never used: {defined - used}"


def test_every_parameter_gets_a_gradient() -> None:
    net = randomised(SMALL)
    net(*inputs()).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_initialisation() -> None:
    torch.manual_seed(0)
    net = PixelDiT(ModelConfig(width=256, depth=1, heads=4, pixel_depth=1, num_classes=1000))
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name == "s_embedder.proj.bias":
            assert not p.any(), f"{name} starts at zero"
        elif "norm" in name:
            assert bool((p == 1).all()), f"{name} starts at one"
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert net.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = (6 / (256 + 768)) ** 0.5
    weight = net.s_embedder.proj.weight
    assert bound * 0.99 < weight.abs().max().item() <= bound
    for layer in (net.patch_blocks[0].attn.qkv, net.pixel_blocks[0].compress_to_attn, net.patch_blocks[0].mlp.fc1):
        bound = layer.in_features**-0.5
        assert bound * 0.99 < layer.weight.abs().max().item() <= bound, "torch's own initialisation"
    assert not net(*inputs(2, 32, 32)).any(), "the velocity starts at zero"


def test_refuses_a_size_that_is_not_whole_patches() -> None:
    with pytest.raises(ValueError, match="10x8 is not divisible by the patch size 4"):
        PixelDiT(SMALL)(torch.zeros(1, 3, 10, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_position_tables_are_computed_once_for_a_size() -> None:
    tables = (embed.rope_table, embed.pixel_position_table, embed.timestep_frequencies)
    net, args = randomised(SMALL), inputs()
    net(*args)
    before = [table.cache_info().misses for table in tables]
    for _ in range(3):
        net(*args)
    assert [table.cache_info().misses for table in tables] == before
    net(*inputs(2, 16, 12))
    assert embed.rope_table.cache_info().misses == before[0] + 1

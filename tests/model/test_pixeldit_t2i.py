"""The text network against a second implementation, hand counts, and what padding must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megapix.config import ModelConfig, pixeldit_t2i, preset
from megapix.model import Alignment, PixelDiT, TextPixelDiT, build, embed
from tests.support import second_network

TEXT = ModelConfig(
    patch_size=4,
    width=32,
    depth=2,
    heads=2,
    pixel_width=8,
    pixel_depth=2,
    pixel_attention_width=24,
    pixel_heads=3,
    mlp="swiglu",
    num_classes=0,
    text_width=10,
    text_tokens=7,
)
LENGTHS = (5, 2)


def randomised(config: ModelConfig) -> PixelDiT:
    """A network none of whose parameters is at its (often zero) initial value."""
    torch.manual_seed(0)
    net = build(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def inputs(height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, times, text features of 5 places, and a mask with 5 and 2 real tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, height, width, generator=generator)
    y = torch.randn(2, max(LENGTHS), TEXT.text_width, generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return x, torch.rand(2, generator=generator), y, mask


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("modulation", ["pre", "post"])
@pytest.mark.parametrize("size", [(8, 12), (16, 4), (8, 8)])
def test_matches_the_reference(mlp: str, modulation: str, size: tuple[int, int]) -> None:
    config = replace(TEXT, mlp=mlp, modulation=modulation)  # type: ignore[arg-type]
    net = randomised(config)
    x, t, y, mask = inputs(*size)
    expected = second_network.pixeldit(net.state_dict(), config.patch_size, x, t, y, mask)
    torch.testing.assert_close(net(x, t, y, mask).double(), expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1, "the network does something"


def test_attention_of_the_pit_blocks_may_have_the_patch_pathways_width() -> None:
    config = replace(TEXT, pixel_attention_width=0, pixel_heads=0)
    net = randomised(config)
    x, t, y, mask = inputs()
    expected = second_network.pixeldit(net.state_dict(), config.patch_size, x, t, y, mask)
    torch.testing.assert_close(net(x, t, y, mask).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing_and_a_real_token_does(dtype: torch.dtype) -> None:
    net = randomised(TEXT).to(dtype)
    x, t, y, mask = inputs()

    def gradients(y: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        net.zero_grad()
        out = net(x, t, y, mask)
        out.float().square().mean().backward()
        return out.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    out, grads = gradients(y, mask)
    for stranger in (1e30, -7.0, float("nan"), float("inf")):
        other = y.clone()
        other[1, LENGTHS[1] :] = stranger
        again, other_grads = gradients(other, mask)
        assert torch.equal(out, again), stranger
        assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True)), stranger
    more = mask.clone()
    more[1, LENGTHS[1]] = True
    assert not torch.equal(net(x, t, y, more)[1], out[1]), "one more real token"
    torch.testing.assert_close(net(x, t, y, more)[0], out[0], rtol=1e-2, atol=1e-2)


def test_padding_to_any_length_gives_what_no_padding_gives() -> None:
    net = randomised(TEXT).double()
    x, t, y, mask = inputs()
    whole = net(x, t, y, mask)
    for b, length in enumerate(LENGTHS):
        alone = net(x[b : b + 1], t[b : b + 1], y[b : b + 1, :length])
        torch.testing.assert_close(alone, whole[b : b + 1], rtol=1e-9, atol=1e-9)


def test_tokens_have_an_order_and_the_table_an_end() -> None:
    net = randomised(TEXT)
    x, t, y, mask = inputs()
    mask[:] = True
    turned = y[:, [1, 0, 2, 3, 4]]
    assert not torch.allclose(net(x, t, y, mask), net(x, t, turned, mask), atol=1e-4)
    long = torch.zeros(2, 8, TEXT.text_width)
    with pytest.raises(ValueError, match="8 text tokens: the position table has 7 rows"):
        net(x, t, long)


def hand_count(c: ModelConfig) -> int:
    """Parameters counted with pencil and paper, layer by layer."""
    D, A, d, P, C = c.width, c.pixel_attention_width or c.width, c.pixel_width, c.patch_size**2, 3
    h, pixel_h = D // c.heads, A // (c.pixel_heads or c.heads)
    mlp = 3 * D * int(2 / 3 * 4 * D)
    stream = 2 * D + (3 * D * D + 2 * h + D * D + D) + mlp + (6 * D * D + 6 * D)
    pit_block = (
        2 * d
        + (P * d * A + A)
        + (3 * A * A + 2 * pixel_h + A * A + A)
        + (A * P * d + P * d)
        + (d * 4 * d + 4 * d + 4 * d * d + d)
        + (D * P * 6 * d + P * 6 * d)
    )
    embedders = (C * P * D + D) + (256 * D + D + D * D + D) + (c.text_width * D + D + D) + (C * d + d)
    return embedders + c.text_tokens * D + c.depth * 2 * stream + c.pixel_depth * pit_block + d + (d * C + C)


def test_parameter_count_of_the_published_network() -> None:
    model = pixeldit_t2i()
    sizes = (model.width, model.heads, model.depth, model.pixel_depth, model.text_width, model.text_tokens)
    assert sizes == (1536, 24, 14, 2, 2304, 300)
    assert (model.pixel_attention_width, model.pixel_heads, model.pixel_width, model.patch_size) == (1152, 16, 16, 16)
    with torch.device("meta"):
        total = sum(p.numel() for p in build(model).parameters())
    assert total == hand_count(model) == 1_302_470_787
    assert round(total / 1e6, 1) == 1302.5


def test_the_three_stages_are_one_network() -> None:
    stages = {name: preset(name) for name in ("t2i-512", "t2i-512-ms", "t2i-1024-ms")}
    assert {stage.model for stage in stages.values()} == {pixeldit_t2i()}
    found = {
        name: (c.data.image_size, c.flow.time_shift, c.optim.lr, c.optim.grad_clip, c.optim.warmup)
        for name, c in stages.items()
    }
    warmup = 2000 * 256
    assert found == {
        "t2i-512": (512, 3.0, 1e-4, 0.2, warmup),
        "t2i-512-ms": (512, 3.0, 1e-4, 0.2, warmup),
        "t2i-1024-ms": (1024, 4.0, 2e-5, 0.1, warmup),
    }


def test_layers_that_are_the_same_are_shared() -> None:
    """Beside its conditioning a text network is the class-conditional one: same layers, names and shapes."""
    classes = build(replace(TEXT, num_classes=3, text_width=0))
    own = ("y_embedder", "y_pos_embedding", "patch_blocks")
    shapes = [
        {name: p.shape for name, p in net.named_parameters() if not name.startswith(own)}
        for net in (build(TEXT), classes)
    ]
    assert shapes[0] == shapes[1]
    assert isinstance(build(TEXT), TextPixelDiT)
    assert TextPixelDiT.pixel_pathway is PixelDiT.pixel_pathway
    assert TextPixelDiT.patch_pathway is PixelDiT.patch_pathway


def test_every_parameter_but_the_last_text_layers_gets_a_gradient() -> None:
    net = randomised(TEXT)
    net(*inputs()).square().mean().backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    last = "patch_blocks.1."
    unread = ("attn.q_norm_y.weight", "attn.proj_y.weight", "attn.proj_y.bias", "norm_y2.weight")
    assert silent == {
        *(last + name for name in unread),
        *(f"{last}mlp_y.{part}.weight" for part in ("w1", "w2", "w3")),
    }


def test_initialisation_of_what_is_the_texts_own() -> None:
    torch.manual_seed(0)
    net = build(replace(TEXT, width=256, heads=4, text_tokens=300))
    assert net.y_pos_embedding.shape == (1, 300, 256)
    assert net.y_pos_embedding.std().item() == pytest.approx(1.0, rel=0.02)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert not p.any(), f"{name} starts at zero"
        elif "norm" in name:
            assert bool((p == 1).all()), f"{name} starts at one"
    assert not net(*inputs()).any(), "the velocity starts at zero"


def test_text_rope_by_hand() -> None:
    cos, sin = embed.text_rope_table(3, 8, torch.device("cpu"))
    expected = torch.tensor([[n * 10000.0 ** (-2 * k / 8) for k in range(4)] for n in range(3)], dtype=torch.float64)
    torch.testing.assert_close(cos.double(), expected.cos(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sin.double(), expected.sin(), rtol=1e-6, atol=1e-7)


def test_repa_takes_the_image_tokens_of_a_text_network() -> None:
    torch.manual_seed(0)
    net = build(TEXT, Alignment(layer=1, features=5))
    x, t, y, mask = inputs()
    tokens: list[Tensor] = []
    net.patch_blocks[0].register_forward_hook(lambda _block, _inputs, out: tokens.append(out[0]))
    velocity, projected = net(x, t, y, mask, grid=(2, 3))
    assert projected.shape == (2, 6, 5)
    torch.testing.assert_close(projected, net.projector(tokens[0]))
    assert torch.equal(velocity, net(x, t, y, mask))


LONG = replace(TEXT, text_tokens=150)


@pytest.mark.parametrize(("tokens", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128), (129, 150), (150, 150)])
def test_masked_text_is_padded_to_few_lengths_where_each_costs(tokens: int, padded: int) -> None:
    """Which changes nothing but rounding, in the output and in every gradient."""
    generator = torch.Generator().manual_seed(2)
    y, (x, t, _, _) = torch.randn(2, tokens, LONG.text_width, generator=generator), inputs()
    mask = torch.arange(tokens) < torch.tensor([[tokens], [-(-tokens // 3)]])
    nets = [randomised(LONG), randomised(LONG)]
    nets[1].few_lengths = True  # type: ignore[assignment]
    assert [net.ready((y, mask))[0].shape[1] for net in nets] == [tokens, padded]  # type: ignore[union-attr]
    shown = nets[1].ready((y, mask))[1]
    assert shown is not None
    assert torch.equal(shown[:, :tokens], mask)
    assert not shown[:, tokens:].any()
    outs = [net(x, t, y, mask) for net in nets]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    for out in outs:
        out.square().mean().backward()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_text_is_padded_to_the_runs_longest_caption_at_most() -> None:
    net = build(LONG)
    net.few_lengths, net.most_tokens = True, 77  # type: ignore[assignment]
    lengths = [
        net.ready((torch.ones(1, n, 10), torch.ones(1, n, dtype=torch.bool)))[0].shape[1] for n in (9, 65, 77, 90)
    ]  # type: ignore[union-attr]
    assert lengths == [64, 77, 77, 90], "what is longer is taken as it comes"
    assert net.ready((torch.ones(1, 9, 10), None))[0].shape[1] == 9, "nothing is padded without a mask"  # type: ignore[union-attr]


def test_a_new_length_of_text_needs_no_new_table() -> None:
    net, (x, t, y, mask) = randomised(LONG), inputs()
    net(x, t, y, mask)
    before = embed.text_rope_table.cache_info().misses
    for tokens in range(1, 51):
        net(x, t, y[:, :1].expand(-1, tokens, -1), None)
    assert embed.text_rope_table.cache_info().misses == before


@pytest.mark.parametrize("channels", [8, 64, 72])
def test_the_rows_of_the_longest_texts_table_are_those_of_a_shorter_one(channels: int) -> None:
    tables = embed.text_rope_table(300, channels, torch.device("cpu"))
    for tokens in (1, 7, 64, 299):
        own = embed.text_rope_table(tokens, channels, torch.device("cpu"))
        assert all(torch.equal(table[:tokens], short) for table, short in zip(tables, own, strict=True))


def test_repa_of_text_without_a_mask() -> None:
    torch.manual_seed(0)
    net, (x, t, y, mask) = build(TEXT, Alignment(layer=1, features=5)), inputs()
    found = net(x, t, y, grid=(2, 3))
    expected = net(x, t, y, torch.ones_like(mask), grid=(2, 3))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

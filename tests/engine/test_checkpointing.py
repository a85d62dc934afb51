"""Checkpointing policies: the same gradients, nothing computed more often than it should be, and bytes by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.activation_memory import Held, LiveStorages, held_by, patch_pathway, pixel_pathway
from benchmarks.made_up import told
from megapix.config import MachineConfig, ModelConfig, PixelPolicy, pixeldit_xl
from megapix.costs import activations
from megapix.engine import checkpointing, chunked
from megapix.engine.offload import offloaded
from megapix.model import PixelDiT
from tests.model import test_pixeldit_t2i
from tests.model.test_pixeldit import SMALL, inputs
from tests.model.test_pixeldit_t2i import TEXT, randomised

POST = dataclasses.replace(SMALL, modulation="post")
CONFIGS = {"pre": SMALL, "post": POST, "text": TEXT}
POLICIES: tuple[PixelPolicy, ...] = typing.get_args(PixelPolicy)
EXACT = [policy for policy in POLICIES if policy != "chunked"]
"""Those whose gradients are the same bit for bit; 'chunked' adds up those of weights in another order."""
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def inputs_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """Two images with classes, or with text of which one is padded."""
    return test_pixeldit_t2i.inputs() if config.text_width else inputs()


def with_policies(config: ModelConfig, pixel: PixelPolicy, patch: str | int) -> PixelDiT:
    net = randomised(config)
    checkpointing.apply(net, MachineConfig(pixel_checkpointing=pixel, patch_checkpointing=patch))
    return net


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[object] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@functools.cache
def gradients(config: ModelConfig, pixel: PixelPolicy, patch: str | int) -> dict[str, Tensor]:
    net = with_policies(config, pixel, patch)
    net(*inputs_of(config)).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("patch", ["none", "full", 2])
@pytest.mark.parametrize("pixel", EXACT)
def test_gradients_are_the_same_bit_for_bit(config: ModelConfig, pixel: PixelPolicy, patch: str | int) -> None:
    expected, found = gradients(config, "none", "none"), gradients(config, pixel, patch)
    assert found.keys() == expected.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(gradient, found[name])] == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("patches", [1, 4, 5, 1000])
def test_a_few_patches_at_a_time_give_the_same_but_for_the_order_of_sums(
    config: ModelConfig, patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve patches, two images together: one by one, without and with a rest, and all at once."""
    monkeypatch.setattr(chunked, "CHUNK", patches)
    net = with_policies(config, "chunked", "full")
    out = net(*inputs_of(config))
    torch.testing.assert_close(out, randomised(config)(*inputs_of(config)), rtol=1e-5, atol=1e-6)
    out.square().mean().backward()
    expected, found = gradients(config, "none", "none"), dict(net.named_parameters())
    assert expected.keys() == {name for name, p in found.items() if p.grad is not None}
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name].grad, gradient, rtol=1e-5, atol=5e-6 * scale, msg=name)


@pytest.mark.parametrize("frozen", ["norm1", "norm2", "mlp", "adaLN_modulation"])
def test_chunks_leave_what_is_frozen_alone(frozen: str) -> None:
    net = with_policies(SMALL, "chunked", "none")
    for name, p in net.named_parameters():
        p.requires_grad = f".{frozen}." not in name
    net(*inputs()).square().mean().backward()
    for name, gradient in gradients(SMALL, "none", "none").items():
        p = net.get_parameter(name)
        assert (p.grad is None) == (f".{frozen}." in name), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=5e-6 * float(gradient.abs().max()), msg=name)


def test_a_copy_of_a_network_in_chunks_has_its_own_weights() -> None:
    net = with_policies(SMALL, "chunked", "none")
    expected, other = net(*inputs()), copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(other(*inputs()), expected)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_no_tensor_but_the_pixels_themselves_grows_with_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 16)
    largest = {}
    for policy in ("full", "chunked"):
        net, (x, t, *_) = with_policies(SMALL, policy, "none"), inputs(1, 64, 64)
        with Largest() as made:
            net(x, t, *told(SMALL, 1, 0)).square().mean().backward()
        largest[policy] = made.numbers
    pixels = 64 * 64 * SMALL.pixel_width
    assert largest == {"full": 6 * pixels, "chunked": pixels}


# Two blocks in each pathway. Products of a PiT block: modulation, compaction, qkv, projection, expansion and two of the
# MLP; of a patch block: modulation, qkv, projection and two of the MLP. The output layer's is not needed again. A text
# block has modulation, qkv, projection and three of the MLP for each stream; the last only the first two of the text's.
# With 'chunked' the modulation is two products, each of its own columns: two and the MLP's come again, and the output
# layer's; one more in forward and two in backward are but the parts of a whole.
@pytest.mark.parametrize(
    ("config", "pixel", "patch", "attention", "products"),
    [
        (SMALL, "none", "none", 0, 0),
        (SMALL, "selective", "none", 0, 0),
        (SMALL, "selective_modulation", "none", 0, 2),
        (SMALL, "full", "none", 2, 2 * 7),
        (SMALL, "chunked", "none", 0, 2 * (2 + 2 + 3) + 1),
        (SMALL, "offload", "none", 0, 0),
        (SMALL, "none", "full", 2, 2 * 5),
        (SMALL, "none", 2, 1, 5),
        (SMALL, "none", 3, 0, 0),
        (TEXT, "full", "none", 2, 2 * 7),
        (TEXT, "none", "full", 2, 2 * 6 + (6 + 2)),
        (TEXT, "none", 2, 1, 6 + 2),
    ],
)
def test_what_is_computed_again(
    config: ModelConfig, pixel: PixelPolicy, patch: str | int, attention: int, products: int
) -> None:
    def forward_and_backward(net: PixelDiT) -> Counter[object]:
        with Operations() as operations:
            net(*inputs_of(config)).square().mean().backward()
        return operations.count

    plain, found = (forward_and_backward(with_policies(config, *p)) for p in (("none", "none"), (pixel, patch)))
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    assert found[ATTENTION] - plain[ATTENTION] == attention
    assert sum(found[op] - plain[op] for op in matmuls) == products


@pytest.mark.parametrize("config", [SMALL, TEXT], ids=["classes", "text"])
def test_nothing_is_kept_and_nothing_wrapped_without_gradients(config: ModelConfig) -> None:
    asked = inputs_of(config)
    for policy in POLICIES:
        net = with_policies(config, policy, "full").eval()
        with torch.no_grad():
            assert held_by(lambda net=net: net(*asked))[0] == 2 * 3 * 8 * 12 * 4, "the result alone"


@pytest.mark.long
@pytest.mark.parametrize(("config", "pixel"), [(SMALL, "selective_modulation"), (SMALL, "offload")])
def test_compiled_blocks_give_the_same_gradients_and_keep_as_much(config: ModelConfig, pixel: PixelPolicy) -> None:
    """What autograd saves of compiled blocks is counted by its hooks: they see the results of a graph."""
    plain, net = randomised(config), randomised(config)
    machine = MachineConfig(pixel_checkpointing=pixel, patch_checkpointing=2, compile=True)
    checkpointing.apply(net, machine)
    given = (*inputs(2, 32, 32)[:2], *told(config, 2, 7))
    plain(*given).square().mean().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        if (storage := saved.untyped_storage()).data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        out = net(*given)
    if pixel != "offload":  # it has hooks of its own
        counted = activations.per_image(config, 32, 4, machine, 7)
        assert sum(sizes.values()) == pytest.approx(2 * (counted["patch"] + counted["pixel"]), rel=0.15)
    out.square().mean().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_counter_on_cases_counted_by_hand() -> None:
    x, weight = torch.randn(1000), torch.randn(1000, requires_grad=True)
    # exp keeps its result (4,000 bytes); the product by 2 keeps nothing and its result is the one returned (4,000).
    assert held_by(lambda: (x * weight).exp() * 2.0) == Held(8_000, 0)
    assert held_by(lambda: x.view(10, 100)) == Held(0, 0)


class Twice(nn.Module):
    """Two products without biases, which start from 100 rows of 50 numbers, and exp between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(50, 40, bias=False), nn.Linear(40, 30, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).exp())


@pytest.mark.parametrize(
    ("policy", "device", "host"),
    [
        ("none", 100 * 40 + 100 * 30, 0),  # exp keeps its result, which the second product needs, too
        ("selective", 100 * 40 + 100 * 30, 0),  # both products
        ("selective_modulation", 100 * 30, 0),  # the second, which is the result
        ("full", 100 * 30, 0),  # the result
        ("offload", 100 * 30, 100 * 40 + 100 * 50),  # exp's result and the input
    ],
)
def test_each_policy_on_a_case_counted_by_hand(policy: PixelPolicy, device: int, host: int) -> None:
    block, x = Twice(), torch.randn(100, 50)
    checkpointing._prepare(block, policy, None)
    assert held_by(lambda: block(x)) == Held(device * 4, host * 4)


OWN_WIDTH = {"pixel_attention_width": 96, "pixel_heads": 3}
WITH_TEXT = {"num_classes": 0, "text_width": 40}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "swiglu": {"mlp": "swiglu"},
    "post with own attention width": {"modulation": "post"} | OWN_WIDTH,
    "text": WITH_TEXT,
    "text with swiglu": WITH_TEXT | {"mlp": "swiglu", "depth": 3} | OWN_WIDTH,
}
QUICK = ("default",)


@pytest.mark.parametrize(
    "change", [pytest.param(c, id=i, marks=[] if i in QUICK else pytest.mark.long) for i, c in CHANGES.items()]
)
def test_bytes_counted_by_hand_are_those_measured(change: dict[str, Any]) -> None:
    model = ModelConfig(patch_size=8, width=64, depth=4, heads=2, pixel_depth=2, num_classes=3)
    model = dataclasses.replace(model, **change)
    for pixel in POLICIES:
        machine = MachineConfig(pixel_checkpointing=pixel)
        counted = activations.per_image(model, 32, 2, machine)["pixel"], activations.on_host(model, 32, 2, machine)
        assert counted == pixel_pathway(model, machine, 32), pixel
    for patch in ("none", 2, 3, "full"):
        machine = MachineConfig(patch_checkpointing=patch)
        assert activations.per_image(model, 32, 2, machine, 7)["patch"] == patch_pathway(model, machine, 32, 7).device


class Peak(LiveStorages):
    """The most bytes alive at once of the storages made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.bytes = max(self.bytes, sum(self.alive().values()))
        return out


@pytest.mark.parametrize("modulation", ["pre", pytest.param("post", marks=pytest.mark.long)])
@pytest.mark.parametrize("images", [1, 2])
def test_backward_takes_no_more_than_is_planned(
    modulation: Literal["pre", "post"], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pixel pathway, with two chunks an image, and as many weights as make a difference."""
    for module in (chunked, activations):
        monkeypatch.setattr(module, "CHUNK", 128)
    model = ModelConfig(width=64, depth=1, heads=2, pixel_depth=2, num_classes=3, modulation=modulation)
    peaks = {}
    for policy in ("full", "chunked"):
        machine = MachineConfig(pixel_checkpointing=policy)
        net = with_policies(model, policy, "none")
        x, s = torch.randn(images, 3, 256, 256), torch.randn(images, 256, 64, requires_grad=True)
        net.pixel_pathway(x, s)  # position tables are made once, before the count
        with Peak() as peak:
            net.pixel_pathway(x, s).square().mean().backward()
        peaks[policy] = peak.bytes
        held = images * activations.per_image(model, 256, 4, machine)["pixel"]
        assert 0.6 < (peak.bytes - held) / activations.backward(model, 256, 4, machine, 0, images) < 1, policy
    assert peaks["chunked"] < (0.85 if images == 1 else 0.65) * peaks["full"]


def test_bytes_of_xl_at_256_pixels() -> None:
    """The figures of docs/architecture.md; the test above proves the count."""
    machines = [MachineConfig(pixel_checkpointing=policy) for policy in POLICIES]
    held = [activations.per_image(pixeldit_xl(), 256, 2, machine)["pixel"] / 2**20 for machine in machines]
    for policy, mib, most in zip(POLICIES, held, (190, 125, 75, 11, 45, 1), strict=True):
        assert mib <= most, policy


def test_an_offloaded_storage_moves_once_whatever_is_saved_of_it() -> None:
    block, x, shared = nn.Linear(8, 6), torch.randn(4, 8), torch.randn(3, requires_grad=True)

    def forward(x: Tensor, shared: Tensor) -> Tensor:
        a, b = block(x).chunk(2, dim=-1)  # two views of one storage
        return a * b * shared

    run = offloaded(block, forward)
    # To the host: the input [4, 8], the linear layer's result [4, 6], the first product [4, 3]; `shared` stays.
    assert held_by(lambda: run(x, shared)) == Held(4 * 3 * 4, (4 * 8 + 4 * 6 + 4 * 3) * 4)
    wanted = [*block.parameters(), shared]
    for kept in (False, True):  # with a graph that is kept, everything comes back a second time
        out = run(x, shared).sum()
        for _ in range(1 + kept):
            found = torch.autograd.grad(out, wanted, retain_graph=kept)
            for gradient, expected in zip(found, torch.autograd.grad(forward(x, shared).sum(), wanted), strict=True):
                assert torch.equal(gradient, expected)

"""Attention: the mask as a bias, the kernel that is asked for, and which one computes it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megapix.config import Config, replace, validate
from megapix.engine.network import attention_of, be_deterministic, build_network
from megapix.errors import InputError
from megapix.model.attention import KERNELS, ROW, attention, chosen, key_bias, take
from tests.model.test_pixeldit import SMALL
from tests.model.test_pixeldit_t2i import TEXT, inputs, randomised
from tests.support.small_run import SMALL as RUN

CPU = torch.device("cpu")
aten = torch.ops.aten


class Called(TorchDispatchMode):
    """What torch is asked to compute, and with which arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.mark.parametrize(("tokens", "patches"), [(1, 1), (5, 6), (64, 64), (7, 9), (16, 17)])
def test_the_bias_of_a_mask(tokens: int, patches: int) -> None:
    """0 and -inf, as SDPA makes of a bool mask; rows a multiple of 16 apart, and never as far apart as they are long,
    so that their distance is no size of the text's."""
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)) > 0.5
    bias = key_bias(mask, patches, torch.bfloat16)
    keys = torch.cat([mask, torch.ones(3, patches, dtype=torch.bool)], 1)
    expected = torch.zeros(3, tokens + patches).masked_fill(~keys, -math.inf)
    assert torch.equal(bias, expected.bfloat16()[:, None, None])
    assert bias.stride(0) % ROW == 0
    assert bias.stride(-1) == 1
    assert bias.stride(0) > tokens + patches


def test_a_bias_and_a_mask_give_the_same_bits() -> None:
    q, k, v = (torch.randn(2, 11, 3, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    keys = torch.cat([mask, torch.ones(2, 6, dtype=torch.bool)], 1)[:, None, None]
    heads = (part.transpose(1, 2) for part in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, keys).transpose(1, 2).flatten(2)
    assert torch.equal(attention(q, k, v, key_bias(mask, 6, q.dtype)), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_only_the_kernel_that_is_asked_for_computes(masked: bool) -> None:
    x, t, y, mask = inputs()
    outs, flash = {}, {}
    for kernel in ("auto", "flash", "math"):
        net = randomised(TEXT)
        take(net, kernel)
        with Called() as called:
            outs[kernel] = net(x, t, y, mask if masked else None)
        flash[kernel] = sum(func is FLASH for func, _, _ in called.calls)
    assert flash == {"auto": 4, "flash": 4, "math": 0}
    assert torch.equal(outs["auto"], outs["flash"])
    torch.testing.assert_close(outs["math"], outs["auto"], rtol=1e-4, atol=1e-5)


def test_without_a_mask_there_is_none_anywhere() -> None:
    """Text of a fixed length runs as classes do: attention has no bias, and nothing is padded or masked."""
    net, (x, t, y, _) = randomised(TEXT), inputs()
    net.few_lengths = True  # type: ignore[assignment]
    with Called() as called:
        net(x, t, y)
    taken = [(args, kwargs) for func, args, kwargs in called.calls if func is FLASH]
    assert len(taken) == 4
    assert all(len(args) < 6 and kwargs.get("attn_mask") is None for args, kwargs in taken)
    others = {func for func, _, _ in called.calls}
    assert not others & {aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther, aten.constant_pad_nd.default}
    tensors = [a for _, args, _ in called.calls for a in args if isinstance(a, Tensor)]
    assert all(tensor.dtype != torch.bool for tensor in tensors)


def test_which_kernel_computes_on_cpus() -> None:
    sizes = 4, 16, 40, torch.bfloat16, CPU
    assert {name: chosen(*sizes, masked, name) for name in ("auto", *KERNELS) for masked in (True, False)} == {
        "auto": "flash",
        "flash": "flash",
        "cudnn": None,
        "efficient": None,
        "math": "math",
    }
    assert set(torch.nn.attention._cur_sdpa_kernel_backends()) >= {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}


def test_the_kernels_of_a_run_in_words() -> None:
    assert attention_of(RUN, CPU) == "flash for CPUs"
    assert attention_of(replace(RUN, "machine.attention", "math"), CPU) == "math for CPUs"


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_is_refused_with_those_that_can(kernel: str) -> None:
    text = Config(model=TEXT, precision="fp32", text=dataclasses.replace(RUN.text, max_tokens=7), data=RUN.data)
    for c, pathway, tokens in ((RUN, "patches", 16), (text, "patches with text", 23)):
        with pytest.raises(InputError) as refused:
            attention_of(replace(c, "machine.attention", kernel), CPU)
        said = str(refused.value)
        assert (
            f"machine.attention = {kernel!r} does not take the attention of {pathway}: {tokens} tokens in 2 heads"
            in said
        )
        assert said.endswith("on cpu; expected 'auto', 'flash', 'math'")
        assert ("with a mask" in said) == (c is text)


class Gpu:
    """Answers for a GPU: what torch's rules (sdp_utils.cpp) say about these inputs on it."""

    def __init__(self, order: tuple[str, ...], deterministic: bool = False) -> None:
        self.order, self.deterministic = order, deterministic

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> int:
        allowed = torch.nn.attention._cur_sdpa_kernel_backends()
        for name in self.order:
            fits = {
                "flash": bias is None and q.dtype == torch.bfloat16,
                "cudnn": q.dtype == torch.bfloat16 and not self.deterministic,
            }.get(name, True)
            if fits and KERNELS[name] in allowed:
                return int(KERNELS[name])
        raise RuntimeError("No available kernel. Aborting execution.")


HOPPER, AMPERE = ("cudnn", "flash", "efficient", "math"), ("flash", "efficient", "math", "cudnn")


@pytest.mark.parametrize(
    ("order", "deterministic", "precision", "text", "words"),
    [
        (HOPPER, False, "bf16", False, "cuDNN"),
        (HOPPER, True, "bf16", False, "flash"),
        (HOPPER, True, "bf16", True, "memory-efficient in patches with text, flash in pixels"),
        (HOPPER, False, "bf16", True, "cuDNN"),
        (AMPERE, False, "bf16", False, "flash"),
        (AMPERE, False, "bf16", True, "memory-efficient in patches with text, flash in pixels"),
        (AMPERE, False, "fp32", False, "memory-efficient"),
    ],
)
def test_words_and_refusals_on_gpus(
    order: tuple[str, ...],
    deterministic: bool,
    precision: Any,
    text: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By torch's rules, written down here: no GPU is at hand."""
    real = torch.empty
    monkeypatch.setattr(torch, "_fused_sdp_choice", Gpu(order, deterministic))
    monkeypatch.setattr(torch, "empty", lambda *size, device, **how: real(*size, **how))
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: real(*size, dtype=dtype).fill_(1))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    c = Config(model=TEXT if text else SMALL, precision=precision, data=RUN.data)
    c = replace(c, "text.max_tokens", 7) if text else c
    gpu = torch.device("cuda", 1)
    assert attention_of(c, gpu) == words
    if text:
        with pytest.raises(InputError, match=r"'flash' does not take .* with a mask, on cuda; expected 'auto', 'eff"):
            attention_of(replace(c, "machine.attention", "flash"), gpu)
    with pytest.raises(InputError, match=r"machine\.attention = 'cudnn' does not take"):
        attention_of(replace(c, "machine.attention", "cudnn"), gpu)  # 16 or 23 tokens, and a cuDNN before 9.15.1


def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs they change no bit, for there all that a network needs is deterministic."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    gradients = []
    try:
        for deterministic in (False, True):
            if deterministic:
                machine = replace(RUN, "machine.deterministic", True).machine
                assert list(build_network(SMALL, 0, machine).parameters())
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            net = randomised(TEXT)
            net(*inputs()).square().mean().backward()
            gradients.append([p.grad for p in net.parameters() if p.grad is not None])
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        be_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_cannot_be_deterministic_is_refused() -> None:
    c = replace(replace(RUN, "out", "run"), "data.path", "shards")
    c = replace(replace(c, "machine.deterministic", True), "machine.attention", "cudnn")
    with pytest.raises(
        InputError, match=r"'cudnn' with machine.deterministic: .*expected 'auto', 'flash', 'efficient'"
    ):
        validate(c)
    for kernel in ("auto", "flash", "efficient", "math"):
        validate(replace(c, "machine.attention", kernel))

"""What a training step does outside its blocks: embedders, what lies between the blocks, the objective.

The blocks are stood in for by functions that launch nothing. What remains is sorted by the stream that a kernel works
on, which is the largest tensor that it reads or writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from benchmarks.fake_cuda import inductor, tally
from benchmarks.fake_cuda.recorder import Kernel, Recorder
from benchmarks.fake_cuda.subjects import BF16, DEVICE, on_device
from benchmarks.fake_cuda.tally import Tally
from megapix import model as networks
from megapix.config import FlowConfig, ModelConfig
from megapix.diffusion import flow
from megapix.diffusion.condition import Condition, classes

STREAMS = ("images", "noise", "pixels", "patches", "text", "tokens", "small")
"""What a kernel works on: [B, 3, H, W], a part of that, [N, P, d], [B, L, D], [B, T, …], the last two, or little."""
PARTS = {"embed": "tokens", "pixel_condition": "patches", "pixel_tokens": "pixels"}
"""Methods of a network that are compiled by themselves, beside its blocks -> the stream that they work on."""
OBJECTIVE = {"words": "noise", "noised": "images", "squared_error": "images"}
"""The same of the objective."""


class _Nothing(torch.autograd.Function):
    """A block that launches nothing: its result is like its first inputs, and so are the gradients of all."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty_like(x) for x in inputs[:outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(torch.empty_like(x) for x in ctx.saved_tensors))


def stand_in(network: networks.PixelDiT) -> None:
    """Take the blocks, and the output layer, out of a network."""
    text = bool(network.config.text_width)
    for block in network.patch_blocks:
        _replace(block, 2 if text else 1, 3 if text else 2)
    for block in network.pixel_blocks:
        _replace(block, 1, 2)
    network.output = lambda tokens, like: _Output.apply(tokens, like)  # type: ignore[assignment, no-untyped-call]


class _Output(torch.autograd.Function):
    """[N, P, d] -> [B, 3, H, W], and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _replace(block: nn.Module, outputs: int, streams: int) -> None:
    def forward(*inputs: Any) -> Any:
        out: tuple[Tensor, ...] = _Nothing.apply(outputs, *inputs[:streams])  # type: ignore[no-untyped-call]
        return out if outputs > 1 else out[0]

    block.forward = forward  # type: ignore[assignment]


def _unwatched(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function outside of recorders, under which Dynamo does not work; its graphs have their own."""

    def call(*args: Any) -> Any:
        recorded = isinstance(_get_current_dispatch_mode(), Recorder)
        with _pop_mode_temporarily() if recorded else nullcontext():
            return run(*args)

    return call


def step(
    network: Any, batch: int, size: tuple[int, int], tokens: int, config: FlowConfig, objective: flow.Objective
) -> Any:
    """The loss of a micro batch of images that already lie on the device."""
    images = torch.empty(batch, 3, *size, dtype=torch.uint8, device=DEVICE)
    drawn = flow.Draws(torch.empty(batch), torch.empty(batch, dtype=torch.bool), torch.empty(batch, dtype=torch.long))
    condition = told(network.config, batch, tokens)
    loss, _ = flow.training_loss(network, images, condition, np.arange(batch), 0, config, drawn, objective)
    return loss.mean()


def told(model: ModelConfig, batch: int, tokens: int) -> Condition:
    """Classes, or a batch's text with a mask, on the device."""
    if not model.text_width:
        return classes(torch.zeros(batch, dtype=torch.long, device=DEVICE), model.num_classes)
    cond, null = (
        (torch.empty(n, tokens, model.text_width, **BF16), torch.ones(n, tokens, dtype=torch.bool, device=DEVICE))
        for n in (batch, 1)
    )
    return Condition(cond, null)


def between(
    model: ModelConfig, batch: int, size: tuple[int, int], tokens: int, compiled: bool
) -> dict[str, tuple[Tally, Tally]]:
    """Stream -> forward and backward of a step without its blocks."""
    network = on_device(lambda: networks.build(model))
    stand_in(network)  # type: ignore[arg-type]
    objective, streams = flow.Objective(), PARTS | OBJECTIVE
    graphs: dict[str, list[inductor.Graph]] = {part: [] for part in streams if compiled}
    for part, found in graphs.items():
        owner = objective if part in OBJECTIVE else network
        setattr(owner, part, _unwatched(inductor.compiled(getattr(owner, part), found)))
    how = network, batch, size, tokens, FlowConfig(generator="philox"), objective  # as every preset
    first, second = Recorder(), Recorder()
    with first:
        loss = step(*how)
    with second:
        loss.backward()
    L = size[0] * size[1] // model.patch_size**2
    numbers = {
        batch * 3 * size[0] * size[1]: "images",
        batch * L * model.patch_size**2 * model.pixel_width: "pixels",
        batch * L * model.width: "patches",
        batch * tokens * model.width: "text",
        batch * tokens * model.text_width: "text",
    }
    passes: dict[str, tuple[Tally, Tally]] = {}
    for stream in STREAMS:
        eager = [[kernel for kernel in one.kernels if _stream(kernel, numbers) == stream] for one in (first, second)]
        passes[stream] = tally.of_kernels(eager[0]), tally.of_kernels(eager[1])
    for part, found in graphs.items():
        forward, backward = passes[streams[part]]
        own = [tally.of_graph(graph) for graph in found]
        passes[streams[part]] = forward + own[0], sum(own[1:], backward)
    return passes


def _stream(kernel: Kernel, numbers: dict[int, str]) -> str:
    largest = max(map(math.prod, (*kernel.inputs, *kernel.outputs)))
    few = next(n for n, stream in numbers.items() if stream == "images") / 16
    return numbers.get(largest, "noise" if largest > few else "small")

"""A block's forward and backward pass, counted in one of the ways to run it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.fake_cuda import inductor, tally
from benchmarks.fake_cuda.inductor import Graph
from benchmarks.fake_cuda.recorder import Recorder
from benchmarks.fake_cuda.subjects import Subject
from benchmarks.fake_cuda.tally import Tally
from megapix.engine import checkpointing


@dataclass(frozen=True)
class Count:
    """A block, counted."""

    forward: Tally
    backward: Tally
    """With what it recomputes."""
    kept: int
    """Bytes between the two, without its inputs and weights, its outputs among them."""
    graphs: tuple[Graph, ...] = ()
    """If it was compiled: forward and backward."""


def count(subject: Subject, policy: str, compiled: bool) -> Count:
    """Run a block once on fake tensors under a policy of `engine/checkpointing.py`: none, full, …"""
    block, graphs = subject.block, list[Graph]()
    forward: Any = MethodType(checkpointing.RECOMPUTING.get(policy, type(block).forward), block)
    if compiled:
        torch._dynamo.reset()
        forward = inductor.compiled(forward, graphs)
    kept = _Kept(block, subject.inputs)
    first, second = Recorder(), Recorder()
    with (
        nullcontext() if compiled else first,
        torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor),
    ):
        outputs = [out for out in _tuple(forward(*subject.inputs)) if out.requires_grad]
    for out in outputs:
        kept.add(out)
    with nullcontext() if compiled else second:
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    if compiled:
        passes = [tally.of_graph(graph) for graph in graphs]
    else:
        passes = [tally.of_kernels(recorder.kernels) for recorder in (first, second)]
    return Count(*passes, kept.bytes, tuple(graphs))


class _Kept:
    """Storages that autograd keeps beyond those that live anyway."""

    def __init__(self, block: nn.Module, inputs: Any) -> None:
        lives = (*block.parameters(), *(tensor for one in inputs for tensor in _tuple(one)))
        self._lives = {_storage(tensor) for tensor in lives if isinstance(tensor, Tensor)}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        """A tensor's storage, once."""
        if tensor.device.type == "cuda" and (storage := _storage(tensor)) not in self._lives:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor.detach())  # an address is that of one storage as long as it lives
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)

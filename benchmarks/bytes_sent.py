"""Bytes that a rank sends in one optimizer step of ZeRO-2, counted from the collectives that DeepSpeed really calls.

usage: torchrun --nproc-per-node 2 -m benchmarks.bytes_sent [--preset tiny] [--precision bf16] [--micro-batch 4]
       [--accumulation 1] [--ds-config zero2] [--all-reduce]

A real engine takes one step, and every collective that reaches PyTorch is noted with its numbers. What a rank sends is
that of a ring: of S bytes an all-reduce sends 2·S·(N-1)/N, a reduce-scatter, an all-gather and one of N equal reduces
together half of it. Printed are the calls, and the sum beside ZeRO-2's minimum: gradients reduce-scattered once, in the
format that they are reduced in, and weights gathered once, which is 2Ψ numbers for Ψ parameters.

--all-reduce sets DeepSpeed's `use_multi_rank_bucket_allreduce`, its default, which ds_configs/ unsets: all ranks then
get the sums of all gradients, and keep their own share.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.made_up import told
from megapix import config
from megapix.config import Config
from megapix.config.ds_config import deepspeed_config
from megapix.costs import parameters
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network

RING = {"allreduce_": 2.0, "reduce_": 1.0, "_reduce_scatter_base_": 1.0, "_allgather_base_": 1.0, "broadcast_": 1.0}
"""Collective of torch.distributed -> how often its numbers pass a rank's link in a ring, but for the factor (N-1)/N.

`reduce_` is a chain that ends at its destination, which alone sends nothing: N-1 of N ranks send the numbers once.
"""


@dataclass
class Sent:
    """What one rank's collectives were: (operation, dtype) -> calls, and numbers in all."""

    calls: Counter[tuple[str, torch.dtype]] = field(default_factory=Counter)
    numbers: Counter[tuple[str, torch.dtype]] = field(default_factory=Counter)

    def bytes(self, ranks: int) -> float:
        """Bytes that a rank sends, the mean over all ranks."""
        share = (ranks - 1) / ranks
        return sum(RING[name] * n * dtype.itemsize * share for (name, dtype), n in self.numbers.items())


class Collectives(TorchDispatchMode):
    """Notes every collective that is called inside it, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = Sent()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.note(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: Any) -> None:
        """Note one collective that is about to be called with `args`."""
        tensors = [x for x in tree_leaves(args[:1]) if isinstance(x, torch.Tensor)]  # the first is the output
        if name not in RING:
            raise RuntimeError(f"collective {name}: this program doesn't know what it sends")
        self.sent.calls[name, tensors[0].dtype] += 1
        self.sent.numbers[name, tensors[0].dtype] += sum(x.numel() for x in tensors)


def step(e: Any, c: Config, accumulation: int, micro: int) -> None:
    """One optimizer step on random images, with text that is as long as the configuration lets it be."""
    generator = torch.Generator().manual_seed(0)
    device = next(e.network.parameters()).device
    for _ in range(accumulation):
        x = torch.randn(micro, 3, c.data.image_size, c.data.image_size, generator=generator).to(device)
        t = torch.rand(micro, generator=generator).to(device)
        condition = (part.to(device) for part in told(c.model, micro, c.text.max_tokens))
        e.backward((e(x, t, *condition).float() - x).square().mean())
        e.step()


def in_one_step(e: Any, c: Config, accumulation: int, micro: int) -> Sent:
    """The collectives of one step, the second, when nothing is set up any more."""
    step(e, c, accumulation, micro)
    with Collectives() as collectives:
        step(e, c, accumulation, micro)
    return collectives.sent


def least(weights: int, gradients: int, precision: str, ranks: int) -> float:
    """ZeRO-2's minimum in bytes: fp32 gradients reduce-scattered, weights of `precision` gathered."""
    return (4 * gradients + {"bf16": 2, "fp32": 4}[precision] * weights) * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ds-config", default="zero2")
    parser.add_argument("--all-reduce", action="store_true")
    options = parser.parse_args()
    world = from_environment()
    processes.start(world)
    c = config.preset(options.preset)
    machine = replace(c.machine, micro_batch=options.micro_batch, ds_config=options.ds_config)
    total = options.micro_batch * options.accumulation * world.size
    c = replace(c, precision=options.precision, machine=machine, optim=replace(c.optim, global_batch=total))
    net = build_network(c.model, c.seed, c.machine)
    weights = sum(p.numel() for p in net.parameters())
    gradients = weights - parameters.without_gradient(c.model)
    layout = config.batch_layout(c, world.size)
    knobs = deepspeed_config(c, layout)
    knobs["zero_optimization"]["use_multi_rank_bucket_allreduce"] = options.all_reduce
    e = zero2.build(c, layout, net, knobs)
    sent = in_one_step(e, c, options.accumulation, options.micro_batch)
    world.say(
        f"{options.preset}, {weights:,} parameters, {options.precision}, {world.size} ranks, "
        f"accumulation {options.accumulation}, {options.ds_config}{', all-reduced' * options.all_reduce}"
    )
    for (name, dtype), calls in sorted(sent.calls.items(), key=str):
        world.say(f"  {name.strip('_')}: {calls} calls, {sent.numbers[name, dtype]:,} numbers of {dtype}")
    found, minimum = sent.bytes(world.size), least(weights, gradients, options.precision, world.size)
    ratio = f"{found / minimum:.3f} of the minimum" if minimum else "one rank sends nothing"
    world.say(f"  sent by a rank: {found:,.0f} bytes; minimum {minimum:,.0f}; {ratio}")
    leave(world, 0)


if __name__ == "__main__":
    main()

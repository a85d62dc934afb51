"""What ZeRO-2 costs beside the network: bytes through memory, kernels, waits and host time of its hooks and its step.

usage: [torchrun --nproc-per-node 2 -m] benchmarks.zero2_cost [--preset xl-256] [--precision bf16] [--accumulation 1]
       [--ds-config zero2] [--set reduce_scatter=false …] [--detail]

A real engine on CPU ranks trains a network with the preset's number of parameter tensors, each small. One step runs
under a dispatch mode that notes every operation between the network's own: in the gradient hooks, the epilogue of the
backward pass, and the optimizer's step. An operation that touches memory counts as one kernel, with the bytes of its
inputs and outputs; views and allocations count as nothing, collectives are `benchmarks.bytes_sent`'s. Whose it is says
the innermost frame of its call that is not torch's. Host times are of other steps, without the mode,
and CPU time of the process, which other work on the machine does not stretch.

Bytes are per parameter of the whole network: a pass of b bytes over a rank's share counts as b/N. So what N ranks show
is whole + share/N, and 1 rank and 2 tell the two apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bytes_sent import step
from megapix import config
from megapix.config import Config
from megapix.config.ds_config import deepspeed_config
from megapix.dist import World, from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network

ROOT = Path(__file__).resolve().parents[1]
DEEPSPEED = Path(deepspeed.__file__).resolve().parent
PHASES = ("hooks", "epilogue", "step", "AdamW", "EMA")
"""The first two once a micro batch, the others once a step; AdamW and EMA are taken out of the step."""
NO_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh"}
"""Operations that are no views and move nothing."""
WAIT = "_local_scalar_dense"
"""The operation behind `.item()` and `bool(tensor)`: the host waits for the device."""


@dataclass
class Moved:
    """What one line of code has moved in a step."""

    kernels: int = 0
    bytes: int = 0
    waits: int = 0


@dataclass
class Recorder(TorchDispatchMode):
    """Notes the operations of each phase: (phase, whose, function) -> `Moved`."""

    phase: str = ""
    moved: dict[tuple[str, str, str], Moved] = field(default_factory=dict)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.phase and func.namespace == "aten":
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, schema = func._schema.name.split("::")[1], func._schema
        if name in NO_MEMORY or func.is_view or _is_view(schema):
            return
        row = self.moved.setdefault((self.phase, *caller()), Moved())
        if name == WAIT:
            row.waits += 1
            return
        inputs = [(a, v) for a, v in _bound(schema, args, kwargs) if isinstance(v, torch.Tensor)]
        row.kernels += 1
        self.operations[self.phase, name] += 1
        overwritten = ("copy_", "zero_", "fill_")  # their target is written, not read
        unscaled = kwargs.get("grad_scale") is None  # then a fused optimizer leaves the gradients as they are
        for argument, tensor in inputs:
            written = argument.alias_info is not None and argument.alias_info.is_write
            written &= not (argument.name == "grads" and unscaled)
            read = not (written and name in overwritten)
            row.bytes += touched(tensor) * (read + written)
        mutated = {id(tensor) for _, tensor in inputs}
        row.bytes += sum(touched(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in mutated)


def _is_view(schema: Any) -> bool:
    """Whether all results are views of an argument that is not written, or copies that a view makes for nothing."""
    returns = [r.alias_info for r in schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _bound(schema: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """Each argument of a call with each tensor that it got."""
    pairs = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema.arguments)]
    return [(a, leaf) for a, value in pairs for leaf in tree_leaves(value)]


def touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory; what is expanded lies there once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else min(size, 1)
    return numbers * tensor.element_size()


def caller() -> tuple[str, str]:
    """Whose code has called the operation that is being noted, and its function."""
    frame = sys._getframe(3)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for whose, root in (("DeepSpeed", DEEPSPEED), ("megapix", ROOT / "megapix")):
            if path.is_relative_to(root):
                return whose, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "torch", "autograd"


@dataclass
class Phases:
    """Puts a phase's name before a function's operations, and times it."""

    recorder: Recorder
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    calls: Counter[str] = field(default_factory=Counter)

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Let `owner.method` be that phase; a phase inside another one is taken out of it."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.recorder.phase = self.recorder.phase, phase
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[phase] += spent
                self.calls[phase] += 1
                if before:
                    self.seconds[before] -= spent
                self.recorder.phase = before

        setattr(owner, method, timed)


def small(name: str, precision: str, ranks: int, accumulation: int) -> Config:
    """The preset's depths with narrow layers: as many parameter tensors, each of some thousand numbers."""
    c = config.preset(name)
    m = replace(c.model, patch_size=4, width=64, heads=2, pixel_width=16, num_classes=c.model.num_classes and 10)
    if m.text_width:
        m = replace(m, text_width=32, pixel_attention_width=32, pixel_heads=2)
    return replace(
        c,
        precision=precision,
        model=m,
        data=replace(c.data, image_size=8),
        optim=replace(c.optim, global_batch=ranks * accumulation),
        machine=replace(c.machine, micro_batch=1, pixel_checkpointing="none", compile=False),
        text=replace(c.text, max_tokens=4) if m.text_width else c.text,
    )


@dataclass(frozen=True)
class Cost:
    """What a step of a small network costs."""

    parameters: int
    tensors: int
    moved: dict[tuple[str, str, str], Moved]
    host: dict[str, float]
    """Phase -> median milliseconds in a step, all its micro batches."""

    def of(self, *phases: str) -> Moved:
        """The sum over some phases."""
        rows = [row for (phase, _, _), row in self.moved.items() if phase in phases]
        return Moved(*(sum(getattr(row, name) for row in rows) for name in ("kernels", "bytes", "waits")))


def measure(world: World, c: Config, accumulation: int, changes: dict[str, Any], steps: int) -> Cost:
    """Count a step of the engine, and time `steps` others. Every rank calls it.

    Args:
        changes: keys of `zero_optimization` that differ from the configuration's.
    """
    layout = config.batch_layout(c, world.size)
    knobs = deepspeed_config(c, layout)
    knobs["zero_optimization"] |= changes
    network = build_network(c.model, c.seed, c.machine)
    shapes = [p.shape for p in network.parameters()]
    e = zero2.build(c, layout, network, knobs)
    zero, recorder = e.deepspeed.optimizer, Recorder()
    phases = Phases(recorder)
    for owner, method, phase in (
        (zero, "process_gradients", "hooks"),
        (zero, "overlapping_partition_gradients_reduce_epilogue", "epilogue"),
        (e, "step", "step"),
        (e.optimizer, "step", "AdamW"),
        (e.optimizer, "update_ema", "EMA"),
    ):
        phases.wrap(owner, method, phase)
    step(e, c, accumulation, 1)
    with recorder:
        step(e, c, accumulation, 1)
    moved, spent = recorder.moved, []
    recorder.moved = {}
    for _ in range(steps):
        phases.seconds = dict.fromkeys(PHASES, 0.0)
        step(e, c, accumulation, 1)
        spent.append(phases.seconds)
    e.close()
    host = {phase: 1e3 * statistics.median(s[phase] for s in spent) for phase in PHASES}
    return Cost(sum(s.numel() for s in shapes), len(shapes), moved, host)


def show(cost: Cost, accumulation: int, detail: bool) -> str:
    """Markdown: bytes per parameter, kernels, waits and host time of each phase and owner."""

    def row(names: list[str], moved: Moved, times: int, host: str) -> list[str]:
        per = f"{moved.bytes / cost.parameters / times:.2f}", f"{moved.kernels / times:.0f}"
        return [*names, *per, f"{moved.kernels / cost.tensors / times:.2f}", f"{moved.waits / times:g}", host]

    rows = []
    for phase in PHASES:
        times, host = accumulation if phase in ("hooks", "epilogue") else 1, f"{cost.host[phase]:.1f}"
        found = {key[1:]: moved for key, moved in cost.moved.items() if key[0] == phase}
        owners = dict.fromkeys(whose for whose, _ in found) or {"-": None}
        for whose in owners:
            parts = [m for (w, _), m in found.items() if w == whose]
            total = Moved(*(sum(getattr(m, name) for m in parts) for name in ("kernels", "bytes", "waits")))
            rows.append(row([phase, whose, "all"], total, times, host))
            for (w, function), m in found.items() if detail else ():
                if w == whose:
                    rows.append(row([phase, whose, function], m, times, ""))
    head = ["phase", "whose", "function", "B a parameter", "kernels", "kernels a tensor", "waits", "host ms a step"]
    sums = row(["a micro batch", "", ""], cost.of("hooks", "epilogue"), accumulation, "")
    steps = row(["a step", "", ""], cost.of("step", "AdamW", "EMA"), 1, f"{sum(cost.host.values()):.1f}")
    return table(head, [*rows, sums, steps])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xl-256")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ds-config", default="zero2")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of zero_optimization")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--detail", action="store_true", help="function by function")
    options = parser.parse_args()
    changes = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.set)}
    world = from_environment()
    processes.start(world)
    torch.set_num_threads(1)
    c = small(options.preset, options.precision, world.size, options.accumulation)
    c = config.replace(c, "machine.ds_config", options.ds_config)
    cost = measure(world, c, options.accumulation, changes, options.steps)
    world.say(
        f"{options.preset}: {cost.tensors} tensors, {cost.parameters:,} parameters; {options.precision}, {world.size} "
        f"ranks, accumulation {options.accumulation}, {options.ds_config} {' '.join(options.set)}".rstrip()
    )
    if world.main:
        print(show(cost, options.accumulation, options.detail))
    leave(world, 0)


if __name__ == "__main__":
    main()

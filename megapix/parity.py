"""`megapix doctor --parity`: does ZeRO-2 on these machines compute what one plain process computes?

A pairwise cover of the options that could change the result is trained for a few AdamW steps, through the same engine
as a run, on a tiny network and synthetic images. Each case is compared with `plain.train` on the same positions:
losses, gradient norms, weights and EMA. Under a launcher the cases run on its ranks; without one, this command starts
1, 2 and 4 local ranks itself.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from megapix import config, dist, engine, flow, plain
from megapix.condition import Condition, classes
from megapix.config import Config, DataConfig, MachineConfig, ModelConfig, OptimConfig
from megapix.cover import pairwise
from megapix.dist import World
from megapix.ds_config import deepspeed_config
from megapix.errors import InputError
from megapix.model import PixelDiT
from megapix.optim import EMA
from megapix.plain import Trace

STEPS = 10
IMAGE_SIZE = 16
MODEL = ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=3)
TEXT_MODEL = replace(
    MODEL, num_classes=0, text_width=12, text_tokens=6, mlp="swiglu", pixel_attention_width=24, pixel_heads=3
)
LOCAL_RANKS = (2, 4, 1)
SMALL_BUCKET = 5_000
"""Elements: less than the largest layers of the network have, so that these are reduced outside the buckets."""
CLIP = {"hit": 0.05, "not hit": 1e3}
"""Bounds of the gradient norm, the first below and the second above what any step has (checked)."""


@dataclass(frozen=True)
class Case:
    """One way to run ZeRO-2. The values are those of the options of the same name; `bucket_allreduce` is
    use_multi_rank_bucket_allreduce, and `text` the network that takes text."""

    ranks: int = 2
    accumulation: int = 1
    clip: Literal["hit", "not hit"] = "hit"
    precision: Literal["fp32", "bf16"] = "fp32"
    overlap_comm: bool = False
    buckets: Literal["large", "small"] = "large"
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    bucket_allreduce: bool = False
    text: bool = False
    offload: bool = False
    pixel_checkpointing: Literal["none", "full"] = "none"
    patch_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False


OPTIONS: dict[str, tuple[Any, ...]] = {
    "accumulation": (1, 4),
    "clip": ("hit", "not hit"),
    "precision": ("fp32", "bf16"),
    "overlap_comm": (False, True),
    "buckets": ("large", "small"),
    "contiguous_gradients": (True, False),
    "reduce_scatter": (True, False),
    "bucket_allreduce": (False, True),
    "offload": (False, True),
    "pixel_checkpointing": ("none", "full"),
    "patch_checkpointing": ("none", "full"),
    "compile": (False, True),
}
"""What is covered beside the number of ranks; what costs time comes last, so that ties keep it rare."""


def cases(ranks: tuple[int, ...], compiling: bool) -> list[Case]:
    """A pairwise cover of all options but compilation on these numbers of ranks; with `compiling`, the cases that a
    cover with it compiles come on top. (Compiled bf16 has wide tolerances, so it may not stand in for a case without.)
    The network that takes text has a case of its own, and another one compiled.
    """
    options, text = {"ranks": ranks} | OPTIONS, Case(ranks=ranks[0], text=True)
    covered = [Case(**row) for row in pairwise(options | {"compile": (False,)})] + [text]
    if not compiling:
        return covered
    compiled = [case for case in (Case(**row) for row in pairwise(options)) if case.compile]
    return [*covered, *compiled, replace(text, compile=True)]


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def configuration(case: Case) -> Config:
    """The run of a case: 10 steps with a learning rate that steps down after 6, and beta2 and EMA that move fast.

    The learning rate is a hundred times the recipe's, so that a wrong gradient moves the weights far in few steps.
    """
    smallest = 4 * case.ranks
    total = smallest * math.ceil(16 / smallest)
    return Config(
        seed=3,
        precision=case.precision,
        model=TEXT_MODEL if case.text else MODEL,
        data=DataConfig(image_size=IMAGE_SIZE),
        optim=OptimConfig(
            global_batch=total,
            lr=1e-2,
            lr_after=5e-3,
            lr_step_at=6 * total,
            end_at=STEPS * total,
            beta2=0.99,
            weight_decay=0.01,
            grad_clip=CLIP[case.clip],
            ema_decay=0.9,
        ),
        machine=MachineConfig(
            micro_batch=total // case.ranks // case.accumulation,
            pixel_checkpointing=case.pixel_checkpointing,
            patch_checkpointing=case.patch_checkpointing,
            compile=case.compile,
            ds_config="zero2_offload" if case.offload else "zero2",
        ),
    )


def network(c: Config, machine: MachineConfig | None = None) -> PixelDiT:
    """The network with random numbers added to every weight: zero-initialised layers would hold gradients back."""
    net = engine.build_network(c.model, c.seed, machine)
    generator = torch.Generator().manual_seed(c.seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def samples(model: ModelConfig, device: torch.device, positions: NDArray[np.int64]) -> tuple[Tensor, Condition]:
    """Synthetic images, a function of the position: uint8 [B, 3, 16, 16]; with classes, or text of 1 to 6 tokens."""
    images, texts = [], []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(position)
        images.append(torch.randint(256, (3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8))
        texts.append(torch.randn(model.text_tokens, model.text_width, generator=generator))
    shown = torch.stack(images).to(device)
    if not model.text_width:
        return shown, classes((torch.from_numpy(positions) % 3).to(device), 3)
    real = torch.arange(model.text_tokens) <= torch.from_numpy(positions)[:, None] % model.text_tokens
    told = torch.stack(texts).to(device), real.to(device)
    return shown, Condition(told, (torch.zeros_like(told[0][:1, :1]), torch.ones_like(told[1][:1, :1])))


def zero2(case: Case, world: World, device: torch.device, types: dict[str, Any] | None = None) -> Trace:
    """Train a case with DeepSpeed on every rank. `types` replaces the number formats of gradients, in bf16."""
    c = configuration(case)
    layout = config.batch_layout(c, world.size)
    knobs = deepspeed_config(c, layout)
    bucket = SMALL_BUCKET if case.buckets == "small" else 500_000_000
    knobs["zero_optimization"] |= {
        "overlap_comm": case.overlap_comm,
        "contiguous_gradients": case.contiguous_gradients,
        "reduce_scatter": case.reduce_scatter,
        "use_multi_rank_bucket_allreduce": case.bucket_allreduce,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    e = engine.build(c, layout, network(c, c.machine), knobs | (types or {}))
    trace = Trace()
    for step in range(STEPS):
        positions = np.arange(step * layout.total, (step + 1) * layout.total)
        losses = []
        for mine in positions.reshape(layout.accumulation, layout.ranks, layout.micro)[:, world.rank]:
            loss, _ = flow.training_loss(e, *samples(c.model, device, mine), mine, c.seed, c.flow)
            e.backward(loss.mean())
            e.step()
            losses.append(loss.mean().item())
        trace.losses.append(float(np.mean(dist.gather(world, losses))))
        trace.norms.append(float(e.get_global_grad_norm()))
        if step == 0:
            moment = engine.gathered(e, "exp_avg")
            trace.gradient = {name: m.cpu() / (1.0 - c.optim.beta1) for name, m in moment.items()}
    trace.weights = {name: master.cpu() for name, master in engine.gathered(e, "master").items()}
    trace.ema = {name: ema.cpu() for name, ema in engine.gathered(e, EMA).items()}
    e.destroy()
    # Engine and network hold each other through hooks, and compiled code is kept for the next network of its kind:
    # each case starts without what the last one left.
    del e
    gc.collect()
    torch.compiler.reset()
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far two traces are apart, or may be."""

    gradient: float
    """Of the first step: largest difference in a tensor, relative to its largest element; the worst tensor."""
    loss: float
    """Largest relative difference of any step."""
    norm: float
    """Of the gradient: largest relative difference of any step."""
    weights: float
    """At the end, measured like the gradient."""
    ema: float
    """At the end, measured like the gradient."""

    def within(self, tolerance: Difference) -> bool:
        """Whether every number is finite and at most the tolerance's."""
        return all(value <= bound for value, bound in zip(astuple(self), astuple(tolerance), strict=True))


TOLERANCES = {
    "fp32": Difference(gradient=1e-5, loss=1e-5, norm=1e-5, weights=1e-3, ema=1e-3),
    "fp32 compiled": Difference(gradient=1e-5, loss=1e-5, norm=1e-4, weights=1e-3, ema=1e-3),
    "bf16": Difference(gradient=1e-5, loss=1e-3, norm=1e-2, weights=0.1, ema=0.1),
    "bf16 compiled": Difference(gradient=0.05, loss=1e-3, norm=2e-2, weights=0.2, ema=0.2),
}
"""What a case may differ from its reference.

fp32: sums in another order. The gradient differs by some 1e-6; Adam divides it by its own size, so where it is nearly
zero its rounding becomes a part of a step: 1e-5 to 1e-4 of the largest weight after ten of them.

fp32 compiled: sums and exponentials in an order of the compiler's: the same first gradient, from where the runs part
sooner (the norm by 1.5e-5 in ten steps with text, measured).

bf16: against a plain process in bf16 the gradient of the first step is as near as in fp32. Later a weight that lies
between two bf16 numbers may be rounded the other way, and the runs part as far as bf16 parts from fp32 (0.08 to 0.1
of the largest weight at this learning rate, measured), not farther.

bf16 compiled: fused operations round less often, so already the first gradient differs by bf16's own rounding.
"""


def tolerance(case: Case) -> Difference:
    """The tolerances of a case."""
    return TOLERANCES[f"{case.precision} compiled" if case.compile else case.precision]


@dataclass(frozen=True)
class Result:
    """A case, and how far it is from the plain process of its own precision."""

    case: Case
    difference: Difference
    from_fp32: Difference
    """From the plain fp32 process: in bf16, what bf16 costs."""
    types: str = ""
    """Number formats of gradients, where they are not a run's own; such a result is information, not a test."""

    @property
    def holds(self) -> bool:
        """Whether ZeRO-2 computes what the plain process computes."""
        return bool(self.types) or self.difference.within(tolerance(self.case))


def compare(found: Trace, expected: Trace) -> Difference:
    """How far `found` is from `expected`."""

    def steps(a: list[float], b: list[float]) -> float:
        return float(np.max(np.abs(np.subtract(a, b)) / np.abs(b)))

    def tensor(a: Tensor, b: Tensor) -> float:
        largest = float(b.abs().max())
        if largest == 0:  # no gradient: of the last text block's weights that nothing depends on
            return math.inf if a.any() else 0.0
        return float((a - b).abs().max()) / largest

    def tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return float(np.max([tensor(a[name], b[name]) for name in b]))

    return Difference(
        gradient=tensors(found.gradient, expected.gradient),
        loss=steps(found.losses, expected.losses),
        norm=steps(found.norms, expected.norms),
        weights=tensors(found.weights, expected.weights),
        ema=tensors(found.ema, expected.ema),
    )


@functools.lru_cache(maxsize=8)
def reference(c: Config, micro: int, device: torch.device) -> Trace:
    """The plain process of a configuration."""
    return plain.train(network(c).to(device), c, functools.partial(samples, c.model, device), STEPS, micro)


def measure(
    todo: list[Case], world: World, device: torch.device, types: dict[str, dict[str, Any]] | None = None
) -> list[Result]:
    """Run the cases on every rank and compare them on rank 0, whose list is filled; the others get an empty one.

    With `types`, each case is run once for each of these number formats of gradients instead of a run's own.
    """
    results = []
    for case in todo:
        for name, chosen in (types or {"": {}}).items():
            found = zero2(case, world, device, chosen)
            if world.main:
                # What the plain process does not have is left at one value, so that cases share their reference.
                c = replace(configuration(case), machine=MachineConfig())
                exact = reference(replace(c, precision="fp32"), c.optim.global_batch, device)
                same = exact
                if case.precision == "bf16":
                    same = reference(c, c.optim.global_batch // case.ranks // case.accumulation, device)
                results.append(Result(case, compare(found, same), compare(found, exact), name))
                world.say(f"{describe(case)}{name and ', '}{name}: {'as plain' if results[-1].holds else 'DIFFERS'}")
    return results


GRADIENT_TYPES = {
    f"accumulated in {accumulated}, reduced in {reduced}": {
        "data_types": {"grad_accum_dtype": accumulated},
        "communication_data_type": reduced,
    }
    for accumulated in ("fp32", "bf16")
    for reduced in ("fp32", "bf16")
}
"""Number formats of bf16 training's gradients; the first is a run's own."""


# ---------------------------------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------------------------------


def describe(case: Case) -> str:
    """The case in a line: what differs from the plainest one."""
    changed = [f"{f.name} {getattr(case, f.name)}" for f in fields(case) if getattr(case, f.name) != f.default]
    return f"{case.ranks} ranks: {', '.join(x for x in changed if not x.startswith('ranks')) or 'plainest'}"


def table(results: list[Result]) -> str:
    """Markdown: a row for each case, then what the number formats of gradients change."""

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: object) -> str:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

    names = [f.name.replace("_", " ") for f in fields(Case)]
    measured = [f.name for f in fields(Difference)]
    lines = [row([*names, *measured, "result"]), "|" + "---|" * (len(names) + len(measured) + 1)]
    for r in (r for r in results if not r.types):
        numbers = [f"{value:.1e}" for value in astuple(r.difference)]
        lines.append(row([*map(cell, astuple(r.case)), *numbers, "holds" if r.holds else "**differs**"]))
    lines += ["", row(["ranks", "accumulation", "bf16 gradients", *measured, "weights from fp32"])]
    lines.append("|" + "---|" * (len(measured) + 4))
    for r in (r for r in results if r.types):
        numbers = [f"{value:.1e}" for value in (*astuple(r.difference), r.from_fp32.weights)]
        lines.append(row([str(r.case.ranks), str(r.case.accumulation), r.types, *numbers]))
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParityOptions:
    """Compare ZeRO-2 with one plain PyTorch process, on a pairwise cover of the options that could change the result.

    Under a launcher on its ranks; without one on 1, 2 and 4 ranks of this machine. Exit code 1 if a case differs."""

    out: Path | None = None
    """Markdown file of the table."""
    ranks: tuple[int, ...] = ()
    """Numbers of ranks to cover; a launcher's ranks run their own part of that cover. The default is the launcher's
    number, or without one 2, 4 and 1 (on a machine with GPUs: no more than it has)."""
    compile: bool = True
    """Cover torch.compile, too."""
    results: Path | None = None
    """JSON file of this launch's results, instead of the table."""


def main(arguments: list[str], world: World) -> int:
    """Run the command on this rank, or start ranks; returns the exit code.

    Raises:
        InputError: an option that cannot be honoured.
    """
    options = tyro.cli(ParityOptions, args=arguments, prog="megapix doctor --parity", console_outputs=world.main)
    for name in ("out", "results"):
        path: Path | None = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"--{name} {str(path)!r}: expected a file in a folder that exists")
    if any(ranks < 1 for ranks in options.ranks):
        raise InputError(f"--ranks {' '.join(map(str, options.ranks))}: expected numbers of at least 1")
    if "RANK" not in os.environ:
        results = _on_local_ranks(options)
        return finish(results, options)
    if options.ranks and world.size not in options.ranks:
        raise InputError(f"--ranks {' '.join(map(str, options.ranks))}: expected this launch's {world.size} among them")
    device = engine.start(world)
    covered = cases(options.ranks or (world.size,), options.compile)
    results = measure([case for case in covered if case.ranks == world.size], world, device)
    results += measure([Case(world.size, 4, precision="bf16")], world, device, GRADIENT_TYPES)
    code = 0
    if world.main and options.results:
        options.results.write_text(json.dumps([asdict(r) for r in results]))
    elif world.main:
        code = finish(results, options)
    return engine.leave(world, dist.gather(world, code)[0])


def finish(results: list[Result], options: ParityOptions) -> int:
    """Print the table and write it where it was asked for; name what differs. Returns the exit code."""
    text = table(results)
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    different = [r for r in results if not r.holds]
    for r in different:
        print(f"megapix: differs from plain training: {describe(r.case)}: {r.difference}", file=sys.stderr)
    return 1 if different else 0


def _on_local_ranks(options: ParityOptions) -> list[Result]:
    """Start each number of ranks on this machine and collect their results.

    Raises:
        InputError: a launch failed; its own output says why.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    ranks = options.ranks or tuple(n for n in LOCAL_RANKS if n <= (gpus or n))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ranks:
            file = Path(folder) / f"{size}.json"
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            command = ["torch.distributed.run", "--nproc-per-node", str(size), "--master-addr", "127.0.0.1"]
            command += ["--master-port", port, "-m", "megapix", "doctor", "--parity", "--results", str(file)]
            command += ["--ranks", *map(str, ranks), "--compile" if options.compile else "--no-compile"]
            # DeepSpeed's op builder calls ninja, which is installed beside the interpreter.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": str(max(1, cores // size))}
            try:
                code = subprocess.run([sys.executable, "-m", *command], env=environment).returncode
            finally:  # DeepSpeed's CPU communication op leaves its segments behind
                for segment in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{port}_*"):
                    segment.unlink(missing_ok=True)
            if code or not file.is_file():
                raise InputError(f"--ranks {size}: these ranks ended with code {code}; what they wrote above says why")
            for r in json.loads(file.read_text()):
                parts = Case(**r["case"]), Difference(**r["difference"]), Difference(**r["from_fp32"])
                results.append(Result(*parts, r["types"]))
    return results

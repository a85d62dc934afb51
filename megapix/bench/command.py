"""The command `megapix bench step`: builds a step, times it, and reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapix import config
from megapix.bench import kernels, peak
from megapix.bench.options import StepOptions
from megapix.bench.report import Measured, Saves, numbers, table
from megapix.bench.step import TrainingStep
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.conditioning.conditioner import Classes, Conditioner, StoredText, of_run
from megapix.config import IMAGENET_IMAGES, BatchLayout, CheckpointConfig, Config
from megapix.config.ds_config import read_knobs
from megapix.costs.automatic import Cards
from megapix.data import loader
from megapix.data.batch import Batch
from megapix.diffusion import flow
from megapix.dist import World, barrier, gather, on_all_ranks
from megapix.engine import processes
from megapix.errors import InputError
from megapix.files import check_writable, write_atomic
from megapix.train import automatic
from megapix.train.resolve import ResolvedRun, resolve

SAVES = 3


@dataclass(frozen=True)
class Prepared:
    """A step that can be built."""

    config: Config
    """Resolved."""
    layout: BatchLayout
    resolved: ResolvedRun | None
    """The run that reads shards; None with synthetic images."""


def step(options: StepOptions, world: World) -> int:
    """Run the command on this rank, together with all others; returns the exit code.

    Raises:
        CollectiveInputError: an option that cannot be used.
        RunError: a step was skipped, or a checkpoint not written.
    """
    _requested(options, world.size)  # bad options end here, before the ranks connect
    device = processes.start(world)
    prepared = on_ranks(options, world, device)
    measured = measure(options, prepared, batches(prepared, world, device), world, device)
    if world.main:
        report(numbers(measured), options.out)
    return 0


def measure(
    options: StepOptions,
    prepared: Prepared,
    data: Iterator[Batch],
    world: World,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Build the step and time it, on every rank; `between` is called after each of these, warm-up included. One step
    more, which is not timed, shows the kernels.

    Raises:
        RunError: a step was skipped, or a checkpoint not written.
    """
    matmuls = peak.matmuls(prepared.config, prepared.layout.micro, device.type)
    before = _peaks(matmuls, prepared, world, device)
    conditioner = conditioner_of(prepared, world, device)
    timed = TrainingStep(prepared.config, prepared.layout, data, conditioner, world, device)
    steps = []
    with closing(timed):
        for number in range(options.warmup + options.repeats):
            barrier(world)
            parts = timed()
            if number >= options.warmup:
                steps.append(parts)
            between()
        ran = kernels.traced(timed)
        saves = save(timed, prepared.config, options.save, world) if options.save else None
    after = _peaks(matmuls, prepared, world, device)
    # The machine may have been busy during one of them: its peak is the better one.
    best = {matmul: max(before[matmul], after[matmul]) for matmul in matmuls}
    return Measured(prepared.config, prepared.layout, device, steps, best, ran, saves)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the table, and write the numbers to --out."""
    print(table(result), end="", flush=True)
    if out:
        write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


def _requested(options: StepOptions, ranks: int) -> Config:
    """The configuration, checked as far as no file is needed; its data path is empty with synthetic images."""
    requested = options.configuration(ranks)
    data = dataclasses.replace(requested.data, path=requested.data.path or "synthetic")
    config.validate(dataclasses.replace(requested, out="none", data=data))
    return requested


def on_ranks(options: StepOptions, world: World, device: torch.device) -> Prepared:
    """`prepare` on every rank, for the GPUs that they have.

    Raises:
        CollectiveInputError: the first thing that is wrong on any of them.
    """
    cards = automatic.cards_of(world, device)
    lacks = automatic.lacking(world, cards)
    return on_all_ranks(world, lambda: prepare(options, world.size, cards, lacks))


def prepare(options: StepOptions, ranks: int, cards: Cards | None = None, lacks: str = "") -> Prepared:
    """Check the options, and the data if there are any, and settle what is 'auto', as `train` does.

    Args:
        cards: GPUs of the ranks; None on CPUs.
        lacks: what compilation lacks there.

    Raises:
        InputError: the first thing that is wrong.
    """
    requested = _requested(options, ranks)
    if options.out:
        check_writable("--out", options.out)
    if options.save and not options.save.is_dir():
        raise InputError(f"--save {str(options.save)!r}: expected a folder that exists")
    with tempfile.TemporaryDirectory() as nowhere:  # a run has a folder; a step writes nothing into it
        if requested.data.path:
            p, _ = automatic.settle(resolve(dataclasses.replace(requested, out=nowhere), ranks), cards, lacks)
            return Prepared(p.config, p.layout, p)
    read_knobs(requested.machine.ds_config, requested.machine.unproven)
    c = config.freeze(requested, IMAGENET_IMAGES)
    c, _, layout = automatic.settled(c, config.batch_layout(c, ranks), cards, lacks)
    return Prepared(c, layout, None)


def batches(prepared: Prepared, world: World, device: torch.device) -> Iterator[Batch]:
    """Micro batches of this rank: the loader's, or one synthetic batch on the device, at ever new positions. Synthetic
    captions have the maximum number of tokens."""
    c, layout = prepared.config, prepared.layout
    draw = partial(flow.draw, seed=c.seed, config=c.flow)
    if p := prepared.resolved:
        extras = dataclasses.replace(p.text.extras(None), draw=draw)
        yield from loader.batches(c.data, p.located, c.seed, layout, world.rank, 0, (), extras)
    generator = torch.Generator().manual_seed(c.seed)
    shape = (layout.micro, 3, c.data.image_size, c.data.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(c.model.num_classes or 1, (layout.micro,), generator=generator).to(device)
    text = _synthetic_text(c, layout.micro, device) if c.model.text_width else None
    positions = np.arange(layout.micro) + layout.micro * world.rank
    while True:
        draws = draw(positions)
        if device.type == "cuda":
            draws = flow.Draws(*(part.pin_memory() for part in draws))
        yield Batch(images, labels, positions, text=text, draws=draws)
        positions = positions + layout.micro * layout.ranks


def conditioner_of(prepared: Prepared, world: World, device: torch.device) -> Conditioner:
    """The conditioner of those batches. Every rank calls it."""
    c = prepared.config
    if p := prepared.resolved:
        p.text.to(device)
        return of_run(p.config, p.text, world, device)
    return (
        StoredText(_synthetic_text(c, 1, device), device)
        if c.model.text_width
        else Classes(c.model.num_classes, device)
    )


def _synthetic_text(c: Config, captions: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(c.seed)
    features = torch.randn(captions, c.text.max_tokens, c.model.text_width, generator=generator).bfloat16()
    if c.text.padding == "attended":
        return (features.to(device),)
    return features.to(device), torch.ones(captions, c.text.max_tokens, dtype=torch.bool, device=device)


def save(timed: TrainingStep, c: Config, folder: Path, world: World) -> Saves:
    """Write checkpoints in the background, a step after each; the first allocates buffers and is not counted."""
    engine, saves = timed.engine, Saves([], [])
    layout = engine.layout(world)
    state = State(Counters(), c, "", (), layout, engine.adam_steps)
    run = Path(gather(world, tempfile.mkdtemp(dir=folder) if world.main else "")[0])
    try:
        with closing(Saver(run, CheckpointConfig(keep=1, max_failed=1), world)) as saver:
            for number in range(1, SAVES + 2):
                start, waited = time.perf_counter(), saver.stall
                counters = Counters(number, number)
                saver.save(dataclasses.replace(state, counters=counters), engine.share(layout, world))
                stall = saver.stall - waited
                timed()
                saver.finish()
                if number > 1:
                    saves.stalls.append(stall)
                    saves.written.append(time.perf_counter() - start)
        barrier(world)
    finally:
        if world.main:
            shutil.rmtree(run)
    return saves


def _peaks(
    matmuls: list[peak.Matmul], prepared: Prepared, world: World, device: torch.device
) -> dict[peak.Matmul, float]:
    """All ranks at once, as in a step."""
    barrier(world)
    return peak.measure(matmuls, prepared.config.precision, device)

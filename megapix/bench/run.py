"""The command `megapix bench step`: builds a step, times it, and tells."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapix import conditioner, config, dist, engine
from megapix.bench import peak
from megapix.bench.options import StepOptions
from megapix.bench.report import Measured, Saves, numbers, table
from megapix.bench.step import TrainingStep
from megapix.checkpoint import Counters, State
from megapix.conditioner import Classes, Conditioner, StoredText
from megapix.config import IMAGENET_IMAGES, BatchLayout, CheckpointConfig, Config
from megapix.data import loader
from megapix.data.loader import Batch
from megapix.dist import World
from megapix.ds_config import read_knobs
from megapix.errors import InputError
from megapix.prepare import Plan, plan
from megapix.saver import Saver
from megapix.shards import check_writable, write_atomic

SAVES = 3


@dataclass(frozen=True)
class Prepared:
    """A step that can be built."""

    config: Config
    """Resolved."""
    layout: BatchLayout
    plan: Plan | None
    """The run that reads shards, unless images are made up."""


def step(options: StepOptions, world: World) -> int:
    """Run the command on this rank, together with all others; returns the exit code.

    Raises:
        Agreed: an option that cannot be honoured.
        Trouble: a step was skipped, or a checkpoint not written.
    """
    _asked(options, world.size)  # a mistake that needs no other rank to be seen ends before any of them is met
    device = engine.start(world)
    prepared = dist.together(world, lambda: prepare(options, world.size))
    measured = measure(options, prepared, batches(prepared, world, device), world, device)
    if world.main:
        tell(numbers(measured), options.out)
    return 0


def measure(
    options: StepOptions,
    prepared: Prepared,
    data: Iterator[Batch],
    world: World,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Build the step and time it, on every rank; `between` is called after each step, those that are not timed too.

    Raises:
        Trouble: a step was skipped, or a checkpoint not written.
    """
    products = peak.products(prepared.config, prepared.layout.micro, device.type)
    before = _peaks(products, prepared, world, device)
    told_of = told(prepared, world, device)
    timed = TrainingStep(prepared.config, prepared.layout, data, told_of, world, device)
    steps = []
    for number in range(options.warmup + options.repeats):
        dist.barrier(world)
        parts = timed()
        if number >= options.warmup:
            steps.append(parts)
        between()
    saves = save(timed, prepared.config, options.save, world) if options.save else None
    after = _peaks(products, prepared, world, device)
    # Whatever else the machine did while one of them was measured, its peak is what it has reached.
    best = {product: max(before[product], after[product]) for product in products}
    return Measured(prepared.config, prepared.layout, device, steps, best, saves)


def tell(found: dict[str, Any], out: Path | None) -> None:
    """Print the table, and write the numbers where they were asked for."""
    print(table(found), end="", flush=True)
    if out:
        write_atomic(out, (json.dumps(found, indent=1) + "\n").encode())


def _asked(options: StepOptions, ranks: int) -> Config:
    """The configuration, checked as far as no file is needed; its data path is still empty if images are made up."""
    asked = options.configuration(ranks)
    data = dataclasses.replace(asked.data, path=asked.data.path or "made up")
    config.validate(dataclasses.replace(asked, out="none", data=data))
    return asked


def prepare(options: StepOptions, ranks: int) -> Prepared:
    """Check the options, and the data if there are any, as `train` does.

    Raises:
        InputError: the first thing that is wrong.
    """
    asked = _asked(options, ranks)
    if options.out:
        check_writable("--out", options.out)
    if options.save and not options.save.is_dir():
        raise InputError(f"--save {str(options.save)!r}: expected a folder that exists")
    with tempfile.TemporaryDirectory() as nowhere:  # a run has a folder; a step writes nothing into it
        if asked.data.path:
            p = plan(dataclasses.replace(asked, out=nowhere), ranks)
            return Prepared(p.config, p.layout, p)
    read_knobs(asked.machine.ds_config, asked.machine.unproven)
    return Prepared(config.freeze(asked, IMAGENET_IMAGES), config.batch_layout(asked, ranks), None)


def batches(prepared: Prepared, world: World, device: torch.device) -> Iterator[Batch]:
    """Micro batches of this rank: the loader's, or one made-up batch on the device, at ever new positions. Made-up
    captions have as many tokens as captions may have."""
    c, layout = prepared.config, prepared.layout
    if p := prepared.plan:
        yield from loader.batches(c.data, p.located, c.seed, layout, world.rank, 0, (), p.speech.beside(None))
    generator = torch.Generator().manual_seed(c.seed)
    shape = (layout.micro, 3, c.data.image_size, c.data.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(c.model.num_classes or 1, (layout.micro,), generator=generator).to(device)
    text = _made_up_text(c, layout.micro, device) if c.model.text_width else None
    positions = np.arange(layout.micro) + layout.micro * world.rank
    while True:
        yield Batch(images, labels, positions, text=text)
        positions = positions + layout.micro * layout.ranks


def told(prepared: Prepared, world: World, device: torch.device) -> Conditioner:
    """What the network is told of those batches. Every rank calls it."""
    c = prepared.config
    if p := prepared.plan:
        p.speech.to(device)
        return conditioner.of_run(p.config, p.speech, world, device)
    return (
        StoredText(_made_up_text(c, 1, device), device) if c.model.text_width else Classes(c.model.num_classes, device)
    )


def _made_up_text(c: Config, captions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(c.seed)
    features = torch.randn(captions, c.text.max_tokens, c.model.text_width, generator=generator).bfloat16()
    return features.to(device), torch.ones(captions, c.text.max_tokens, dtype=torch.bool, device=device)


def save(timed: TrainingStep, c: Config, folder: Path, world: World) -> Saves:
    """Write checkpoints in the background, a step after each; the first makes buffers and is not counted."""
    e, saves = timed.engine, Saves([], [])
    layout = engine.layout(e, world)
    state = State(Counters(), c, "", (), layout, engine.adam_steps(e))
    run = Path(dist.gather(world, tempfile.mkdtemp(dir=folder) if world.main else "")[0])
    try:
        with closing(Saver(run, CheckpointConfig(keep=1), world)) as saver:
            for number in range(1, SAVES + 2):
                start, waited = time.perf_counter(), saver.stall
                counters = Counters(number, number)
                saver.save(dataclasses.replace(state, counters=counters), engine.share(e, layout, world))
                stall = saver.stall - waited
                timed()
                saver.finish()
                if number > 1:
                    saves.stalls.append(stall)
                    saves.written.append(time.perf_counter() - start)
        dist.barrier(world)
    finally:
        if world.main:
            shutil.rmtree(run)
    return saves


def _peaks(
    products: list[peak.Product], prepared: Prepared, world: World, device: torch.device
) -> dict[peak.Product, float]:
    """All ranks at once, as in a step."""
    dist.barrier(world)
    return peak.measure(products, prepared.config.precision, device)

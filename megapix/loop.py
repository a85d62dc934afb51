"""A run from start to end. One step reads: batch → loss → backward → step → count → log → save."""

from __future__ import annotations

import json
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megapix import checkpoint, config, dist, engine, flow, metrics, sample, weights
from megapix.checkpoint import Counters, State
from megapix.config import Config
from megapix.data import loader, order
from megapix.data.loader import Spent
from megapix.dist import World
from megapix.model import PixelDiT
from megapix.prepare import Plan, plan, same_everywhere
from megapix.shards import write_atomic

MAX_SKIPPED_IN_A_ROW = 100
"""A run that skips this many steps in a row (gradient not finite) has diverged and ends with an error."""


def train(asked: Config, world: World) -> None:
    """Train, or go on training, as `asked`; every rank calls it.

    Raises:
        InputError: bad input, found before the first step and raised on every rank; or a sample that cannot be read.
        FloatingPointError: every recent step was skipped.
    """
    if not torch.cuda.is_available():
        world.say(
            "joining CPU ranks (the first time on a machine, DeepSpeed compiles a communication op: about a minute)"
        )
    device = engine.start(world)
    p = dist.together(world, lambda: plan(asked, world.size))
    same_everywhere(world, p)
    run, c = Path(p.config.out), p.config
    for change in p.changes:
        world.say(f"changed since the checkpoint: {change}")
    if p.state and p.finished:
        world.say(f"{run} is finished: {p.state.counters.images_seen:,} images seen, last checkpoint {p.resume}")
        return

    if c.data.workers:
        loader.start_workers()
    net = engine.build_network(c.model, c.seed, engine.pixel_checkpoint(c.machine.pixel_checkpointing))
    if c.init and p.state is None:
        dist.together(world, lambda: weights.assign(net, weights.load_weights(c.init)))
    e = engine.build(c, p.layout, net)
    counters = p.state.counters if p.state else Counters()
    if p.resume:
        engine.load(e, p.resume, counters.images_seen)
    _announce(p, world, net, counters)
    if world.main:
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / "config.json", (json.dumps(config.to_dict(c), indent=1) + "\n").encode())
    _steps(e, p, counters, world, device)
    world.say(f"finished: {p.end:,} images seen; {checkpoint.latest(run)}")


def _steps(e: Any, p: Plan, counters: Counters, world: World, device: torch.device) -> None:
    c, run, total, skipped = p.config, Path(p.config.out), p.layout.total, counters.skipped
    schedule, position, in_a_row, logged = e.lr_scheduler, counters.position, 0, counters.position
    batches = loader.batches(c.data, p.located, c.seed, p.layout, world.rank, position, skipped)
    meter, clock, spent, replaced = metrics.LossMeter(device), metrics.Clock(), Spent(), 0
    bar = tqdm(total=p.end, initial=schedule.images_seen, unit="img", disable=not world.main, **_bar_style())
    board = metrics.Writer(run / "tensorboard", counters.drawn // total, enabled=world.main)
    board.configuration(counters.drawn // total, config.to_dict(c))

    with bar, closing(board):
        while schedule.images_seen < p.end:
            before, lr = schedule.images_seen, schedule.get_last_lr()[0]
            for _ in range(p.layout.accumulation):
                with clock.waiting():
                    batch = next(batches)
                spent.add(batch.spent)
                replaced += len(batch.replaced)
                for fault in batch.replaced:
                    dist.warn(f"rank {world.rank} replaced a damaged sample: {fault}")
                images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
                loss, t = flow.training_loss(e, images, labels, batch.positions, c.seed, c.flow)
                e.backward(loss.mean())
                e.step()
                meter.add(loss, t)

            _, position = order.take(position, total, skipped)
            counters = Counters(position, schedule.images_seen, skipped)
            now, step = counters.images_seen, counters.drawn // total
            in_a_row = _skips(e.was_step_applied(), in_a_row, step, world)
            bar.update(now - before)

            if _due(c.log.every, before, now, p.end):
                row = meter.read(world.size) | clock.read(position - logged) | metrics.memory(device)
                row |= {"schedule/lr": lr, "schedule/images_seen": now}
                row |= {"health/grad_norm": float(e.get_global_grad_norm())}
                row |= {"health/skipped_steps": (counters.drawn - now) // total}
                row |= {"health/replaced_samples": sum(dist.gather(world, replaced))}
                row |= spent.row((position - logged) // p.layout.ranks)
                logged, spent = position, Spent()
                bar.set_postfix(loss=f"{row['loss/train']:.4f}", lr=f"{lr:.1e}", refresh=False)
                board.scalars(step, row)
            if _due(c.checkpoint.every, before, now, p.end):
                state = State(counters, c, p.located.index.digest, p.located.index.class_names, world.size)
                checkpoint.save(run, state, world, partial(engine.save, e), c.checkpoint.keep)
            if _due(c.log.samples_every, before, now, p.end):
                board.image(step, "samples/ema", ema_grid(e, c, world, device))


def _skips(applied: bool, in_a_row: int, step: int, world: World) -> int:
    """Steps skipped in a row, this one included; a skipped step is said aloud, and too many of them end the run."""
    if applied:
        return 0
    world.say(f"step {step} skipped: the gradient is not finite ({in_a_row + 1} in a row)")
    if in_a_row + 1 >= MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(f"{in_a_row + 1} steps in a row had a gradient that is not finite: the run diverged")
    return in_a_row + 1


def ema_grid(e: Any, c: Config, world: World, device: torch.device) -> np.ndarray:
    """A grid of EMA samples, one class a row: uint8 [H, W, 3]. Each rank draws its share; every rank gets the grid."""
    rows, columns, s = min(c.log.grid_classes, c.model.num_classes), c.log.grid_columns, c.sampling
    numbers = list(range(rows * columns))
    mine = numbers[world.rank :: world.size]
    noise = sample.seeded_noise(c.seed, mine, (c.data.image_size, c.data.image_size), device)
    labels = torch.tensor([n // columns for n in mine], dtype=torch.int64, device=device)
    with engine.ema_weights(e) as net:
        images = sample.draw(net, noise, labels, s) if mine else noise  # more ranks than images: nothing to draw
    shares = dist.gather(world, sample.to_uint8(images))
    grid = np.empty((len(numbers), *shares[0].shape[1:]), np.uint8)
    for rank, share in enumerate(shares):
        grid[rank :: world.size] = share
    return sample.grid(grid, columns)


def _due(every: Any, before: int, now: int, end: int) -> bool:
    """Whether a multiple of `every` images, or the end, was reached between `before` and `now`."""
    return every != "never" and now > before and (now // every > before // every or now >= end)


def _announce(p: Plan, world: World, net: PixelDiT, counters: Counters) -> None:
    c, layout = p.config, p.layout
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    classes = f"{p.located.index.samples:,} images in {len(p.located.index.classes)} classes"
    world.say(f"run {c.out}: {millions:.1f} M parameters, {c.precision}, {classes}")
    world.say(f"global batch {layout}")
    for fault in p.located.faults:
        world.say(f"its samples will be replaced: {fault}")
    if p.resume:
        world.say(f"going on from {p.resume} at {counters.images_seen:,} images seen")


def _bar_style() -> dict[str, Any]:
    """A line every half second on a terminal, every ten seconds in a log file."""
    terminal = os.isatty(2)
    return {"mininterval": 0.5 if terminal else 10.0, "dynamic_ncols": terminal, "unit_scale": True, "smoothing": 0.1}

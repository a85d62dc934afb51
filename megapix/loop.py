"""A run from start to end. One step reads: batch → loss → backward → step → count → agree → log → save → sample."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megapix import (
    blocks,
    checkpoint,
    conditioner,
    config,
    consensus,
    dist,
    engine,
    flow,
    metrics,
    recovery,
    repa,
    retention,
    stages,
    stopping,
    storage,
    weights,
)
from megapix.checkpoint import Counters, Stage, State
from megapix.claim import claim
from megapix.condition import Condition
from megapix.conditioner import Conditioner
from megapix.config import Config
from megapix.data import loader, order, workers
from megapix.data.loader import Batch
from megapix.dist import World
from megapix.ds_config import unproven
from megapix.errors import Trouble
from megapix.grid import ema_grid
from megapix.health import Sentinel, Skips, Spike
from megapix.model import Alignment, PixelDiT
from megapix.prepare import Plan, plan, same_everywhere, write_config
from megapix.profiling import Trace
from megapix.report import Report
from megapix.saver import Saver
from megapix.small_evaluation import SmallEvaluation
from megapix.stopping import StopRequest, StopRequested
from megapix.validation import HeldOut
from megapix.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    plan: Plan
    world: World
    device: torch.device
    engine: Any
    saver: Saver
    stop: StopRequest
    watch: Watchdog
    trace: Trace | None
    """The profiler, where it is asked for."""
    conditioner: Conditioner
    """What the network is told of a batch."""
    shown: Condition
    """What the rows of the sample grid are about."""

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.plan.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)


class Rollback(Exception):
    """A spike after which the run goes back; carries where it stood."""

    def __init__(self, spike: Spike, state: State) -> None:
        super().__init__(spike.reason)
        self.spike, self.state = spike, state


def train(asked: Config, world: World) -> None:
    """Train, or go on training, as `asked`; every rank calls it.

    Raises:
        InputError: bad input, found before the first step and raised on every rank; or a sample that cannot be read.
        Trouble: the run diverged, or a checkpoint could not be written; on every rank.
        StopRequested: all ranks have agreed to stop, and all is saved.
    """
    device = engine.start(world)
    dist.together(world, lambda: config.validate(asked))
    stop = StopRequest(Path(asked.out), world)
    choice = checkpoint.choose(Path(asked.out), asked.resume, world)
    p = dist.together(world, lambda: plan(asked, world.size, choice))
    same_everywhere(world, p)
    folder, c = Path(p.config.out), p.config
    for reason in choice.refused if world.main else ():
        dist.warn(f"checkpoint refused: {reason}")
    for change in p.changes:
        world.say(f"changed since the checkpoint: {change}")
    if p.saved and p.finished:
        world.say(f"{folder} is finished: {p.saved.state.counters.images_seen:,} images seen, {p.saved.folder}")
        return
    with claim(folder, world), Watchdog(world, c.machine.watchdog, _waits(c)) as watch:
        _run(p, world, device, stop, watch)
        dist.barrier(world)  # nobody says goodbye while another still works
    world.say(f"finished: {p.end:,} images seen; {checkpoint.latest(folder)}")


def _run(p: Plan, world: World, device: torch.device, stop: StopRequest, watch: Watchdog) -> None:
    """Build the engine, load the checkpoint, and train to the end."""
    c, folder = p.config, Path(p.config.out)
    if c.data.workers:
        workers.start_server(stopping.SIGNALS)
    if p.teacher:
        p.teacher.to(device)
    alignment = Alignment(c.repa.layer, p.aligned_width) if p.aligned_width else None
    p.speech.to(device)
    net = engine.build_network(c.model, c.seed, c.machine, alignment)
    before: tuple[Stage, ...] = ()
    if c.init and not p.saved:
        initial = weights.load_weights(c.init, stages.kind(c), world)
        dist.together(world, lambda: weights.assign(net, initial))
        before = dist.gather(world, stages.of(initial.about) if world.main else ())[0]
        world.say(f"stage {len(before) + 1}: starting from the {initial.about.kind} of {initial.about.source}")
    e = engine.build(c, p.layout, net)
    if p.saved:
        engine.load(e, p.saved, world)
    layout, index = engine.layout(e, world), p.located.index
    fresh = State(Counters(), c, index.digest, index.class_names, layout, adam_steps=0, stages=before)
    state = p.saved.state if p.saved else fresh
    state = replace(state, config=c, layout=layout, files={})
    _announce(p, world, net)
    write_config(world, p)
    told = conditioner.of_run(c, p.speech, world, device, folder)
    shown = told.rows(c.log.grid_classes)
    for path in dist.together(world, lambda: retention.settle(folder, p.saved) if world.main else []):
        dist.warn(f"set aside, because the run goes on from before it: {path}")
    with ExitStack() as at_end:
        saver, trace = at_end.enter_context(closing(Saver(folder, c.checkpoint, world))), None
        if c.profile:
            done = state.counters.drawn // p.layout.total
            trace = at_end.enter_context(closing(Trace(c.profile, folder / "profile", world.rank, done)))
        _until_the_end(Run(p, world, device, e, saver, stop, watch, trace, told, shown), state)


def _until_the_end(run: Run, state: State) -> None:
    """Step from `state` to the end, by way of rollbacks."""
    h, happened = run.config.health, ""
    if h.on_spike == "rollback" and run.plan.saved is None:
        run.saver.save(state, _share(run, state))  # a spike before the first checkpoint needs one too
    while True:
        try:
            return _steps(run, state, happened)
        except Rollback as back:
            if back.state.rollbacks >= h.max_rollbacks:
                raise Trouble(
                    f"{back}; the run has been rolled back {back.state.rollbacks} times (health.max_rollbacks)"
                ) from None
            total = run.plan.layout.total
            run.watch.note(back.state.counters.drawn // total, "load")
            saved = recovery.roll_back(run.folder, back.spike, back.state, h.skip * total, run.world)
            run.watch.note(saved.state.counters.drawn // total, "load")
            engine.load(run.engine, saved, run.world)
            state = replace(saved.state, config=state.config, layout=state.layout, files={})
            ranges = ", ".join(f"{start:,} to {stop:,}" for start, stop in state.counters.skipped)
            happened = f"rolled back to {saved.folder.name}: {back}; positions never drawn: {ranges}"
            run.world.say(f"rolled back to {saved.folder}; positions never drawn: {ranges}")


def _steps(run: Run, state: State, happened: str) -> None:
    """Step from `state` to the end; TensorBoard is told what has `happened` before."""
    p, c, e, world, saver, watch = run.plan, run.config, run.engine, run.world, run.saver, run.watch
    total, counters, skipped = p.layout.total, state.counters, state.counters.skipped
    schedule, position, saved, spikes = e.lr_scheduler, counters.position, state, state.spikes
    stored = p.features if repa.active(c.repa, schedule.images_seen) else None
    draw_from = partial(loader.batches, c.data, p.located, c.seed, p.layout, world.rank)
    batches = draw_from(position, skipped, p.speech.beside(stored))
    sentinel = Sentinel(c.health, state.recent, state.standing_out)
    skips, mean = Skips(c.health.max_skipped, state.skipped_in_a_row), metrics.Mean()
    held_out = None
    if p.validation:
        held_out = HeldOut(p.validation, c, run.conditioner, p.speech.held_out, world, run.device)
    evaluation = SmallEvaluation(p.standard, run.conditioner, c, world, run.device) if p.standard else None
    report = Report(c, p.layout, world, run.device, saver, counters.drawn)
    bar = tqdm(total=p.end, initial=schedule.images_seen, unit="img", disable=not world.main, **_bar_style())
    board = metrics.Writer(run.folder / "tensorboard", counters.drawn // total, enabled=world.main)
    board.configuration(counters.drawn // total, config.to_dict(c))
    if p.speech.prompts:
        rows = p.speech.prompts[: c.log.grid_classes]
        board.text(counters.drawn // total, "samples/prompts", "\n".join(f"1. {row}" for row in rows))
    if happened:
        board.event(counters.drawn // total, happened)

    def here() -> State:
        """Where the run stands, to be saved. At no more images seen it takes the saved one's place."""
        again = saved.counters.images_seen == counters.images_seen
        return replace(
            state,
            counters=counters,
            adam_steps=engine.adam_steps(e),
            previous=saved.previous if again else saved.counters.images_seen,
            loss=saved.loss if again else mean.value,
            recent=tuple(sentinel.recent),
            spikes=spikes,
            standing_out=tuple(sentinel.standing_out),
            skipped_in_a_row=skips.in_a_row,
        )

    def save() -> None:
        nonlocal saved, mean
        watch.note(step, "save")
        saved, mean = here(), metrics.Mean()
        saver.save(saved, _share(run, state), prune=not sentinel.suspicious)

    def listen(phase: str) -> None:
        """Between the parts of work that takes long: it is no hang, and ends when any rank was asked to stop."""
        watch.note(step, phase)
        if consensus.any_rank(world, run.stop.asked, run.device):
            raise StopRequested

    with bar, closing(board), ExitStack() as at_end:
        at_end.callback(lambda: batches.close())  # the last ones
        while schedule.images_seen < p.end:
            seen, start, lr = schedule.images_seen, position, schedule.get_last_lr()[0]
            step, step_loss = counters.drawn // total + 1, torch.zeros((), device=run.device)
            if run.trace:
                watch.note(step, "profile")
                run.trace.begin_step()
            aligned = repa.active(c.repa, seen)
            if stored and not aligned:  # the workers have read ahead; from here on none reads features
                batches.close()
                stored, batches = None, draw_from(position, skipped, p.speech.beside(None))
            norms = blocks.Watch(e) if _due(c.log.blocks_every, seen, seen + total, p.end) else None
            for _ in range(p.layout.accumulation):
                watch.note(step, "data")
                batch = report.draw(batches)
                images, condition = batch.images.to(run.device, non_blocking=True), run.conditioner.of(batch)
                watch.note(step, "backward")
                if aligned:
                    features = p.teacher(images) if p.teacher else _stored(batch, run.device)
                    drawn = images, condition, batch.positions, c.seed, c.flow
                    loss, t, apart = repa.training_loss(e, features, *drawn)
                    e.backward(loss.mean() + c.repa.weight * apart.mean())
                    report.add_apart(apart)
                else:
                    loss, t = flow.training_loss(e, images, condition, batch.positions, c.seed, c.flow)
                    e.backward(loss.mean())
                watch.note(step, "step")
                e.step()
                report.add(loss, t)
                step_loss += loss.detach().mean() / p.layout.accumulation

            _, position = order.take(position, total, skipped)
            now, applied = schedule.images_seen, e.was_step_applied()
            counters = Counters(position, now, skipped)

            watch.note(step, "agree")
            norm = e.get_global_grad_norm() if applied else math.nan
            heard = consensus.after_step(world, step_loss, norm, run.stop.asked, saver.failed)
            if norms:
                board.scalars(step, norms.read(world.size))
            if heard.save_failed:
                saver.finish()
            if not applied:
                world.say(f"step {step} skipped: {heard.fault} ({skips.in_a_row + 1} in a row)")
                board.event(step, f"skipped: {heard.fault}")
            skips.count(applied, step, heard.fault)
            if applied and (spike := sentinel.look(heard.loss, heard.grad_norm, start, step)):
                spikes += 1
                board.event(step, f"spike: {spike.reason}; health.on_spike = {c.health.on_spike!r}")
                _on_spike(run, spike, here())
            mean.add(heard.loss)
            bar.update(now - seen)

            if _due(c.log.every, seen, now, p.end):
                watch.note(step, "log")
                row = report.row(counters) | {"schedule/lr": lr, "health/grad_norm": heard.grad_norm}
                row |= {"health/spikes": spikes, "health/rollbacks": state.rollbacks}
                bar.set_postfix(loss=f"{heard.loss:.4f}", lr=f"{lr:.1e}", refresh=False)
                board.scalars(step, row)
            if _due(c.checkpoint.every, seen, now, p.end):
                save()
            try:
                if heard.stop:
                    raise StopRequested
                if _due(c.log.samples_every, seen, now, p.end):
                    picture = ema_grid(e, c, run.shown, world, run.device, partial(listen, "sample"))
                    board.image(step, "samples/ema", picture)
                if held_out and _due(c.validation.every, seen, now, p.end):
                    board.scalars(step, held_out.losses(e, partial(listen, "validate")))
                if evaluation and _due(c.evaluation.every, seen, now, p.end):
                    board.scalars(step, evaluation.scores(e, listen))
            except StopRequested:
                if saved.counters != counters:
                    save()
                watch.note(step, "save")
                _stop(run)
        watch.note(counters.drawn // total + 1, "save")
        saver.finish()


def _stored(batch: Batch, device: torch.device) -> torch.Tensor:
    """The features that the loader has read with the images."""
    assert batch.features is not None, "read while REPA is active"
    return batch.features.to(device, non_blocking=True)


def _on_spike(run: Run, spike: Spike, state: State) -> None:
    """Say so, keep the last healthy checkpoint, and do what health.on_spike says."""
    run.watch.note(spike.step, "save")
    run.saver.finish()  # the last healthy one may still be on its way
    run.world.say(f"spike: {spike.reason}")
    if run.config.health.on_spike == "rollback":
        raise Rollback(spike, state)
    healthy = recovery.keep_healthy(run.folder, spike, run.world)
    kept = f"the last checkpoint before it is {healthy} and stays" if healthy else "there is no checkpoint before it"
    run.world.say(kept)
    if run.config.health.on_spike == "stop":
        raise Trouble(f"{spike.reason}; {kept}")


def _stop(run: Run) -> None:
    """End the run as it was asked to, with all saved."""
    run.saver.finish()
    run.stop.done()
    asked = next(reason for reason in dist.gather(run.world, run.stop.reason) if reason)
    raise StopRequested(f"stopped by {asked} at {checkpoint.latest(run.folder)}; the same command goes on") from None


def _share(run: Run, state: State) -> dict[str, torch.Tensor]:
    return engine.share(run.engine, state.layout, run.world)


def _waits(c: Config) -> dict[str, float]:
    """Phase -> seconds it may take beyond the watchdog's: a remote read is tried again before it fails by itself."""
    each = c.data.timeout + 10  # up to 10 s lie between two tries
    return {"data": (1 + c.data.retries) * each} if storage.is_url(c.data.path) else {}


def _due(every: Any, before: int, now: int, end: int) -> bool:
    """Whether a multiple of `every` images, or the end, was reached between `before` and `now`."""
    return every != "never" and now > before and (now // every > before // every or now >= end)


def _announce(p: Plan, world: World, net: PixelDiT) -> None:
    c, layout = p.config, p.layout
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    images, about = f"{p.located.index.samples:,} images", p.speech.about
    about = about or f"in {len(p.located.index.classes)} classes"
    world.say(f"run {c.out}: {millions:.1f} M parameters, {c.precision}, {images} {about}")
    world.say(f"global batch {layout}")
    for key in unproven(c) if world.main and torch.cuda.is_available() else ():
        dist.warn(
            f"{key}: docs/parity.md proves it on CPU ranks only; `megapix doctor --parity` proves it on these GPUs"
        )
    if c.machine.pixel_kernels == "triton" and world.main and torch.cuda.is_available():
        dist.warn(
            "machine.pixel_kernels: tests prove the kernels in Triton's interpreter only; "
            "compare some steps of this run with --machine.pixel-kernels plain"
        )
    for caution in p.standard.cautions("evaluation.count", c.evaluation.count) if world.main and p.standard else ():
        dist.warn(caution)
    for fault in p.located.faults:
        world.say(f"its samples will be replaced: {fault}")
    if p.saved:
        world.say(f"going on from {p.saved.folder} at {p.saved.state.counters.images_seen:,} images seen")


def _bar_style() -> dict[str, Any]:
    """A line every half second on a terminal, every ten seconds in a log file."""
    terminal = os.isatty(2)
    return {"mininterval": 0.5 if terminal else 10.0, "dynamic_ncols": terminal, "unit_scale": True, "smoothing": 0.1}

"""A run from start to end. A step is: batch → loss → backward → step → agree → count → react → log → save → stop →
sample, validate, evaluate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megapix import config, dist, outage
from megapix.checkpoint.find import choose
from megapix.checkpoint.folder import latest
from megapix.checkpoint.manifest import State
from megapix.config import Config
from megapix.data import workers
from megapix.data.batch import Batch
from megapix.diffusion import flow, repa
from megapix.dist import World, gather, on_all_ranks
from megapix.engine import processes
from megapix.engine.schedule import learning_rate
from megapix.errors import RunError
from megapix.monitoring.block_norms import Watch
from megapix.monitoring.report import Report
from megapix.resilience import agreement, out_of_memory
from megapix.resilience.agreement import StepOutcome
from megapix.resilience.health import Spike
from megapix.resilience.run_lock import PATIENCE, run_lock
from megapix.resilience.stopping import StopRequest, StopRequested
from megapix.resilience.watchdog import Watchdog
from megapix.train import automatic, rollback, run_folder
from megapix.train.feed import Feed
from megapix.train.progress import Progress
from megapix.train.resolve import ResolvedRun, check_writable, resolve
from megapix.train.run import Run, build, with_weights
from megapix.train.sample_grid import ema_grid


class Rollback(Exception):
    """A spike after which the run rolls back; carries the state at that moment."""

    collective = True

    def __init__(self, spike: Spike, state: State) -> None:
        super().__init__(spike.reason)
        self.spike, self.state = spike, state


class Losses(NamedTuple):
    """Losses per sample of a micro batch, float32 [B] each."""

    flow: Tensor
    """Squared error of the velocity (paper, section 3)."""
    t: Tensor
    alignment: Tensor | None
    """REPA's alignment loss, 1 - cos, while it is on."""


def train(requested: Config, world: World, classes_given: bool = True) -> None:
    """Start or resume the `requested` run; every rank calls it. `classes_given` as in `resolve`.

    Raises:
        InputError: bad input, found before the first step and raised on every rank; or a sample that may not be read.
        RunError: the run diverged; on every rank.
        StorageError: something could not be read for longer than it is waited for, or checkpoints not be written.
        Reported: any other error, of one rank of several; a single rank raises it as it is.
        StopRequested: all ranks have agreed to stop, and the run is saved.
    """
    device = processes.start(world)
    on_all_ranks(world, lambda: config.validate(requested))
    with Watchdog(world, requested.machine.watchdog, _waits(requested)) as watchdog:
        outage.note_waits(workers.WAITED)
        watchdog.notes.waiting = lambda: workers.WAITED.value
        _train(requested, world, device, watchdog, classes_given)


def _train(requested: Config, world: World, device: torch.device, watchdog: Watchdog, classes_given: bool) -> None:
    stop = StopRequest(Path(requested.out), world)
    on_all_ranks(world, lambda: check_writable(Path(requested.out)))
    # First of all: what is read of the folder while the run before is still ending may be old when it has ended.
    watchdog.note(0, "lock")
    with run_lock(Path(requested.out), world):
        watchdog.note(0, "start")
        _in_folder(requested, world, device, stop, watchdog, classes_given)


def _in_folder(
    requested: Config,
    world: World,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    classes_given: bool,
) -> None:
    choice = choose(Path(requested.out), requested.resume, world)
    resolved = on_all_ranks(world, lambda: resolve(requested, world.size, choice, classes_given))
    cards = automatic.cards_of(world, device)
    lacks = automatic.lacking(world, cards)
    resolved, lines = on_all_ranks(world, lambda: automatic.settle(resolved, cards, lacks))
    run_folder.same_everywhere(world, resolved)
    folder = Path(resolved.config.out)
    for reason in choice.refused if world.main else ():
        dist.warn(f"checkpoint refused: {reason}")
    for line in resolved.kept:
        world.say(line)
    for change in resolved.changes:
        world.say(f"changed since the checkpoint: {change}")
    for line in lines:
        world.say(line)
    if resolved.saved and resolved.finished:
        seen = resolved.saved.state.counters.images_seen
        world.say(f"{folder} is finished: {seen:,} images seen, {resolved.saved.folder}")
        return
    with _telling(resolved, world, watchdog), ExitStack() as at_end:
        seen = train_from(*build(resolved, world, device, stop, watchdog, at_end))
    dist.barrier(world)  # no rank says goodbye while another still works
    why = f"; every set of {resolved.config.data.path!r} is at its limit" if seen < resolved.end else ""
    world.say(f"finished: {seen if why else resolved.end:,} images seen; {latest(folder)}{why}")


def train_from(run: Run, state: State) -> int:
    """Train from `state` to the end, with rollbacks where spikes ask for them; returns the images seen there."""
    c, layout, happened = run.config, run.resolved.layout, ""
    if c.health.on_spike == "rollback" and run.resolved.saved is None:
        run.saver.save(state, run.share(state))  # a spike before the first checkpoint needs one too
    while True:
        progress = Progress(state, c, layout, run.engine, run.resolved.end_of_data(state))
        report = Report(c, layout, run.world, run.device, run.saver, state)
        report.begin(run.resolved.text.prompts[: c.log.grid_classes], happened)
        try:
            telling = _telling(run.resolved, run.world, run.watchdog)
            with closing(report), closing(Feed(run, progress)) as feed, telling:
                steps(run, progress, feed, report)
                return progress.counters.images_seen
        except Rollback as back:
            state, happened = _roll_back(run, back)


def steps(run: Run, progress: Progress, feed: Feed, report: Report) -> None:
    """Step to the end; `progress` is where the run stands."""
    c = run.config
    while not progress.finished:
        outcome = take_step(run, progress, feed, report)
        progress.count()
        react(run, progress, report, outcome)
        if progress.due(c.log.every):
            log(run, progress, feed, report, outcome)
        if progress.due(c.checkpoint.every):
            save(run, progress, report)
        try:
            measure(run, progress, report, outcome)
        except StopRequested:
            save_and_stop(run, progress, report)
    if progress.used_up and not progress.saved:  # its last step was skipped
        save(run, progress, report)
    run.watchdog.note(progress.step + 1, "save")
    run.saver.settle()
    run.watchdog.note(progress.step + 1, "close")


def take_step(run: Run, progress: Progress, feed: Feed, report: Report) -> StepOutcome:
    """One global batch through the network and the optimizer, and what all ranks know of it."""
    engine, note, step = run.engine, partial(run.watchdog.note, progress.step + 1), progress.step + 1
    if run.trace:
        note("profile")
        run.trace.begin_step()
    norms = Watch(engine) if progress.next_due(run.config.log.blocks_every) else None
    accumulation, step_loss = run.resolved.layout.accumulation, torch.zeros((), device=run.device)
    for number in range(1, accumulation + 1):
        note("data")
        batch = feed.next()
        note("backward")
        losses = losses_of(run, batch, feed.aligned)
        engine.backward(total(losses, run.config.repa.weight))
        report.add(*losses)
        step_loss += losses.flow.detach().mean() / accumulation
        note("step")
        ends = number == accumulation
        word = agreement.word(run.world, step_loss, run.stop.asked, run.saver.failed) if ends else None
        sums = engine.step(word)
    note("agree")
    assert word is not None
    sums = sums or dist.total(run.world, word)  # an offloaded optimizer has not added them up
    outcome = agreement.outcome(run.world, sums, float(engine.grad_norm) if engine.applied else math.nan)
    if norms:
        report.scalars(step, norms.read(run.world.size))
    return outcome


def losses_of(run: Run, batch: Batch, aligned: bool) -> Losses:
    """The network's losses on a micro batch."""
    c = run.config
    images, condition = batch.images.to(run.device, non_blocking=True), run.conditioner.of(batch)
    drawn = images, condition, batch.positions, c.seed, c.flow, flow.Draws(*batch.draws), run.objective
    if not aligned:
        return Losses(*flow.training_loss(run.engine, *drawn), None)
    features = run.resolved.teacher(images) if run.resolved.teacher else _stored(batch, run.device)
    return Losses(*repa.training_loss(run.engine, features, *drawn))


def total(losses: Losses, weight: float) -> Tensor:
    """The loss to differentiate: the flow's mean loss plus `weight` times the mean alignment loss."""
    flow_loss = losses.flow.mean()
    return flow_loss if losses.alignment is None else flow_loss + weight * losses.alignment.mean()


def react(run: Run, progress: Progress, report: Report, outcome: StepOutcome) -> None:
    """Report a step that was skipped or is a spike, and stop or roll back where health.on_spike says so.

    Raises:
        RunError: too many saves in a row failed, too many steps in a row were skipped, or a spike ends the run.
        Rollback: a spike, with health.on_spike = 'rollback'.
    """
    applied, step = run.engine.applied, progress.step
    if outcome.save_failed and not run.saver.finish():
        progress.not_saved()
    if not applied:
        run.world.say(f"step {step} skipped: {outcome.fault} ({progress.skips.in_a_row + 1} in a row)")
        report.event(step, f"skipped: {outcome.fault}")
    progress.skips.count(applied, step, outcome.fault)
    start = progress.before.position
    spike = progress.sentinel.look(outcome.loss, outcome.grad_norm, start, step) if applied else None
    if spike:
        progress.spikes += 1
        report.event(step, f"spike: {spike.reason}; health.on_spike = {run.config.health.on_spike!r}")
        _on_spike(run, spike, progress.state())
    progress.add_loss(outcome)
    report.advance(progress.counters)


def log(run: Run, progress: Progress, feed: Feed, report: Report, outcome: StepOutcome) -> None:
    """Write a row of scalars. Every rank calls it."""
    run.watchdog.note(progress.step, "log")
    lr = learning_rate(progress.before.images_seen, run.config.optim)
    row = {"schedule/lr": lr, "health/grad_norm": outcome.grad_norm}
    row |= {"health/spikes": progress.spikes, "health/rollbacks": progress.rollbacks}
    report.row(progress.step, progress.counters, feed.row() | row, keep=not progress.passed(run.config.log.every))
    report.show(outcome.loss, lr)


def save(run: Run, progress: Progress, report: Report) -> None:
    """Write a checkpoint of where the run stands."""
    run.watchdog.note(progress.step, "save")
    if not run.saver.finish():
        progress.not_saved()
    state = replace(progress.save(), window=report.window())
    run.saver.save(state, run.share(state), prune=not progress.sentinel.suspicious)


def measure(run: Run, progress: Progress, report: Report, outcome: StepOutcome) -> None:
    """Sample, validate and evaluate where it is due.

    Raises:
        StopRequested: any rank was asked to stop, before or meanwhile; on every rank.
    """
    c, step, listen = run.config, progress.step, partial(run.listen, progress.step)
    if outcome.stop:
        raise StopRequested
    begin = partial(run.watchdog.note, step, begins=True)
    _tell_share(run, progress, report)
    if progress.due(c.log.samples_every):
        begin("sample")
        picture = ema_grid(run.engine, c, run.rows, run.world, run.device, partial(listen, "sample"))
        if picture is not None:
            report.image(step, "samples/ema", picture)
    if run.validation and progress.due(c.validation.every):
        begin("validate")
        report.scalars(step, run.validation.losses(run.engine, partial(listen, "validate")))
    if run.evaluation and progress.due(c.evaluation.every):
        begin("evaluate")
        report.scalars(step, run.evaluation.scores(run.engine, listen))


def _tell_share(run: Run, progress: Progress, report: Report) -> None:
    """Say how much of an EMA that is about to be sampled is no training yet."""
    c = run.config
    sampled = (c.log.samples_every, *((c.evaluation.every,) if run.evaluation else ()))
    words = config.share_in_words(c.optim.ema_share(run.engine.optimizer.steps))
    if words and any(progress.due(span) for span in sampled):
        run.world.say(f"step {progress.step}: {words}")
        report.event(progress.step, words)


def save_and_stop(run: Run, progress: Progress, report: Report) -> None:
    """Stop the run as requested, with everything saved.

    Raises:
        StopRequested: always; its message names the checkpoint.
    """
    if not progress.saved:
        save(run, progress, report)
    run.watchdog.note(progress.step, "save")
    run.saver.settle()
    run.stop.done()
    reason = next(reason for reason in gather(run.world, run.stop.reason) if reason)
    raise StopRequested(f"stopped by {reason} at {latest(run.folder)}; the same command resumes") from None


def _on_spike(run: Run, spike: Spike, state: State) -> None:
    """Report a spike, keep the last healthy checkpoint, and do what health.on_spike says."""
    run.watchdog.note(spike.step, "save")
    run.saver.finish()  # it may still be writing the last healthy one
    run.world.say(f"spike: {spike.reason}")
    if run.config.health.on_spike == "rollback":
        raise Rollback(spike, state)
    healthy = rollback.keep_healthy(run.folder, spike, run.world)
    kept = f"the last checkpoint before it is {healthy} and stays" if healthy else "there is no checkpoint before it"
    run.world.say(kept)
    if run.config.health.on_spike == "stop":
        raise RunError(f"{spike.reason}; {kept}")


def _roll_back(run: Run, back: Rollback) -> tuple[State, str]:
    """Load the last healthy checkpoint before a spike; returns its state, and the event to log.

    Raises:
        RunError: it has been rolled back too often, or there is no such checkpoint.
    """
    h, layout, note = run.config.health, run.resolved.layout, run.watchdog.note
    if back.state.rollbacks >= h.max_rollbacks:
        raise RunError(
            f"{back}; the run has been rolled back {back.state.rollbacks} times (health.max_rollbacks)"
        ) from None
    note(back.state.counters.drawn // layout.total, "load")
    saved = rollback.roll_back(run.folder, back.spike, back.state, h.skip * layout.total, run.world)
    note(saved.state.counters.drawn // layout.total, "load")
    run.engine.load(saved, run.world)
    state = replace(saved.state, config=back.state.config, layout=back.state.layout, files={})
    state = with_weights(state, run.resolved.located)
    ranges = ", ".join(f"{start:,} to {stop:,}" for start, stop in state.counters.skipped)
    run.world.say(f"rolled back to {saved.folder}; positions skipped: {ranges}")
    return state, f"rolled back to {saved.folder.name}: {back}; positions skipped: {ranges}"


def _stored(batch: Batch, device: torch.device) -> Tensor:
    """The features that the loader has read with the images."""
    assert batch.features is not None, "read while REPA is active"
    return batch.features.to(device, non_blocking=True)


@contextmanager
def _telling(resolved: ResolvedRun, world: World, watchdog: Watchdog) -> Iterator[None]:
    """Have all ranks know of an error of this one before anything is closed; a lack of memory as one line."""
    ways = partial(out_of_memory.of_run, resolved.config, resolved.layout.micro)
    with watchdog.telling(), out_of_memory.told(world, watchdog.where, ways):
        yield


def _waits(c: Config) -> dict[str, float]:
    """Phase -> seconds it may take beyond the watchdog's: in each of them files are read. To wait for storage is news,
    but a pause between two tries says nothing, and a remote read may stall before it fails."""
    waits = outage.LONGEST + c.data.timeout
    phases = dict.fromkeys(("start", "data", "load", "save", "validate", "evaluate", "score"), waits)
    return phases | {"lock": PATIENCE}

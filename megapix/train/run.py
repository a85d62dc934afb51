"""What stays the same from the first step of a run to the last, and how it is built."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megapix import dist
from megapix.checkpoint import retention
from megapix.checkpoint.manifest import Counters, Stage, State
from megapix.checkpoint.saver import Saver
from megapix.conditioning.conditioner import Conditioner, of_run
from megapix.config import Config, unlike_released
from megapix.config.ds_config import unproven
from megapix.data import workers
from megapix.data.mix.located import Data, LocatedMix, scheduled
from megapix.diffusion import flow
from megapix.diffusion.condition import Condition
from megapix.dist import World, gather, on_all_ranks
from megapix.engine import zero2
from megapix.engine.compiled import Kinds, compilation, compile_methods
from megapix.engine.network import attention_of, build_network
from megapix.engine.zero2 import Zero2Engine
from megapix.model import Alignment, PixelDiT
from megapix.monitoring.profiling import Trace
from megapix.resilience import agreement
from megapix.resilience.stopping import StopRequest, StopRequested
from megapix.resilience.watchdog import Watchdog
from megapix.train.resolve import ResolvedRun
from megapix.train.run_folder import note_process, write_config
from megapix.train.small_evaluation import SmallEvaluation
from megapix.train.validation_loss import ValidationLoss
from megapix.weights import read, stages


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    resolved: ResolvedRun
    world: World
    device: torch.device
    engine: Zero2Engine
    saver: Saver
    stop: StopRequest
    watchdog: Watchdog
    trace: Trace | None
    """The profiler, if there is one."""
    conditioner: Conditioner
    """From a batch to the network's condition."""
    objective: flow.Objective
    rows: Condition
    """Condition of the rows of the sample grid."""
    validation: ValidationLoss | None
    evaluation: SmallEvaluation | None

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.resolved.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    def share(self, state: State) -> dict[str, Tensor]:
        """This rank's part of a checkpoint of `state`."""
        return self.engine.share(state.layout, self.world)

    def listen(self, step: int, phase: str) -> None:
        """Call it between the parts of long work, so that the watchdog sees no hang, and a stop is noticed.

        Raises:
            StopRequested: on every rank.
        """
        self.watchdog.note(step, phase)
        if agreement.any_rank(self.world, self.stop.asked, self.device):
            raise StopRequested


def build(
    resolved: ResolvedRun,
    world: World,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    at_end: ExitStack,
) -> tuple[Run, State]:
    """Build the engine, load the checkpoint, and begin to write to the run folder; returns the run and its first state.

    Args:
        at_end: closes what the run has opened.

    Raises:
        CollectiveInputError: the weights to start from, or the checkpoint, cannot be read; the folder not written.
    """
    c, folder, saved = resolved.config, Path(resolved.config.out), resolved.saved
    if c.data.workers:
        workers.start_server(resolved.located.remote)
    if resolved.teacher:
        resolved.teacher.to(device)
    resolved.text.to(device)
    alignment = Alignment(c.repa.layer, resolved.aligned_width) if resolved.aligned_width else None
    buckets = len(resolved.located.index.bucket_samples)
    network = build_network(c.model, c.seed, c.machine, alignment, buckets, c.text.max_tokens)
    attention = on_all_ranks(world, lambda: attention_of(c, device))
    before = () if saved else _initialise(network, c, world, resolved.located.index.class_names)
    engine = zero2.build(c, resolved.layout, network)
    if saved:
        engine.load(saved, world)
    layout, index = engine.layout(world), resolved.located.index
    fresh = State(Counters(), c, index.digest, index.class_names, layout, adam_steps=0, stages=before)
    state = replace(saved.state if saved else fresh, config=c, cards=resolved.cards, layout=layout, files={})
    state = with_weights(state, resolved.located)
    _announce(resolved, world, network, attention)
    write_config(world, resolved)
    note_process(world, resolved)
    conditioner = of_run(c, resolved.text, world, device, folder)
    rows = conditioner.rows(c.log.grid_classes)
    for path in on_all_ranks(world, lambda: retention.settle(folder, saved) if world.main else []):
        dist.warn(f"set aside, because the run resumes from before it: {path}")
    validation, evaluation = _measures(resolved, conditioner, world, device)
    written = partial(watchdog.notes.news, "save")
    saver, trace = at_end.enter_context(closing(Saver(folder, c.checkpoint, world, written))), None
    watchdog.at_work = lambda: saver.at_work
    if c.machine.compile is True:
        at_end.enter_context(compilation(watchdog.notes.compiling, watchdog.notes.compiled))
    if c.profile:
        done = state.counters.drawn // resolved.layout.total
        trace = at_end.enter_context(closing(Trace(c.profile, folder / "profile", world.rank, done)))
    objective = objective_of(c, device, varied=buckets > 1)
    run = Run(
        resolved,
        world,
        device,
        engine,
        saver,
        stop,
        watchdog,
        trace,
        conditioner,
        objective,
        rows,
        validation,
        evaluation,
    )
    return run, state


def with_weights(state: State, located: Data) -> State:
    """The state of a run that goes on from there with the weights that the mix file has now."""
    now = scheduled(located, state.weights, state.counters.position)
    return replace(state, sets=now.digests, weights=now.weights) if isinstance(now, LocatedMix) else state


def objective_of(c: Config, device: torch.device, varied: bool) -> flow.Objective:
    """The objective, on GPUs compiled where the network is; on CPUs it is a five-hundredth of a step.

    Args:
        varied: whether the run's images have several sizes.
    """
    objective = flow.Objective()
    if c.machine.compile is True and device.type == "cuda":
        compile_methods(objective, flow.OBJECTIVE_SIZES, Kinds(varied))
    return objective


def _initialise(network: PixelDiT, c: Config, world: World, classes: tuple[str, ...]) -> tuple[Stage, ...]:
    """Initialize from the weights of another run, if `init` is set; returns the stages before this one.

    Args:
        classes: names of the run's classes.
    """
    if not c.init:
        return ()
    initial = read.load_weights(c.init, stages.kind(c), world)
    line = ""
    if c.model.num_classes:
        own = network.get_parameter(stages.CLASS_TABLE)
        initial, line = stages.with_classes(initial, own, classes)
    on_all_ranks(world, lambda: read.assign(network, initial))
    before = gather(world, stages.of(initial.about) if world.main else ())[0]
    world.say(f"stage {len(before) + 1}: starting from the {initial.about.kind} of {initial.about.source}")
    if line:
        world.say(line)
    return tuple(before)


def _measures(
    resolved: ResolvedRun, conditioner: Conditioner, world: World, device: torch.device
) -> tuple[ValidationLoss | None, SmallEvaluation | None]:
    c, validation, evaluation = resolved.config, None, None
    if resolved.validation:
        validation = ValidationLoss(resolved.validation, c, conditioner, resolved.text.validation, world, device)
    if resolved.standard:
        evaluation = SmallEvaluation(resolved.standard, conditioner, c, world, device)
    return validation, evaluation


def _announce(resolved: ResolvedRun, world: World, network: PixelDiT, attention: str) -> None:
    c, layout, standard = resolved.config, resolved.layout, resolved.standard
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    index = resolved.located.index
    about = resolved.text.about or f"in {len(index.classes)} classes"
    world.say(f"run {c.out}: {millions:.1f} M parameters, {c.precision}, {index.samples:,} images {about}")
    world.say(f"global batch {layout}")
    if different := unlike_released(c.model, c.text):
        world.say(f"note: released code and its ports will not run this network as it is: {'; '.join(different)}")
    world.say(f"attention: {attention}")
    for key in unproven(c) if world.main and torch.cuda.is_available() else ():
        dist.warn(f"{key}: docs/parity.md tests it on CPU ranks only; `megapix doctor --parity` tests it on these GPUs")
    if c.machine.pixel_kernels == "triton" and world.main and torch.cuda.is_available():
        dist.warn(
            "machine.pixel_kernels: the kernels are tested in Triton's interpreter only; "
            "compare some steps of this run with --machine.pixel-kernels plain"
        )
    for caution in standard.cautions("evaluation.count", c.evaluation.count) if world.main and standard else ():
        dist.warn(caution)
    for line in resolved.located.say() if isinstance(resolved.located, LocatedMix) else ():
        world.say(line)
    for fault in resolved.located.faults:
        world.say(f"its samples will be replaced: {fault}")
    if resolved.saved:
        seen = resolved.saved.state.counters.images_seen
        world.say(f"resuming from {resolved.saved.folder} at {seen:,} images seen")

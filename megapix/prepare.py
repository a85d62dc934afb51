"""Before the first step: everything that can be wrong with a command is found here, before anything is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megapix import checkpoint, config
from megapix.checkpoint import Choice, Saved, State
from megapix.config import BatchLayout, Config, EvaluationConfig, RepaConfig
from megapix.data.locate import Located, locate
from megapix.dist import World, agree, gather, together
from megapix.ds_config import read_knobs
from megapix.errors import InputError
from megapix.features import Features, read_features
from megapix.images import Policy
from megapix.shards import Index, write_atomic
from megapix.speech import Speech, text_of

if TYPE_CHECKING:
    from megapix.encoder import Encoder
    from megapix.evaluation.standard import Standard

LOCAL = (
    *("out", "data.path", "validation.path", "data.cache", "data.cache_gib", "data.workers"),
    *("repa.encoder", "repa.features", "repa.micro_batch", "machine.ds_config", "machine.peak_tflops"),
    *("text.encoder", "text.micro_batch", "log.prompts"),
    *("evaluation.reference", "evaluation.extractor_weights"),
)
"""Options that may be others on another node. (`write_config` sees that `out` is the same folder.)"""


@dataclass(frozen=True)
class Plan:
    """A run that can start: resolved configuration, data, batch layout, and where it goes on."""

    config: Config
    located: Located
    layout: BatchLayout
    choice: Choice
    """The checkpoint to go on from, and those that were refused."""
    validation: Located | None
    """The held-out data, if there are any."""
    changes: list[str]
    """Schedule options, and the number of ranks, where they differ from the checkpoint's."""
    teacher: Encoder | None = None
    """REPA's frozen encoder, if there is one."""
    features: Features | None = None
    """Or its features, computed before."""
    standard: Standard | None = None
    """What images are measured by in training, if they are."""
    speech: Speech = field(default_factory=Speech)
    """Where the text of a network that takes text comes from."""

    @property
    def saved(self) -> Saved | None:
        """The checkpoint to go on from, if there is one."""
        return self.choice.saved

    @property
    def aligned_width(self) -> int:
        """Width of the features that the run is aligned with; 0 without REPA."""
        source = self.teacher or self.features
        return source.width if source else 0

    @property
    def end(self) -> int:
        """Images seen at the end of the run."""
        return int(self.config.optim.end_at)

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is already at the end."""
        return self.saved is not None and self.saved.state.counters.images_seen >= self.end


def plan(asked: Config, ranks: int, choice: Choice | None = None) -> Plan:
    """Check a configuration against its data, its run folder and the number of ranks, and freeze its spans.

    Args:
        ranks: ranks of the run.
        choice: the checkpoint to go on from; None looks for it here, by size alone, as a check before any rank starts.

    Raises:
        InputError: the first thing that is wrong.
    """
    config.validate(asked)
    layout = config.batch_layout(asked, ranks)
    read_knobs(asked.machine.ds_config, asked.machine.unproven)
    located = locate(asked.data)
    index = located.index
    _check_sizes(asked, asked.data.path, Policy.from_dict(index.image_policy))
    if len({shard.bucket for shard in index.shards}) > 1 and layout.total % asked.data.reading_groups:
        raise InputError(
            f"data.reading_groups = {asked.data.reading_groups}: with aspect buckets expected a divisor of "
            f"optim.global_batch = {layout.total}"
        )
    if asked.model.num_classes and len(index.classes) != asked.model.num_classes:
        raise InputError(
            f"model.num_classes = {asked.model.num_classes}, but {asked.data.path!r} holds {len(index.classes)} classes"
        )
    validation = _validation(asked, index)
    resolved = config.freeze(asked, index.samples)
    teacher, features = _teacher(asked.repa), _features(asked, index)
    if source := teacher or features:
        resolved = config.replace(resolved, "repa.digest", source.digest)
    speech = text_of(asked, located, validation)
    resolved = config.replace(resolved, "text.digest", speech.digest)
    standard = _standard(asked.evaluation)
    run = Path(asked.out)
    _check_writable(run)
    choice = choice or checkpoint.choose(run, asked.resume, World(), hashed=False)
    if choice.saved is None:
        if asked.init:
            from megapix import stages  # late: torch, which no other check needs

            stages.check(resolved)
        return Plan(resolved, located, layout, choice, validation, [], teacher, features, standard, speech)
    folder, state = choice.saved.folder, choice.saved.state
    _check_batch(state, layout, str(folder))
    changes = config.compare(state.config, resolved, str(folder))
    if state.data_digest != index.digest:
        raise InputError(
            f"{folder} was trained on the data set {state.data_digest[:16]}…, "
            f"but {asked.data.path!r} is {index.digest[:16]}…; give the same shards, or another --out"
        )
    if state.layout.ranks != ranks:
        changes.append(f"ranks: {state.layout.ranks} -> {ranks}")
    return Plan(resolved, located, layout, choice, validation, changes, teacher, features, standard, speech)


def _teacher(repa: RepaConfig) -> Encoder | None:
    if not repa.encoder:
        return None
    from megapix import encoder  # late: torch and transformers, which no other check needs

    teacher = encoder.load(repa.encoder, repa.dtype, repa.micro_batch)
    if repa.digest not in ("", teacher.digest):
        raise InputError(
            f"repa.encoder = {repa.encoder!r} has the digest {teacher.digest[:16]}…, but repa.digest = {repa.digest!r}"
        )
    return teacher


def _standard(evaluation: EvaluationConfig) -> Standard | None:
    if not evaluation.reference:
        return None
    from megapix.evaluation.standard import open_standard  # late: torch and the extractor, which no other check needs

    weights = Path(evaluation.extractor_weights) if evaluation.extractor_weights else None
    return open_standard(Path(evaluation.reference), weights, prefix="--evaluation.")


def _features(asked: Config, index: Index) -> Features | None:
    repa = asked.repa
    if not repa.features:
        return None
    found, shown = read_features(repa.features, index), f"repa.features = {repa.features!r}"
    if asked.data.flip and not found.flip:
        raise InputError(
            f"{shown} has no features of mirror images, but data.flip = True; compute them with data_prep features "
            "without --no-flip, or give --data.no-flip"
        )
    if found.dtype != repa.dtype:
        raise InputError(f"{shown} were computed in {found.dtype}, but repa.dtype = {repa.dtype!r}")
    if repa.digest not in ("", found.digest):
        raise InputError(f"{shown} are of the encoder {found.digest[:16]}…, but repa.digest = {repa.digest!r}")
    return found


def _check_batch(state: State, layout: BatchLayout, where: str) -> None:
    total = state.config.optim.global_batch
    if layout.total != total:
        raise InputError(
            f"{where} was trained with optim.global_batch = {total}, but this run has {layout}; micro batch, "
            f"accumulation and ranks may change, their product not: give --optim.global-batch {total}"
        )


def same_everywhere(world: World, p: Plan) -> None:
    """Check that every rank has planned the same run.

    Raises:
        Agreed: naming the first rank that differs from rank 0, and in what.
    """
    mine = {key: repr(value) for key, value, _ in config.leaves(p.config) if key not in LOCAL}
    mine["machine.ds_config"] = repr(read_knobs(p.config.machine.ds_config, p.config.machine.unproven))
    mine["validation set"] = p.validation.index.digest if p.validation else "none"
    mine["reference statistics"] = p.standard.sha256 if p.standard else "none"
    mine["extractor weights"] = p.standard.extractor.sha256 if p.standard else "none"
    mine |= {"data set": p.located.index.digest, "checkpoint": p.saved.folder.name if p.saved else "none"}
    mine |= {"counters": repr(p.saved.state.counters) if p.saved else "none", "batch": str(p.layout)}
    everyone = gather(world, mine)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                agree(world, f"rank {rank} has {key} = {value}, but rank 0 has {everyone[0][key]}")


def write_config(world: World, p: Plan) -> None:
    """Make the run folder with the resolved configuration, and see that every rank has the same folder.

    Raises:
        Agreed: it cannot be written, or a rank does not read what rank 0 wrote.
    """
    path = Path(p.config.out) / "config.json"
    text = json.dumps(config.to_dict(p.config), indent=1) + "\n"

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def read() -> str | None:
        return path.read_text() if path.is_file() else None

    together(world, lambda: write() if world.main else None)
    expected, found = gather(world, text)[0], read()
    agree(
        world,
        f"{path} is not what rank 0 wrote: the run folder (--out) must be on a file system that all nodes share"
        if found != expected
        else None,
    )


def _validation(asked: Config, training: Index) -> Located | None:
    """The held-out data, with the training set's classes, and not the training set itself."""
    path = asked.validation.path
    if not path:
        return None
    located = locate(replace(asked.data, path=path))
    index = located.index
    _check_sizes(asked, path, Policy.from_dict(index.image_policy))
    if index.digest == training.digest:
        raise InputError(f"validation.path = {path!r} is the training set: expected images that are not trained on")
    if asked.model.num_classes and index.class_names != training.class_names:
        raise InputError(f"validation.path = {path!r} has other classes than {asked.data.path!r}")
    return located


def _check_sizes(asked: Config, path: str, policy: Policy) -> None:
    size, patch = asked.data.image_size, asked.model.patch_size
    if policy.mode == "untouched":
        raise InputError(
            f"the images in {path!r} are untouched, of any size; give an index with a policy: "
            f"data_prep index {path} --out INDEX --size {size}"
        )
    if policy.size != size:
        raise InputError(f"data.image_size = {size}, but the images in {path!r} are {policy.size} pixels")
    for height, width in policy.buckets:
        if height % patch or width % patch:
            raise InputError(
                f"{path!r} has images of {width}x{height} pixels, not divisible by model.patch_size = {patch}"
            )


def _check_writable(run: Path) -> None:
    there = run
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise InputError(f"out = {str(run)!r}: the run folder cannot be made: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out = {str(run)!r}: {str(there)!r} is not writable")

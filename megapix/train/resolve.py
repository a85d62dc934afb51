"""Before the first step: a run is checked against its data and its run folder, before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megapix import config, trackers
from megapix.checkpoint.find import Choice, Saved, choose
from megapix.checkpoint.manifest import State
from megapix.conditioning.text_source import TextSource, text_of
from megapix.config import BatchLayout, Config, EvaluationConfig, RepaConfig
from megapix.config.ds_config import read_knobs
from megapix.data.locate import Located, locate
from megapix.data.mix.located import Data, LocatedMix, MixIndex, find, order_of, scheduled
from megapix.data.mix.resume import other_sets, other_weights
from megapix.data.mix.stored import MixedFeatures
from megapix.data.order import take
from megapix.dist import World
from megapix.errors import InputError
from megapix.shards.image_features import MANIFEST_NAME, Features, read_features, read_manifest
from megapix.shards.image_policy import Policy
from megapix.shards.index import Index
from megapix.shards.mix.file import is_mix

if TYPE_CHECKING:
    from megapix.encoders.image import Encoder
    from megapix.evaluation.reference import Standard


@dataclass(frozen=True)
class ResolvedRun:
    """A run that can start: resolved configuration, data, batch layout, and the checkpoint to resume from."""

    config: Config
    located: Data
    layout: BatchLayout
    choice: Choice
    """The checkpoint to resume from, and those that were refused."""
    validation: Located | None
    """The validation set, if there is one."""
    changes: list[str]
    """Schedule options, and the number of ranks, where they differ from the checkpoint's."""
    kept: tuple[str, ...] = ()
    """What the run has of the checkpoint or of the data although preset or command have another value, a line each."""
    teacher: Encoder | None = None
    """REPA's frozen encoder, if there is one."""
    features: Features | MixedFeatures | None = None
    """Or its features, computed before."""
    standard: Standard | None = None
    """Reference statistics and extractor of the small evaluation, if there is one."""
    text: TextSource = field(default_factory=TextSource)
    """Where the text of a network that takes text comes from."""
    cards: str = ""
    """The ranks' GPUs in words, or that there are none; known once the ranks have met (`automatic.settle`)."""

    @property
    def saved(self) -> Saved | None:
        """The checkpoint to resume from, if there is one."""
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
        if self.saved is None:
            return False
        counters, last = self.saved.state.counters, self.end_of_data(self.saved.state)
        used_up = last is not None and take(counters.position, self.layout.total, counters.skipped)[1] > last
        return counters.images_seen >= self.end or used_up

    def end_of_data(self, state: State) -> int | None:
        """The position at which the last set of a mix leaves, if there is one, for a run that goes on from there."""
        if isinstance(self.located, Located):
            return None
        data = scheduled(self.located, state.weights, state.counters.position)
        return order_of(data, self.config.data, self.config.seed, self.layout.total).end


def resolve(requested: Config, ranks: int, choice: Choice | None = None, classes_given: bool = True) -> ResolvedRun:
    """Check a configuration against its data, its run folder and the number of ranks, and freeze its spans.

    Args:
        ranks: ranks of the run.
        choice: the checkpoint to resume from; None looks for it here, checking sizes only, before any rank starts.
        classes_given: whether model.num_classes is what the user wants, and not only the preset's: else a network with
            classes takes the number of the data.

    Raises:
        InputError: the first thing that is wrong.
    """
    config.validate(requested)
    trackers.check(requested.log.trackers)
    layout = config.batch_layout(requested, ranks)
    read_knobs(requested.machine.ds_config, requested.machine.unproven)
    located, choice = _located(requested, choice)
    index = located.index
    _check_sizes(requested, requested.data.path, Policy.from_dict(index.image_policy))
    if len(index.bucket_samples) > 1 and layout.total % requested.data.reading_groups:
        raise InputError(
            f"data.reading_groups = {requested.data.reading_groups}: with aspect buckets expected a divisor of "
            f"optim.global_batch = {layout.total}"
        )
    taken: tuple[str, ...] = ()
    if requested.model.num_classes not in (0, len(index.classes)) and not classes_given:
        requested, taken = _with_classes(requested, len(index.classes))
    if requested.model.num_classes and len(index.classes) != requested.model.num_classes:
        raise InputError(
            f"model.num_classes = {requested.model.num_classes}, "
            f"but {requested.data.path!r} holds {len(index.classes)} classes"
        )
    validation = _validation(requested, index)
    resolved = config.freeze(requested, index.samples)
    teacher, features = _teacher(requested.repa), _features(requested, located)
    if source := teacher or features:
        resolved = config.replace(resolved, "repa.digest", source.digest)
    text = text_of(requested, located, validation)
    resolved = config.replace(resolved, "text.digest", text.digest)
    standard = _standard(requested.evaluation)
    if choice.saved is None:
        _check_rare_buckets(requested, index, layout.total)
        if requested.init:
            from megapix.weights import stages  # late: torch, which no other check needs

            stages.check(resolved)
        return ResolvedRun(resolved, located, layout, choice, validation, [], taken, teacher, features, standard, text)
    folder, state = choice.saved.folder, choice.saved.state
    _check_batch(state, layout, str(folder))
    resolved, kept = _kept(resolved, state.config)
    kept = (*taken, *kept)
    if located.newer:
        newer = f"has a newer index, {located.newer[:16]}…; the run keeps its own, {index.digest[:16]}…"
        kept = (*kept, f"data.path: {requested.data.path!r} {newer} of {index.samples:,} images")
    changes = config.compare(state.config, resolved, str(folder))
    if state.data_digest != index.digest:
        raise InputError(
            f"{folder} was trained on the data set {state.data_digest[:16]}…, "
            f"but {requested.data.path!r} is {index.digest[:16]}…; give the same shards, or another --out"
        )
    changes += other_weights(state.weights, located, state.counters.position)
    if state.layout.ranks != ranks:
        changes.append(f"ranks: {state.layout.ranks} -> {ranks}")
    return ResolvedRun(resolved, located, layout, choice, validation, changes, kept, teacher, features, standard, text)


def _with_classes(requested: Config, classes: int) -> tuple[Config, tuple[str, ...]]:
    """With the number of classes of the data, and a line that says so."""
    before = requested.model.num_classes
    line = f"model.num_classes: {classes}, the classes of {requested.data.path!r}, in place of the preset's {before}"
    return config.replace(requested, "model.num_classes", classes), (line,)


def _located(requested: Config, choice: Choice | None) -> tuple[Data, Choice]:
    """The data, of which a run that resumes keeps the version that it began with; and the checkpoint."""
    labelled = requested.model.num_classes > 0
    located = find(requested.data, labelled=labelled)
    check_writable(Path(requested.out))
    choice = choice or choose(Path(requested.out), requested.resume, World(), hashed=False)
    if choice.saved is None:
        return located, choice
    state = choice.saved.state
    if state.data_digest != located.index.digest:
        located = find(requested.data, state.sets or (state.data_digest,), labelled)
    mixed = state.sets or isinstance(located, LocatedMix)
    if mixed and state.data_digest != located.index.digest:  # before anything that follows from the sets is compared
        raise InputError(
            other_sets(state.sets, state.data_digest, located, str(choice.saved.folder), requested.data.path)
        )
    return scheduled(located, state.weights, state.counters.position), choice


def _kept(resolved: Config, saved: Config) -> tuple[Config, tuple[str, ...]]:
    """With the noise generator of a checkpoint from before the presets named another one, and a line that says so."""
    if (saved.flow.generator, resolved.flow.generator) != ("torch", "philox"):
        return resolved, ()
    return config.replace(resolved, "flow.generator", "torch"), ("flow.generator: 'torch' of the checkpoint is kept",)


def _teacher(repa: RepaConfig) -> Encoder | None:
    if not repa.encoder:
        return None
    from megapix.encoders.image import load  # late: torch and transformers, which no other check needs

    teacher = load(repa.encoder, repa.dtype, repa.micro_batch)
    if repa.digest not in ("", teacher.digest):
        raise InputError(
            f"repa.encoder = {repa.encoder!r} has the digest {teacher.digest[:16]}…, but repa.digest = {repa.digest!r}"
        )
    return teacher


def _standard(evaluation: EvaluationConfig) -> Standard | None:
    if not evaluation.reference:
        return None
    from megapix.evaluation.reference import open_standard  # late: torch and the extractor, which no other check needs

    weights = Path(evaluation.extractor_weights) if evaluation.extractor_weights else None
    return open_standard(Path(evaluation.reference), weights, prefix="--evaluation.")


def _features(requested: Config, located: Data) -> Features | MixedFeatures | None:
    repa = requested.repa
    if not repa.features:
        return None
    features, shown = _stored(repa.features, located), f"repa.features = {repa.features!r}"
    if requested.data.flip and not features.flip:
        raise InputError(
            f"{shown} has no features of mirror images, but data.flip = True; compute them with data_prep features "
            "without --no-flip, or give --data.no-flip"
        )
    if features.dtype != repa.dtype:
        raise InputError(f"{shown} were computed in {features.dtype}, but repa.dtype = {repa.dtype!r}")
    if repa.digest not in ("", features.digest):
        raise InputError(f"{shown} are of the encoder {features.digest[:16]}…, but repa.digest = {repa.digest!r}")
    return features


def _stored(folder: str, located: Data) -> Features | MixedFeatures:
    """The features in a folder; of a mix those of each set, in the folder below it that has them."""
    if isinstance(located, Located):
        return read_features(folder, located.index)
    below = {read_manifest(path.parent).data_digest: path.parent for path in Path(folder).glob(f"*/{MANIFEST_NAME}")}
    parts = list[Features]()
    for one, place in zip(located.mixed, located.sets, strict=True):
        if place.index.digest not in below:
            raise InputError(
                f"repa.features = {folder!r} has no folder with the features of {one.path!r}; make them with "
                f"'data_prep features {one.path} --encoder ENCODER --out {folder}/{one.name}'"
            )
        parts.append(read_features(below[place.index.digest], place.index))
        for key in ("digest", "dtype"):
            if getattr(parts[0], key) != getattr(parts[-1], key):
                raise InputError(
                    f"repa.features = {folder!r}: the features of {one.path!r} have another {key} than those of "
                    f"{located.mixed[0].path!r}"
                )
    return MixedFeatures(located, tuple(parts))


def _check_batch(state: State, layout: BatchLayout, where: str) -> None:
    total = state.config.optim.global_batch
    if layout.total != total:
        raise InputError(
            f"{where} was trained with optim.global_batch = {total}, but this run has {layout}; micro batch, "
            f"accumulation and ranks may change, their product not: give --optim.global-batch {total}"
        )


def _validation(requested: Config, training: Index | MixIndex) -> Located | None:
    """The validation set: of the training set's classes, and not the training set itself."""
    path = requested.validation.path
    if not path:
        return None
    if is_mix(path):
        raise InputError(f"validation.path = {path!r} is a mix file: expected one shard folder")
    located = locate(replace(requested.data, path=path))
    index = located.index
    _check_sizes(requested, path, Policy.from_dict(index.image_policy))
    if index.digest == training.digest:
        raise InputError(f"validation.path = {path!r} is the training set: expected images that are not trained on")
    if requested.model.num_classes and index.class_names != training.class_names:
        raise InputError(f"validation.path = {path!r} has other classes than {requested.data.path!r}")
    return located


def _check_sizes(requested: Config, path: str, policy: Policy) -> None:
    size, patch = requested.data.image_size, requested.model.patch_size
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


def _check_rare_buckets(requested: Config, index: Index | MixIndex, batch: int) -> None:
    """A step holds one bucket: of one with fewer samples than a step has, it would hold the same images several times.

    Runs that began so go on, and indexes of the first version of the image policy are used as they were.
    """
    policy = Policy.from_dict(index.image_policy)
    counts = index.bucket_samples
    if len(counts) < 2 or policy.version == 1 or requested.data.repeat_rare_buckets:
        return
    rarest = min(counts, key=lambda bucket: (counts[bucket], bucket))
    if counts[rarest] < batch:
        height, width = policy.buckets[rarest]
        raise InputError(
            f"{requested.data.path!r}: the aspect bucket {width}x{height} has {counts[rarest]} samples, fewer than "
            f"optim.global_batch = {batch}, so that steps would hold the same images several times; prepare it with "
            f"data_prep … --bucket-min {batch}, or give --data.repeat-rare-buckets"
        )


def check_writable(run: Path) -> None:
    """Raises:
    InputError: the run folder can be neither made nor written to.
    """
    parent = run
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"out = {str(run)!r}: the run folder cannot be made: {str(parent)!r} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"out = {str(run)!r}: {str(parent)!r} is not writable")

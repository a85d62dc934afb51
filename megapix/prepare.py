"""Before the first step: everything that can be wrong with a command is found here, before anything is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megapix import checkpoint, config
from megapix.checkpoint import State
from megapix.config import BatchLayout, Config
from megapix.data.locate import Located, locate
from megapix.dist import World, agree, gather
from megapix.ds_config import read_knobs
from megapix.errors import InputError
from megapix.images import Policy


@dataclass(frozen=True)
class Plan:
    """A run that can start: resolved configuration, data, batch layout, and where it goes on."""

    config: Config
    located: Located
    layout: BatchLayout
    resume: Path | None
    """The checkpoint to go on from."""
    state: State | None
    """What that checkpoint says of itself."""
    changes: list[str]
    """Schedule options that differ from the checkpoint's."""

    @property
    def end(self) -> int:
        """Images seen at the end of the run."""
        return int(self.config.optim.end_at)

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is already at the end."""
        return self.state is not None and self.state.counters.images_seen >= self.end


def plan(asked: Config, ranks: int) -> Plan:
    """Check a configuration against its data, its run folder and the number of ranks, and freeze its spans.

    Raises:
        InputError: the first thing that is wrong.
    """
    config.validate(asked)
    layout = config.batch_layout(asked, ranks)
    read_knobs(asked.machine.ds_config)
    located = locate(asked.data)
    index = located.index
    _check_sizes(asked, Policy.from_dict(index.image_policy))
    if len({shard.bucket for shard in index.shards}) > 1 and layout.total % asked.data.reading_groups:
        raise InputError(
            f"data.reading_groups = {asked.data.reading_groups}: with aspect buckets expected a divisor of "
            f"optim.global_batch = {layout.total}"
        )
    if len(index.classes) != asked.model.num_classes:
        raise InputError(
            f"model.num_classes = {asked.model.num_classes}, but {asked.data.path!r} holds {len(index.classes)} classes"
        )
    if asked.init:
        checkpoint.find_weights(Path(asked.init))
    resolved = config.freeze(asked, index.samples)
    run = Path(asked.out)
    _check_writable(run)
    folder = checkpoint.latest(run)
    if folder is None:
        return Plan(resolved, located, layout, None, None, [])
    state = checkpoint.read_state(folder)
    changes = config.compare(state.config, resolved, str(folder))
    if state.data_digest != index.digest:
        raise InputError(
            f"{folder} was trained on the data set {state.data_digest[:16]}…, "
            f"but {asked.data.path!r} is {index.digest[:16]}…; give the same shards, or another --out"
        )
    if state.ranks != ranks:
        raise InputError(
            f"{folder} was written by {state.ranks} ranks, but this run has {ranks}; start {state.ranks} ranks"
        )
    checkpoint.check_files(folder, state)
    return Plan(resolved, located, layout, folder, state, changes)


def same_everywhere(world: World, p: Plan) -> None:
    """Check that every rank has planned the same run.

    Raises:
        Agreed: naming the first rank that differs from rank 0, and in what.
    """
    mine = {key: repr(value) for key, value, mark in config.leaves(p.config) if mark != "machine"}
    mine |= {"data set": p.located.index.digest, "checkpoint": p.resume.name if p.resume else "none"}
    mine |= {"counters": repr(p.state.counters) if p.state else "none", "batch": str(p.layout)}
    everyone = gather(world, mine)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                agree(world, f"rank {rank} has {key} = {value}, but rank 0 has {everyone[0][key]}")


def _check_sizes(asked: Config, policy: Policy) -> None:
    path, size, patch = asked.data.path, asked.data.image_size, asked.model.patch_size
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

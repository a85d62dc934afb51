"""The run folder and its config.json, and the check that every rank has resolved the same run."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from pathlib import Path

from megapix import config
from megapix.config.ds_config import read_knobs
from megapix.data.mix.located import LocatedMix
from megapix.dist import World, agree, gather, on_all_ranks
from megapix.files import read_bytes, size_of, write_atomic
from megapix.monitoring import processes
from megapix.outage import error_of
from megapix.train.resolve import ResolvedRun

LOCAL = (
    *("out", "data.path", "validation.path", "data.cache", "data.cache_gib", "data.workers"),
    *("repa.encoder", "repa.features", "repa.micro_batch", "machine.ds_config", "machine.peak_tflops"),
    *("text.encoder", "text.micro_batch", "log.prompts"),
    *("evaluation.reference", "evaluation.extractor_weights"),
)
"""Options that may differ between nodes. (`write_config` sees that `out` is the same folder.)"""


def same_everywhere(world: World, resolved: ResolvedRun) -> None:
    """Check that every rank has resolved the same run.

    Raises:
        CollectiveInputError: naming the first rank that differs from rank 0, and in what.
    """
    mine = {key: repr(value) for key, value, _ in config.leaves(resolved.config) if key not in LOCAL}
    mine["machine.ds_config"] = repr(read_knobs(resolved.config.machine.ds_config, resolved.config.machine.unproven))
    mine["validation set"] = resolved.validation.index.digest if resolved.validation else "none"
    mine["reference statistics"] = resolved.standard.sha256 if resolved.standard else "none"
    mine["extractor weights"] = resolved.standard.extractor.sha256 if resolved.standard else "none"
    mine |= {
        "data set": resolved.located.index.digest,
        "weights of the mix": repr(resolved.located.weights) if isinstance(resolved.located, LocatedMix) else "none",
        "checkpoint": resolved.saved.folder.name if resolved.saved else "none",
    }
    mine |= {
        "counters": repr(resolved.saved.state.counters) if resolved.saved else "none",
        "batch": str(resolved.layout),
    }
    if len(set(gather(world, _hash(json.dumps(mine).encode())))) == 1:
        return
    everyone = gather(world, mine)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            if value != everyone[0][key]:
                agree(world, f"rank {rank} has {key} = {value}, but rank 0 has {everyone[0][key]}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_config(world: World, resolved: ResolvedRun) -> None:
    """Make the run folder with the resolved configuration, and check that every rank sees the same folder.

    Raises:
        CollectiveInputError: it cannot be written, or a rank does not read what rank 0 wrote.
    """
    path = Path(resolved.config.out) / "config.json"
    text = json.dumps(config.to_dict(resolved.config), indent=1) + "\n"

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            raise error_of(error, f"{path}: cannot be written: {error.strerror}") from error

    def read() -> str:
        return _hash(read_bytes(path)) if size_of(path) is not None else "no file"

    on_all_ranks(world, lambda: write() if world.main else None)
    expected, found = gather(world, _hash(text.encode()))[0], on_all_ranks(world, read)
    agree(
        world,
        f"{path} is not what rank 0 wrote: the run folder (--out) must be on a file system that all nodes share"
        if found != expected
        else None,
    )


def note_process(world: World, resolved: ResolvedRun) -> None:
    """Add this start of the run to what its folder says of its processes. Every rank calls it."""
    hosts = tuple(dict.fromkeys(gather(world, socket.gethostname())))
    if not world.main:
        return
    seen, index = resolved.saved.state.counters.images_seen if resolved.saved else 0, resolved.located.index
    start = time.time(), seen, world.size, hosts, resolved.cards, processes.versions(), index.samples, index.digest
    processes.note(Path(resolved.config.out), processes.Process(*start))

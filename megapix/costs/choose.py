"""The fastest predicted combination of checkpointing policies, micro batch and place of the optimizer that fits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from megapix.config import PIXEL_POLICIES, Config, batch_layout, replace
from megapix.config.ds_config import read_knobs
from megapix.costs import flops, memory, speed
from megapix.costs.assumptions import Machine
from megapix.costs.memory import Bytes
from megapix.costs.speed import Seconds
from megapix.errors import InputError

PATCH_POLICIES: tuple[str | int, ...] = ("none", 4, 2, "full")
"""Values of `machine.patch_checkpointing` that are planned with, from the fastest to the one with least memory."""
OTHERS = ("zero2_allreduce", "zero2_offload")
"""DeepSpeed configurations that are planned with beside the requested one."""
MOST_RANKS = 4096
"""Most ranks that are tried when a network does not fit."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a configuration on a number of GPUs."""

    config: Config
    """With its policies, DeepSpeed configuration, and the largest micro batch that fits, or 1."""
    ranks: int
    nodes: int
    accumulation: int
    bytes: Bytes
    seconds: Seconds
    fits: bool

    @property
    def images_per_s(self) -> float:
        """Throughput of all GPUs together."""
        return self.config.optim.global_batch / self.seconds.total

    def mfu(self, m: Machine) -> float:
        """Model FLOPs over the peak; what is recomputed does not count."""
        return self.images_per_s * flops.of_run(self.config) / self.ranks / m.peak

    @property
    def options(self) -> list[str]:
        """What to type after the preset."""
        c = self.config.machine
        return [
            f"--machine.pixel-checkpointing {c.pixel_checkpointing}",
            f"--machine.patch-checkpointing {c.patch_checkpointing}",
            f"--machine.micro-batch {c.micro_batch}",
            f"--machine.ds-config {c.ds_config}",
        ]


def candidates(c: Config, ranks: int, nodes: int, m: Machine) -> list[Candidate]:
    """Every policy with its largest micro batch that fits; where none does, micro batch 1 and `fits` False.

    The micro batch is a divisor of global batch / ranks, or `machine.micro_batch` if that is set. First come those with
    the requested DeepSpeed configuration, then those with OTHERS, unless the optimizer is to be offloaded anyway.

    Raises:
        InputError: the global batch does not divide.
    """
    images = batch_layout(c, ranks).total // ranks
    micros = [n for n in range(images, 0, -1) if images % n == 0]
    if c.machine.micro_batch:
        micros = [c.machine.micro_batch]
    own = read_knobs(c.machine.ds_config, c.machine.unproven)
    places = [(c.machine.ds_config, own)]
    if "offload_optimizer" not in own["zero_optimization"]:
        places += [(name, read_knobs(name)) for name in OTHERS if name != c.machine.ds_config]
    requested = c.machine.patch_checkpointing
    patch_policies = [*PATCH_POLICIES, *([requested] if requested not in PATCH_POLICIES else [])]
    fused = c.machine.pixel_kernels == "triton"
    pixel_policies = [policy for policy in PIXEL_POLICIES if not (fused and policy == "chunked")]
    candidates = []
    for (name, knobs), pixel, patch in product(places, pixel_policies, patch_policies):
        planned = replace(replace(c, "machine.pixel_checkpointing", pixel), "machine.patch_checkpointing", patch)
        planned = replace(planned, "machine.ds_config", name)
        candidates.append(_largest(planned, knobs, ranks, nodes, micros, m))
    return candidates


def _largest(c: Config, knobs: dict[str, Any], ranks: int, nodes: int, micros: list[int], m: Machine) -> Candidate:
    images = c.optim.global_batch // ranks
    for micro in micros:
        used = memory.of_rank(c, knobs, ranks, micro, images // micro, m.text_encoder)
        if used.peak <= m.memory:
            break
    seconds = speed.of_step(c, knobs, ranks, nodes, micro, images // micro, m)
    c = replace(c, "machine.micro_batch", micro)
    return Candidate(c, ranks, nodes, images // micro, used, seconds, used.peak <= m.memory)


def best(found: list[Candidate]) -> Candidate | None:
    """The fastest predicted step among those that fit; of equals the first."""
    return min((x for x in found if x.fits), key=lambda x: x.seconds.total, default=None)


def refuse(found: list[Candidate], c: Config, m: Machine, gpu_memory: str) -> InputError:
    """The error when nothing fits: how many bytes are missing, and what would help."""
    small = min(found, key=lambda x: x.bytes.peak)
    machine = small.config.machine
    missing = (small.bytes.peak - m.memory) / 2**30
    return InputError(
        f"--gpu-memory = {gpu_memory!r}: micro batch {machine.micro_batch} with --gpus {small.ranks} needs "
        f"{small.bytes.peak / 2**30:.1f} GiB and {m.memory / 2**30:.1f} GiB are there, {missing:.1f} GiB too few, even "
        f"with {', '.join(option.removeprefix('--machine.') for option in small.options)}; {_help(c, small, m)}"
    )


def _help(c: Config, small: Candidate, m: Machine) -> str:
    knobs = read_knobs(small.config.machine.ds_config, c.machine.unproven)

    def fits(ranks: int) -> bool:
        images = c.optim.global_batch // ranks
        return memory.of_rank(small.config, knobs, ranks, 1, images, m.text_encoder).peak <= m.memory

    if c.machine.micro_batch > 1 and fits(small.ranks):
        return "expected a smaller --machine.micro-batch"
    ranks = 2 * small.ranks
    while ranks <= min(c.optim.global_batch, MOST_RANKS):
        if c.optim.global_batch % ranks == 0 and fits(ranks):
            return f"expected --gpus {ranks} or more, or more memory"
        ranks *= 2
    return (
        f"nor do more GPUs help, up to optim.global_batch = {c.optim.global_batch}: ZeRO-2 keeps all weights on each; "
        "expected more memory or a smaller reduce bucket"
    )

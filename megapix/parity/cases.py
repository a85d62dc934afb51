"""The cases: a pairwise cover of the options that could change what ZeRO-2 computes, and a case's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from megapix.config import Config, DataConfig, MachineConfig, ModelConfig, OptimConfig
from megapix.parity.pairwise import pairwise

STEPS = 10
IMAGE_SIZE = 16
MODEL = ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=3)
TEXT_MODEL = replace(
    MODEL, num_classes=0, text_width=12, text_tokens=6, mlp="swiglu", pixel_attention_width=24, pixel_heads=3
)
LOCAL_RANKS = (2, 4, 1, 3, 6)
SMALL_BUCKET = 5_000
"""Elements: fewer than the largest layers of the network have, so that these are reduced outside the buckets."""
CLIP = {"hit": 0.05, "not hit": 1e3}
"""Bounds of the gradient norm, the first below and the second above what any step has (checked)."""


@dataclass(frozen=True)
class Case:
    """One way to run ZeRO-2. The values are those of the options of the same name; `bucket_allreduce` is
    use_multi_rank_bucket_allreduce, and `text` the network that takes text."""

    ranks: int = 2
    accumulation: int = 1
    clip: Literal["hit", "not hit"] = "hit"
    precision: Literal["fp32", "bf16"] = "fp32"
    overlap_comm: bool = False
    buckets: Literal["large", "small"] = "large"
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    bucket_allreduce: bool = False
    text: bool = False
    offload: bool = False
    pixel_checkpointing: Literal["none", "full"] = "none"
    patch_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False


OPTIONS: dict[str, tuple[Any, ...]] = {
    "accumulation": (1, 4),
    "clip": ("hit", "not hit"),
    "precision": ("fp32", "bf16"),
    "overlap_comm": (False, True),
    "buckets": ("large", "small"),
    "contiguous_gradients": (True, False),
    "reduce_scatter": (True, False),
    "bucket_allreduce": (False, True),
    "offload": (False, True),
    "pixel_checkpointing": ("none", "full"),
    "patch_checkpointing": ("none", "full"),
    "compile": (False, True),
}
"""Options covered beside the number of ranks; slow values come last, so that ties keep them rare."""


def cases(ranks: tuple[int, ...], compiling: bool) -> list[Case]:
    """A pairwise cover of all options but compilation on these numbers of ranks; with `compiling`, the cases that a
    cover with it compiles come on top. (Compiled bf16 has wide tolerances, so it must not replace an uncompiled case.)
    The network that takes text has a case of its own, and another one compiled.
    """
    options, text = {"ranks": ranks} | OPTIONS, Case(ranks=ranks[0], text=True)
    covered = [Case(**row) for row in pairwise(options | {"compile": (False,)})] + [text]
    if not compiling:
        return covered
    compiled = [case for case in (Case(**row) for row in pairwise(options)) if case.compile]
    return [*covered, *compiled, replace(text, compile=True)]


def configuration(case: Case) -> Config:
    """The run of a case: 10 steps with a learning rate that steps down after 6, and beta2 and EMA that move fast.

    The learning rate is a hundred times the recipe's, so that a wrong gradient moves the weights far in few steps.
    """
    smallest = math.lcm(4, case.accumulation) * case.ranks
    total = smallest * math.ceil(16 / smallest)
    return Config(
        seed=3,
        precision=case.precision,
        model=TEXT_MODEL if case.text else MODEL,
        data=DataConfig(image_size=IMAGE_SIZE),
        optim=OptimConfig(
            global_batch=total,
            lr=1e-2,
            lr_after=5e-3,
            lr_step_at=6 * total,
            end_at=STEPS * total,
            beta2=0.99,
            weight_decay=0.01,
            grad_clip=CLIP[case.clip],
            ema_decay=0.9,
        ),
        machine=MachineConfig(
            micro_batch=total // case.ranks // case.accumulation,
            pixel_checkpointing=case.pixel_checkpointing,
            patch_checkpointing=case.patch_checkpointing,
            compile=case.compile,
            ds_config="zero2_offload" if case.offload else "zero2",
        ),
    )


def describe(case: Case) -> str:
    """The case in one line: what differs from the defaults."""
    changed = [f"{f.name} {getattr(case, f.name)}" for f in fields(case) if getattr(case, f.name) != f.default]
    return f"{case.ranks} ranks: {', '.join(x for x in changed if not x.startswith('ranks')) or 'defaults'}"

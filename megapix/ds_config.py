"""DeepSpeed's configuration: a JSON of DeepSpeed-only knobs, and the keys that follow from our options.

What is ours (batch sizes, learning rate, clipping, precision, checkpointing) is refused in the JSON, so that each
option has one owner; keys that DeepSpeed would silently ignore are refused too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megapix.config import BatchLayout, Config
from megapix.errors import InputError, one_of

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"

OWNED = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "machine.micro_batch",
    "gradient_accumulation_steps": "machine.micro_batch",
    "optimizer": "the options under optim",
    "scheduler": "optim.lr_step_at and optim.lr_after",
    "gradient_clipping": "optim.grad_clip",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
    "amp": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "activation_checkpointing": "machine.pixel_checkpointing",
    "tensorboard": "log.every",
}
"""Keys of DeepSpeed's JSON that are ours, and the option that sets each."""
KNOBS = (
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "prescale_gradients",
    "gradient_predivide_factor",
)
"""Keys that are DeepSpeed's own business."""
ZERO_KNOBS = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_optimizer",
)
"""Keys of its `zero_optimization` that change speed and memory only; others could change what a resume restores."""


def read_knobs(name: str) -> dict[str, Any]:
    """Read a JSON of DeepSpeed-only knobs: a file, or a name in ds_configs/.

    Raises:
        InputError: no such file, not JSON, a key that is ours (names our option), an unknown key, or not ZeRO-2.
    """
    path = Path(name) if Path(name).is_file() else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in DS_CONFIGS.glob("*.json"))
        raise InputError(f"machine.ds_config = {name!r}: neither a file nor a name in ds_configs/{one_of(name, known)}")
    try:
        knobs = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    zero = knobs.get("zero_optimization") if isinstance(knobs, dict) else None
    if not isinstance(zero, dict):
        raise InputError(f"{path}: expected a table with a table 'zero_optimization'")
    for key in knobs:
        if key in OWNED:
            raise InputError(f"{path}: {key!r} does not belong here; it is set by {OWNED[key]}")
        if key not in KNOBS:
            raise InputError(f"{path}: unknown key {key!r}{one_of(key, KNOBS)}")
    for key in zero:
        if key not in ZERO_KNOBS:
            raise InputError(f"{path}: zero_optimization: unknown or refused key {key!r}{one_of(key, ZERO_KNOBS)}")
    if zero.get("overlap_comm", False) is not False:
        raise InputError(
            f"{path}: zero_optimization.overlap_comm = {zero['overlap_comm']!r}: expected false; "
            "it has given wrong gradients in several DeepSpeed releases"
        )
    if zero.get("stage") != 2:
        raise InputError(
            f"{path}: zero_optimization.stage = {zero.get('stage')!r}: expected 2 "
            "(the EMA lives in ZeRO-2's fp32 partition)"
        )
    return knobs


def deepspeed_config(config: Config, layout: BatchLayout) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the JSON's knobs and the keys that follow from ours.

    In bf16 gradients are accumulated and reduced in fp32, and a step whose gradient is not finite is skipped.
    """
    ours: dict[str, Any] = {
        "train_batch_size": layout.total,
        "train_micro_batch_size_per_gpu": layout.micro,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "zero_allow_untested_optimizer": True,  # AdamWWithEMA; tested by us
    }
    if config.precision == "bf16":
        ours |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return read_knobs(config.machine.ds_config) | ours

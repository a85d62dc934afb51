"""DeepSpeed's configuration: a JSON of DeepSpeed-only knobs, and the keys that follow from our options.

What is ours (batch sizes, learning rate, clipping, precision, checkpointing) is refused in the JSON, so that each
option has one owner; keys that DeepSpeed would silently ignore are refused too, and those not tested in
docs/parity.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megapix.config.options import Config
from megapix.config.spans import BatchLayout
from megapix.errors import InputError, one_of
from megapix.text import text_of

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

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
    "activation_checkpointing": "machine.pixel_checkpointing and machine.patch_checkpointing",
    "compile": "machine.compile",
    "tensorboard": "log.every",
    "gradient_allreduce_op": "optim.global_batch: gradients are summed, and the sum is divided in fp32",
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
)
"""Keys that are DeepSpeed's own business."""
REFUSED = {
    "prescale_gradients": "gradients are reduced in fp32, where scaling them first gains nothing",
    "gradient_predivide_factor": "gradients are reduced in fp32, where scaling them first gains nothing",
    "zero_optimization.allgather_partitions": "DeepSpeed's ZeRO-2 does not read it",
    "zero_optimization.compute_grad_norm": "the optimizer's step needs the norm, and computes it",
    "zero_optimization.round_robin_gradients": "checkpoints hold the network's order of parameters, which it changes",
}
"""Keys that a reader of DeepSpeed's manual may try, and why they are not taken."""
ZERO_KNOBS = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_optimizer",
)
"""Keys of its `zero_optimization` that change speed and memory only, as docs/parity.md shows; others could change what
a step computes or what a resume restores."""
COUNTS = ("reduce_bucket_size", "allgather_bucket_size")
"""Those of them that are numbers of elements, at least 1; most others are switches."""
OFFLOAD_KNOBS = ("device", "pin_memory")
"""Keys of `offload_optimizer`."""


def read_knobs(name: str, unproven: bool = False) -> dict[str, Any]:
    """Read a JSON of DeepSpeed-only knobs: a file, or a name in ds_configs/.

    `unproven` lets in what docs/parity.md tests on CPU ranks only while GPUs are known to have gone wrong.

    Raises:
        InputError: no such file, not JSON, a key that is ours (names our option), an unknown key, or not ZeRO-2.
    """
    path = Path(name) if Path(name).is_file() else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in DS_CONFIGS.glob("*.json"))
        raise InputError(f"machine.ds_config = {name!r}: neither a file nor a name in ds_configs/{one_of(name, known)}")
    try:
        knobs = json.loads(text_of(path.read_bytes()))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    zero = knobs.get("zero_optimization") if isinstance(knobs, dict) else None
    if not isinstance(zero, dict):
        raise InputError(f"{path}: expected a table with a table 'zero_optimization'")
    for key in knobs:
        if key in OWNED:
            raise InputError(f"{path}: {key!r} does not belong here; it is set by {OWNED[key]}")
        if key in REFUSED:
            raise InputError(f"{path}: {key!r} is refused: {REFUSED[key]}")
        if key not in KNOBS:
            raise InputError(f"{path}: unknown key {key!r}{one_of(key, KNOBS)}")
    for key in zero:
        if (full := f"zero_optimization.{key}") in REFUSED:
            raise InputError(f"{path}: {full!r} is refused: {REFUSED[full]}")
        if key not in ZERO_KNOBS:
            raise InputError(f"{path}: zero_optimization: unknown or refused key {key!r}{one_of(key, ZERO_KNOBS)}")
        _check_type(path, key, zero[key])
    if zero.get("overlap_comm", False) is not False and not unproven:
        raise InputError(
            f"{path}: zero_optimization.overlap_comm = {zero['overlap_comm']!r}: expected false; it has given wrong "
            "gradients on GPUs in several DeepSpeed releases, and docs/parity.md tests it on CPU ranks only; if "
            "`megapix doctor --parity` passes on your GPUs, --machine.unproven lets it in"
        )
    _check_offload(path, knobs, zero)
    if zero.get("stage") != 2:
        raise InputError(
            f"{path}: zero_optimization.stage = {zero.get('stage')!r}: expected 2 "
            "(the EMA lives in ZeRO-2's fp32 partition)"
        )
    return knobs


def _check_type(path: Path, key: str, value: object) -> None:
    """DeepSpeed would check it too, once all ranks have started."""
    if key in COUNTS:
        number = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        right, expected = number and float(str(value)) >= 1, "a number of elements, such as 500000000"
    elif key in ("stage", "offload_optimizer", "overlap_comm"):
        return
    else:
        right, expected = isinstance(value, bool), "true or false"
    if not right:
        raise InputError(f"{path}: zero_optimization.{key} = {value!r}: expected {expected}")


def _check_offload(path: Path, knobs: dict[str, Any], zero: dict[str, Any]) -> None:
    """Check that the optimizer is offloaded in the way that our own optimizer needs."""
    if "offload_optimizer" not in zero:
        return
    offload, where = zero["offload_optimizer"], f"{path}: zero_optimization.offload_optimizer"
    if not isinstance(offload, dict):
        raise InputError(f"{where} = {offload!r}: expected a table with 'device' and 'pin_memory'")
    for key in offload:
        if key not in OFFLOAD_KNOBS:
            raise InputError(f"{where}: unknown or refused key {key!r}{one_of(key, OFFLOAD_KNOBS)}")
    if offload.get("device") != "cpu":
        raise InputError(f"{where}.device = {offload.get('device')!r}: expected 'cpu'")
    if knobs.get("zero_force_ds_cpu_optimizer") is not False:
        raise InputError(
            f"{path}: zero_force_ds_cpu_optimizer = {knobs.get('zero_force_ds_cpu_optimizer')!r}: expected false "
            "beside offload_optimizer (the optimizer is ours, with the EMA in its state)"
        )


def unproven(config: Config) -> list[str]:
    """Keys of what this configuration switches on and docs/parity.md tests on CPU ranks only."""
    zero = read_knobs(config.machine.ds_config, config.machine.unproven)["zero_optimization"]
    keys = [f"zero_optimization.{key}" for key in ("overlap_comm", "offload_optimizer") if zero.get(key)]
    return [*keys, "machine.compile"] if config.machine.compile is True else keys


def deepspeed_config(config: Config, layout: BatchLayout) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the JSON's knobs and the keys that follow from ours.

    Gradients are summed, in bf16 with an fp32 sum, and what the sum is divided by, its norm and its clipping are the
    optimizer's business (`engine.clipping`); only if that is offloaded are they DeepSpeed's. One rank's gradients go
    nowhere, so there they need neither fp32 nor slices for each owner before they are added up.
    """
    knobs = read_knobs(config.machine.ds_config, config.machine.unproven)
    zero, several = knobs["zero_optimization"], layout.ranks > 1
    offload = "offload_optimizer" in zero
    zero.setdefault("reduce_scatter", several)
    ours: dict[str, Any] = {
        "train_batch_size": layout.total,
        "train_micro_batch_size_per_gpu": layout.micro,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optim.grad_clip if offload else 0.0,
        "gradient_allreduce_op": "sum",
        "zero_optimization": zero | {"compute_grad_norm": offload},
        "zero_allow_untested_optimizer": True,  # AdamWWithEMA; tested by us
    }
    if config.precision == "bf16":
        ours |= {
            "bf16": {"enabled": True, "check_grad_overflow": offload},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32" if several else "bf16",
        }
    return knobs | ours

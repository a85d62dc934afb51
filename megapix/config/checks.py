"""Checks of a configuration that need neither data nor other ranks; each error names key, value and what is right."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from megapix.config.fields import get, leaves
from megapix.config.operation import TRACKERS, SamplingConfig
from megapix.config.options import Config
from megapix.config.training import ModelConfig, RepaConfig, TextConfig
from megapix.errors import InputError


def validate(config: Config) -> None:
    """Check what can be checked without data or other ranks.

    Raises:
        InputError: naming key, value and what would be right.
    """
    m, d, o = config.model, config.data, config.optim

    def need(holds: bool, key: str, right: str) -> None:
        if not holds:
            raise InputError(f"{key} = {get(config, key)!r}: expected {right}")

    for key, value, _ in leaves(config):
        need(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    validate_model(m)
    need(d.image_size >= 1, "data.image_size", "at least 1")
    if d.image_size % m.patch_size:
        raise InputError(
            f"data.image_size = {d.image_size} is not divisible by model.patch_size = {m.patch_size} "
            f"({d.image_size} = {d.image_size // m.patch_size} x {m.patch_size} + {d.image_size % m.patch_size})"
        )
    need(d.shuffle_window >= 0, "data.shuffle_window", "0 (all shards) or more")
    need(d.reading_groups >= 1, "data.reading_groups", "at least 1")
    need(d.cache_gib >= 0, "data.cache_gib", "0 (no whole shards) or more")
    need(d.cache_gib == 0 or d.cache != "", "data.cache_gib", "0, or a folder in data.cache")
    need(d.timeout > 0, "data.timeout", "above 0 seconds")
    need(d.outage_minutes >= 0, "data.outage_minutes", "0 (no waiting) or more")
    need(d.max_replaced >= 0, "data.max_replaced", "0 (stop at the first) or more")
    need(d.workers >= 0, "data.workers", "0 or more")
    need(config.flow.t_std > 0, "flow.t_std", "above 0")
    need(config.flow.time_shift > 0, "flow.time_shift", "above 0")
    need(0 <= config.flow.label_dropout <= 1, "flow.label_dropout", "a probability, 0 to 1")
    _validate_repa(config.repa, m)
    _validate_text(config.text, m)
    need(o.global_batch >= 1, "optim.global_batch", "at least 1")
    need(o.lr > 0, "optim.lr", "above 0")
    need(o.lr_after > 0, "optim.lr_after", "above 0")
    need(0 <= o.beta1 < 1, "optim.beta1", "0 <= beta1 < 1")
    need(0 <= o.beta2 < 1, "optim.beta2", "0 <= beta2 < 1")
    need(o.weight_decay >= 0, "optim.weight_decay", "0 or more")
    need(o.grad_clip >= 0, "optim.grad_clip", "0 (off) or more")
    need(0 <= o.ema_decay < 1, "optim.ema_decay", "0 <= decay < 1")
    need(config.machine.micro_batch >= 0, "machine.micro_batch", "0 (global batch / ranks) or more")
    every = config.machine.patch_checkpointing
    need(isinstance(every, str) or every >= 1, "machine.patch_checkpointing", "'none', 'full', or at least 1")
    need(
        config.machine.watchdog == 0 or config.machine.watchdog >= 2,
        "machine.watchdog",
        "0 (off) or at least 2 seconds, twice the time between heartbeats",
    )
    need(config.machine.peak_tflops >= 0, "machine.peak_tflops", "0 (by the GPU's name) or more")
    if config.machine.deterministic and config.machine.attention == "cudnn":
        raise InputError(
            "machine.attention = 'cudnn' with machine.deterministic: cuDNN's attention adds up gradients in any order; "
            "expected 'auto', 'flash', 'efficient' or 'math'"
        )
    if config.machine.pixel_kernels == "triton" and (m.pixel_width < 16 or m.pixel_width & (m.pixel_width - 1)):
        raise InputError(
            f"machine.pixel_kernels = 'triton' with model.pixel_width = {m.pixel_width}: expected 'plain', or a width "
            "that is a power of two and at least 16"
        )
    if config.machine.pixel_kernels == "triton" and config.machine.pixel_checkpointing == "chunked":
        raise InputError(
            "machine.pixel_checkpointing = 'chunked' with machine.pixel_kernels = 'triton': the fused kernels take all "
            "patches at once; expected machine.pixel_kernels = 'plain', or another policy, such as 'full'"
        )
    need(config.checkpoint.keep >= 0, "checkpoint.keep", "0 (all) or more")
    need(config.checkpoint.keep_best >= 0, "checkpoint.keep_best", "0 (none) or more")
    need(config.checkpoint.max_failed >= 1, "checkpoint.max_failed", "at least 1")
    h = config.health
    need(h.max_skipped >= 1, "health.max_skipped", "at least 1")
    need(h.window >= 4, "health.window", "at least 4 steps")
    need(h.loss_z > 0, "health.loss_z", "above 0")
    need(h.grad_norm_z > 0, "health.grad_norm_z", "above 0")
    need(h.patience >= 1, "health.patience", "at least 1")
    need(h.skip >= 0, "health.skip", "0 (the spike's own steps) or more")
    need(h.max_rollbacks >= 0, "health.max_rollbacks", "0 or more")
    need(config.validation.samples >= 0, "validation.samples", "0 (all) or more")
    need(config.evaluation.count >= 2, "evaluation.count", "at least 2")
    need(config.evaluation.batch >= 1, "evaluation.batch", "at least 1")
    need(config.log.grid_classes >= 1, "log.grid_classes", "at least 1")
    need(config.log.grid_columns >= 1, "log.grid_columns", "at least 1")
    names = config.log.trackers
    known = len(set(names)) == len(names) and set(names) <= set(TRACKERS)
    need(known, "log.tracker", f"{', '.join(map(repr, TRACKERS))}, or several with commas between")
    need(m.text_width > 0 or not config.log.prompts, "log.prompts", "none: the network takes classes")
    need(config.profile >= 0, "profile", "0 (off) or more")
    validate_sampling(config.sampling)
    validate_seed(config.seed, "seed")
    need(config.out != "", "out", "a run folder (--out RUN)")
    need(d.path != "", "data.path", "a shard folder (--data.path SHARDS)")


def validate_seed(seed: int, name: str = "--seed") -> None:
    """Check a seed; `name` is what the user calls it.

    Raises:
        InputError: naming option, value and what would be right.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"{name} = {seed}: expected 0 to 2^63 - 1")


def validate_model(m: ModelConfig) -> None:
    """Check the sizes of a network.

    Raises:
        InputError: naming key, value and what would be right.
    """

    def need(holds: bool, key: str, right: str) -> None:
        if not holds:
            raise InputError(f"model.{key} = {getattr(m, key)!r}: expected {right}")

    for key in ("patch_size", "width", "depth", "heads", "pixel_width", "pixel_depth", "text_tokens"):
        need(getattr(m, key) >= 1, key, "at least 1")
    for key in ("pixel_attention_width", "pixel_heads"):
        need(getattr(m, key) >= 0, key, "0 (that of the patch pathway) or more")
    need(m.text_width >= 0, "text_width", "0 (classes) or more")
    need(m.num_classes >= 0, "num_classes", "0 (text) or more")
    if (m.num_classes == 0) == (m.text_width == 0):
        raise InputError(
            f"model.num_classes = {m.num_classes} and model.text_width = {m.text_width}: expected one of them above 0, "
            "the network's condition"
        )
    need(
        m.convention == "paper" or m.text_width > 0,
        "convention",
        "'paper' for a network that takes classes: the released one has that convention, too",
    )
    need(m.width % m.heads == 0, "heads", f"a divisor of model.width = {m.width}")
    need(m.width // m.heads % 4 == 0, "heads", f"model.width / heads divisible by 4, not {m.width // m.heads}")
    width, heads = m.attention_width, m.attention_heads
    if width % heads or width // heads % 4:
        raise InputError(
            f"model.pixel_heads = {m.pixel_heads} and model.pixel_attention_width = {m.pixel_attention_width}: "
            f"the PiT blocks would have {heads} heads in a width of {width}; expected heads of a multiple of 4 channels"
        )
    need(m.pixel_width % 4 == 0, "pixel_width", "a multiple of 4")


def unlike_released(model: ModelConfig, text: TextConfig) -> tuple[str, ...]:
    """What the released code and its ports (ComfyUI, diffusers) would not load, or not run as it was trained: each
    option with its value and theirs; empty if there is nothing."""
    found = [] if model.mlp == "swiglu" else [f"model.mlp = {model.mlp!r}, not 'swiglu'"]
    if model.text_width:
        theirs = {"normalize": "none", "scale": 1.0, "padding": "attended"}
        ours = {key: getattr(text, key) for key in theirs}
        if model.convention != "released":
            found.append(f"model.convention = {model.convention!r}, not 'released'")
        found += [f"text.{key} = {ours[key]!r}, not {value!r}" for key, value in theirs.items() if ours[key] != value]
    return tuple(found)


def aligned_layer(config: Config) -> int:
    """Patch block, counted from 1, that REPA aligns: repa.layer, or the paper's."""
    return config.repa.layer or paper_layer(config.model)


def paper_layer(model: ModelConfig) -> int:
    """Patch block, counted from 1, that the paper aligns."""
    return 6 if model.text_width else 8


def _validate_text(t: TextConfig, m: ModelConfig) -> None:
    if not m.text_width:
        for (key, value, _), (_, default, _) in zip(leaves(t), leaves(TextConfig()), strict=True):
            if value != default:
                raise InputError(
                    f"text.{key} = {value!r} has no effect: the network takes classes (model.text_width = 0)"
                )
        return
    if not 1 <= t.max_tokens <= m.text_tokens:
        raise InputError(f"text.max_tokens = {t.max_tokens}: expected 1 to model.text_tokens = {m.text_tokens}")
    if t.scale <= 0:
        raise InputError(f"text.scale = {t.scale}: expected above 0")
    if t.micro_batch < 0:
        raise InputError(f"text.micro_batch = {t.micro_batch}: expected 0 (the run's micro batch) or more")


def _validate_repa(r: RepaConfig, m: ModelConfig) -> None:
    layer, depth = r.layer or paper_layer(m), m.depth
    if r.encoder and r.features:
        raise InputError(f"repa.encoder = {r.encoder!r} and repa.features = {r.features!r}: expected one of them")
    if not r.wanted:
        for (key, value, _), (_, default, _) in zip(leaves(r), leaves(RepaConfig()), strict=True):
            if value != default and (key, value) != ("layer", paper_layer(m)):
                raise InputError(
                    f"repa.{key} = {value!r} has no effect without repa.encoder or repa.features; give one of them, too"
                )
        return
    if not 1 <= layer <= depth:
        raise InputError(f"repa.layer = {layer}: expected 1 to model.depth = {depth}")
    if r.weight <= 0:
        raise InputError(f"repa.weight = {r.weight}: expected above 0; repa.stop_at = 0 switches REPA off in a run")
    if r.features and r.micro_batch:
        raise InputError(f"repa.micro_batch = {r.micro_batch} has no effect with repa.features: no encoder computes")
    if r.micro_batch < 0:
        raise InputError(f"repa.micro_batch = {r.micro_batch}: expected 0 (the run's micro batch) or more")


SAMPLING_OPTIONS = {
    "steps": "--steps",
    "guidance": "--guidance",
    "guidance_from": "--interval's first value",
    "guidance_to": "--interval's second value",
    "shift": "--shift",
}
"""What the commands that sample images call the options of `SamplingConfig`."""


def validate_sampling(s: SamplingConfig, names: dict[str, str] | None = None) -> None:
    """Check sampling options; `names` are what the user calls them, if they are not a run's.

    Raises:
        InputError: naming option, value and what would be right.
    """

    def shown(name: str) -> str:
        return f"{(names or {}).get(name, f'sampling.{name}')} = {getattr(s, name)}"

    if s.steps < 1:
        raise InputError(f"{shown('steps')}: expected at least 1")
    for name in ("guidance", "guidance_from", "guidance_to", "shift"):
        if not math.isfinite(getattr(s, name)):
            raise InputError(f"{shown(name)}: expected a finite number")
    if s.shift <= 0:
        raise InputError(f"{shown('shift')}: expected above 0")
    if s.guidance_from > s.guidance_to:
        raise InputError(f"{shown('guidance_from')} is above {shown('guidance_to')}")


def override_sampling(
    own: SamplingConfig, interval: tuple[float, float] | None = None, **overrides: Any
) -> SamplingConfig:
    """`own` with a command's options --interval, --guidance and so on in place of its values; None overrides nothing.

    Raises:
        InputError: naming option, value and what would be right.
    """
    low, high = interval or (own.guidance_from, own.guidance_to)
    changes = {name: value for name, value in overrides.items() if value is not None}
    sampling = dataclasses.replace(own, guidance_from=low, guidance_to=high, **changes)
    validate_sampling(sampling, SAMPLING_OPTIONS)
    return sampling

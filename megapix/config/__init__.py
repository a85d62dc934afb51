"""Every option of a run, its presets, spans and checks, and its way to JSON and back. Imports no torch."""

from __future__ import annotations

from megapix.config.checks import (
    SAMPLING_OPTIONS,
    aligned_layer,
    override_sampling,
    paper_layer,
    validate,
    validate_model,
    validate_sampling,
    validate_seed,
)
from megapix.config.fields import compare, from_dict, get, leaves, replace, to_dict
from megapix.config.marks import IMAGENET_IMAGES, Generator, Images, PixelPolicy, Sampler
from megapix.config.operation import (
    CheckpointConfig,
    EvaluationConfig,
    HealthConfig,
    LogConfig,
    MachineConfig,
    SamplingConfig,
    ValidationConfig,
)
from megapix.config.options import Config
from megapix.config.policies import CHUNK, PIXEL_POLICIES, on_cpus, recomputed_blocks
from megapix.config.presets import (
    PRESETS,
    imagenet_256,
    imagenet_512,
    pixeldit_b,
    pixeldit_l,
    pixeldit_t2i,
    pixeldit_xl,
    preset,
    t2i_tiny,
    text_to_image,
    tiny,
)
from megapix.config.spans import MAY_BE_NEVER, SPANS, BatchLayout, batch_layout, freeze, images
from megapix.config.training import DataConfig, FlowConfig, ModelConfig, OptimConfig, RepaConfig, TextConfig

__all__ = [
    "CHUNK",
    "IMAGENET_IMAGES",
    "MAY_BE_NEVER",
    "PIXEL_POLICIES",
    "PRESETS",
    "SAMPLING_OPTIONS",
    "SPANS",
    "BatchLayout",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FlowConfig",
    "Generator",
    "HealthConfig",
    "Images",
    "LogConfig",
    "MachineConfig",
    "ModelConfig",
    "OptimConfig",
    "PixelPolicy",
    "RepaConfig",
    "Sampler",
    "SamplingConfig",
    "TextConfig",
    "ValidationConfig",
    "aligned_layer",
    "batch_layout",
    "compare",
    "freeze",
    "from_dict",
    "get",
    "imagenet_256",
    "imagenet_512",
    "images",
    "leaves",
    "on_cpus",
    "override_sampling",
    "paper_layer",
    "pixeldit_b",
    "pixeldit_l",
    "pixeldit_t2i",
    "pixeldit_xl",
    "preset",
    "recomputed_blocks",
    "replace",
    "t2i_tiny",
    "text_to_image",
    "tiny",
    "to_dict",
    "validate",
    "validate_model",
    "validate_sampling",
    "validate_seed",
]

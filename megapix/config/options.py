"""Every option of a run, once: frozen dataclasses with the defaults of the paper's recipe.

The sections lie in `training.py`, what a run computes, and `operation.py`, how it is executed. Each field carries a
mark (`marks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megapix.config import marks
from megapix.config.operation import (
    CheckpointConfig,
    EvaluationConfig,
    HealthConfig,
    LogConfig,
    MachineConfig,
    SamplingConfig,
    ValidationConfig,
)
from megapix.config.training import DataConfig, FlowConfig, ModelConfig, OptimConfig, RepaConfig, TextConfig


@dataclass(frozen=True)
class Config:
    """A whole run. The same command starts it and, after an interruption, resumes from its last checkpoint."""

    out: str = marks.machine("")
    """Run folder: configuration, checkpoints and TensorBoard events."""
    seed: int = marks.identity(0)
    """Seed of the initial weights, sample order, flips, noise, timesteps and label dropout."""
    init: str = marks.identity("")
    """Initialize from the weights of this run, checkpoint, exported file or imported folder, as the next stage;
    optimizer, position and EMA start fresh."""
    init_weights: Literal["ema", "raw"] = marks.identity("ema")
    """Which of its weights; an exported file or imported folder holds one kind."""
    resume: Literal["auto", "require"] = marks.machine("auto")
    """'auto' resumes from the newest whole checkpoint, or starts; 'require' resumes from the newest, or fails."""
    precision: Literal["bf16", "fp32"] = marks.identity("bf16")
    """DeepSpeed's bf16 mode (bf16 weights and activations, fp32 masters, moments and EMA), or fp32 throughout."""
    profile: int = marks.machine(0)
    """Steps that each rank profiles with torch.profiler into OUT/profile, after the first three; 0 is off."""
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    text: TextConfig = field(default_factory=TextConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

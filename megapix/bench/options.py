"""The options of `megapix bench step`: what a step consists of, as in a run, and how it is timed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megapix.config import Config, DataConfig, FlowConfig, MachineConfig, ModelConfig, OptimConfig, TextConfig
from megapix.errors import InputError

RUN = ("seed", "precision", "model", "flow", "data", "optim", "text", "machine")
"""Sections of a run's configuration that take part in a step."""


@dataclass(frozen=True)
class StepOptions:
    """Time whole training steps of a configuration on this machine, on one rank or on those of a launcher: MFU against
    the matmul peak measured beside it, and the parts of a step. Images are synthetic unless --data.path is given; REPA
    is left out."""

    micro_batch: int = 4
    """Images in one forward pass of one rank, without accumulation; 0 takes the configuration's own batch."""
    repeats: int = 7
    """Steps that are timed."""
    warmup: int = 2
    """Steps before them that are not timed: compilation, first allocations."""
    save: Path | None = None
    """Folder, shared by all nodes, in which checkpoints are written and removed,
    to time how long training waits for one."""
    out: Path | None = None
    """JSON file of all numbers."""
    seed: int = 0
    """Seed of the initial weights, noise, timesteps and label dropout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """DeepSpeed's bf16 mode, or fp32 throughout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    text: TextConfig = field(default_factory=TextConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    @classmethod
    def of(cls, run: Config) -> StepOptions:
        """The defaults for a run of that configuration."""
        return cls(**{name: getattr(run, name) for name in RUN})

    def configuration(self, ranks: int) -> Config:
        """The run whose step is timed; a folder for it is not needed.

        Raises:
            InputError: an option of the benchmark itself that cannot be used.
        """
        for name, least in (("micro_batch", 0), ("repeats", 1), ("warmup", 0)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"--{name.replace('_', '-')} = {value}: expected at least {least}")
        run = Config(**{name: getattr(self, name) for name in RUN})
        if not self.micro_batch:
            return run
        optim = dataclasses.replace(run.optim, global_batch=self.micro_batch * ranks)
        machine = dataclasses.replace(run.machine, micro_batch=self.micro_batch)
        return dataclasses.replace(run, optim=optim, machine=machine)


def check_batch(options: StepOptions, default: StepOptions) -> None:
    """Refuse a batch that is set twice.

    Raises:
        InputError: a run's own batch options beside --micro-batch, which would take their place.
    """
    for key in ("optim.global_batch", "machine.micro_batch"):
        section, name = key.split(".")
        value = getattr(getattr(options, section), name)
        if options.micro_batch and value != getattr(getattr(default, section), name):
            raise InputError(
                f"{key} = {value} has no effect beside --micro-batch {options.micro_batch}: expected --micro-batch "
                "alone, or --micro-batch 0 for the run's own batch"
            )

"""What the values of the checkpointing options mean, and what 'auto' stands for where there is no GPU."""

from __future__ import annotations

import dataclasses
import typing

from megapix.config.marks import PixelPolicy
from megapix.config.operation import MachineConfig

CHUNK = 512
"""Patches that the policy 'chunked' computes at a time."""
PIXEL_POLICIES: tuple[PixelPolicy, ...] = typing.get_args(PixelPolicy)
"""Every policy of the pixel pathway."""


def recomputed_blocks(patch_checkpointing: str | int, depth: int) -> range:
    """Numbers of the patch blocks, counted from 1, that `machine.patch_checkpointing` recomputes in backward."""
    if patch_checkpointing == "none":
        return range(0)
    every = 1 if patch_checkpointing == "full" else int(patch_checkpointing)
    return range(every, depth + 1, every)


def on_cpus(machine: MachineConfig) -> MachineConfig:
    """The options with what 'auto' stands for on CPUs: blocks that are not compiled, and the least memory."""
    compiled, policy = machine.compile, machine.pixel_checkpointing
    return dataclasses.replace(
        machine,
        compile=False if compiled == "auto" else compiled,
        pixel_checkpointing="full" if policy == "auto" else policy,
    )

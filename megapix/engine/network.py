"""The network that an engine trains: initial weights, kernels, activation checkpointing, compilation."""

from __future__ import annotations

import os

import torch
from deepspeed.accelerator import get_accelerator

from megapix import model
from megapix.config import MachineConfig, ModelConfig
from megapix.engine import checkpointing
from megapix.errors import InputError
from megapix.model import Alignment, PixelDiT
from megapix.model.layers import PiTBlock


def build_network(
    config: ModelConfig, seed: int, machine: MachineConfig | None = None, alignment: Alignment | None = None
) -> PixelDiT:
    """The network with its initial weights, a function of the seed; the global generator is left as it was.

    `machine` says what each block keeps for backward, whether it is compiled, and the pixel pathway's kernels; without
    it nothing is recomputed or compiled, and the kernels are torch's. `alignment` adds REPA's projector.

    Raises:
        InputError: compilation or Triton's kernels are requested, and this machine has no compiler or no Triton.
    """
    block = pit_block(machine.pixel_kernels) if machine else PiTBlock
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.build(config, alignment, block)
    if machine:
        if machine.compile:
            _need_a_compiler()
        checkpointing.apply(network, machine)
    return network


def pit_block(kernels: str) -> type[PiTBlock]:
    """The class of the pixel pathway's blocks, for a value of machine.pixel_kernels.

    Raises:
        InputError: Triton's kernels are requested, and it is not installed or has no GPU.
    """
    if kernels == "plain":
        return PiTBlock
    if get_accelerator().device_name() == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"machine.pixel_kernels = {kernels!r}: Triton compiles for GPUs only; expected 'plain' on CPUs "
            "(or TRITON_INTERPRET=1 in the environment: Triton's interpreter, for tests of a few pixels)"
        )
    try:
        from megapix.model.fused_block import FusedPiTBlock  # late: only these runs need Triton
    except ModuleNotFoundError as error:
        raise InputError(
            f"machine.pixel_kernels = {kernels!r}: {error.name} is not installed; expected 'plain', or the Triton that "
            "this torch was built for (pip install triton)"
        ) from error
    return FusedPiTBlock


def _need_a_compiler() -> None:
    from torch._inductor import cpp_builder, exc  # late: a second of imports that only compiled runs need

    if get_accelerator().device_name() == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise InputError(
                "machine.compile = True: torch.compile finds no C++ compiler; expected g++, or another one in CXX"
            ) from error

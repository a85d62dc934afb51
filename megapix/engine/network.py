"""The network that an engine trains: initial weights, kernels, activation checkpointing, compilation."""

from __future__ import annotations

import os

import torch
from deepspeed.accelerator import get_accelerator

from megapix import model
from megapix.config import Config, MachineConfig, ModelConfig, on_cpus
from megapix.engine import checkpointing, compiler
from megapix.errors import InputError
from megapix.model import Alignment, PixelDiT
from megapix.model.attention import KERNELS, chosen, take
from megapix.model.layers import PiTBlock
from megapix.model.pixeldit_t2i import TextPixelDiT


def build_network(
    config: ModelConfig,
    seed: int,
    machine: MachineConfig | None = None,
    alignment: Alignment | None = None,
    buckets: int = 1,
    tokens: int = 0,
) -> PixelDiT:
    """The network with its initial weights, a function of the seed; the global generator is left as it was.

    `machine` says what each block keeps for backward, whether it is compiled, and the pixel pathway's kernels; without
    it nothing is recomputed or compiled, and the kernels are torch's. What 'auto' stands for on a GPU is resolved
    before (`costs/automatic.py`).

    Args:
        alignment: adds REPA's projector.
        buckets: sizes of images that the run has.
        tokens: most tokens of a caption (text.max_tokens); 0 is all that the network has positions for.

    Raises:
        InputError: compilation or Triton's kernels are requested, and this machine has no compiler or no Triton.
    """
    machine = on_cpus(machine) if machine else None
    block = pit_block(machine.pixel_kernels) if machine else PiTBlock
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.build(config, alignment, block)
    if machine:
        compiler.require(machine, cuda=get_accelerator().device_name() != "cpu")
        if machine.deterministic:
            be_deterministic()
        take(network, machine.attention)
        checkpointing.apply(network, machine, varied=buckets > 1 or config.text_width > 0)
    if isinstance(network, TextPixelDiT) and tokens:
        network.most_tokens = tokens
    return network


def be_deterministic() -> None:
    """Have torch take deterministic algorithms from here on, or refuse: the same input gives the same bits on the same
    machine. To be called before the first product on a GPU, since cuBLAS reads its workspace's size only once.

    What it does to a run (torch 2.13): the backward passes of flash and memory-efficient attention add in a fixed order
    and cuDNN's is not taken, sums into rows of the class table are sorted instead of added by whichever thread comes
    first, and Inductor chooses no kernel by timing it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's notes on randomness: this or :16:8
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # every empty tensor here is written before it is read


WORDS = {"flash": "flash", "cudnn": "cuDNN", "efficient": "memory-efficient", "math": "math"}
"""What kernels of attention are called in messages."""


def attention_of(c: Config, device: torch.device) -> str:
    """Which kernels compute a run's attention on this device, in words: 'cuDNN', or 'memory-efficient in patches with
    text, flash in pixels'.

    The sizes are those of the run's square images and longest captions. Ask after `be_deterministic`, if it is wanted.

    Raises:
        InputError: machine.attention names one that does not take them.
    """
    m, dtype = c.model, torch.bfloat16 if c.precision == "bf16" else torch.float32
    patches = (c.data.image_size // m.patch_size) ** 2
    text = c.text.max_tokens if m.text_width else 0
    masked = bool(text) and c.text.padding == "masked"
    pathways = {
        "patches with text" if text else "patches": (m.heads, m.width // m.heads, patches + text, masked),
        "pixels": (m.attention_heads, m.attention_width // m.attention_heads, patches, False),
    }
    found: dict[str, str] = {}
    for pathway, (heads, channels, tokens, masked) in pathways.items():
        sizes = heads, channels, tokens, dtype, device, masked
        kernel = chosen(*sizes, c.machine.attention)
        if kernel is None:
            takes = ", ".join(repr(name) for name in ("auto", *KERNELS) if chosen(*sizes, name))
            raise InputError(
                f"machine.attention = {c.machine.attention!r} does not take the attention of {pathway}: {tokens} "
                f"tokens in {heads} heads of {channels}, {c.precision}{', with a mask' if masked else ''}, on "
                f"{device.type}; expected {takes}"
            )
        found[pathway] = WORDS[kernel] + " for CPUs" * (device.type == "cpu")
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{kernel} in {pathway}" for pathway, kernel in found.items())


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

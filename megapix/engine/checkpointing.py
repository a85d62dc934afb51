"""Activation checkpointing: the policies that say what a block keeps between its forward and its backward pass.

    none                  every activation that autograd saves
    selective             inputs and results of matmuls; the cheap rest is recomputed
    selective_modulation  as selective, but the pixel-wise modulation, a PiT block's largest result, is recomputed too
    full                  the block's input alone
    chunked               inputs and outputs of attention, and what attention saves; the rest is recomputed, and some
                          patches at a time (`chunked.py`)
    offload               nothing on the device: what autograd saves is kept in host memory (`offload.py`)

A policy replaces a block's `forward`; parameters, names and results stay as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megapix.config import MachineConfig, recomputed_blocks
from megapix.engine.chunked import chunked
from megapix.engine.compiled import Compiled, Kinds, compile_methods
from megapix.engine.offload import offloaded
from megapix.model import PixelDiT
from megapix.model.layers import FinalLayer, PatchBlock, PiTBlock
from megapix.model.pixeldit_t2i import MMDiTBlock, TextPixelDiT

aten = torch.ops.aten
MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""What linear layers and attention become, on CPUs and GPUs."""


SIZES = {
    PiTBlock: ("N..", "BL.", "L."),
    PatchBlock: ("BL.", "B..", "L."),
    MMDiTBlock: ("BL.", "BT.", "B..", "L.", "T.", "B..L"),
    FinalLayer: ("N..",),
}
"""Sizes of what a block takes (`compiled.Kind`)."""
PART_SIZES = {
    "embed": ("B.HW", "B", ".", "B"),
    "pixel_condition": ("BL.", "B.."),
    "pixel_tokens": ("B.HW", "L.."),
    "output": ("N..", "B.HW"),
    "project": ("BL.",),
}
"""The same of what lies between the blocks; `embed` takes text as TEXT_SIZES."""
TEXT_SIZES = ("B.HW", "B", ".", "BT.", "BT")
CHUNK_SIZES = {"_before": ("C..", "C."), "attend": SIZES[PiTBlock], "_after": ("C..", "C..", "C."), "forward": ("C..",)}
"""The same of the parts of a block that is computed in chunks (`chunked.py`)."""


def apply(network: PixelDiT, machine: MachineConfig, varied: bool = False) -> None:
    """Give each block the policy of its pathway, and compile the network if `machine.compile` is set.

    A block is compiled with its policy, so the compiler sees what is to be recomputed. Blocks of one kind share their
    code, so each kind is compiled once and not once per layer. What lies between the blocks is compiled in few graphs
    of its own. What cannot be compiled is an error, not a slow step.

    Args:
        varied: whether images have several sizes, or masked texts several lengths: these sizes are open in the graphs
            from the first step on.
    """
    kinds = Kinds(varied) if machine.compile is True else None
    pixel = machine.pixel_checkpointing
    for block in network.pixel_blocks:
        _prepare(block, pixel, kinds)
    apart = pixel in ("chunked", "offload")  # their output layer is compiled by itself
    _prepare(network.final_layer, pixel, kinds if apart else None)
    recomputed = recomputed_blocks(machine.patch_checkpointing, len(network.patch_blocks))
    for number, block in enumerate(network.patch_blocks, 1):
        _prepare(block, "full" if number in recomputed else "none", kinds)
    if kinds:
        _compile_parts(network, kinds, ["output"] if apart else [])


def _compile_parts(network: PixelDiT, kinds: Kinds, left_out: list[str]) -> None:
    part_sizes = PART_SIZES
    if isinstance(network, TextPixelDiT):
        network.few_lengths = True
        part_sizes = PART_SIZES | {"embed": TEXT_SIZES}
    parts = {name: sizes for name, sizes in part_sizes.items() if name not in left_out and hasattr(network, name)}
    compile_methods(network, parts, kinds)


def _prepare(block: nn.Module, policy: str, kinds: Kinds | None) -> None:
    name = type(block).__name__ + (", the last" if getattr(block, "last", False) else "")
    if policy == "chunked":
        block.forward = chunked(block, _in_parts(kinds, name) if kinds else lambda part: part)
        return
    function = RECOMPUTING.get(policy, type(block).forward)
    forward: Any = MethodType(function, block)
    if kinds:
        sizes = next(sizes for kind, sizes in SIZES.items() if isinstance(block, kind))
        shown = name if policy in ("none", "offload") else f"{name}, {policy}"
        forward = Compiled(kinds.of(shown, function, sizes), block)
    if policy == "offload":
        forward = offloaded(block, forward)
    block.forward = forward


def _in_parts(kinds: Kinds, name: str) -> Any:
    """Compiles the parts of a block in chunks."""
    return lambda part: kinds.of(f"{name}, {part.__name__.strip('_')}", part, CHUNK_SIZES[part.__name__])


# ---------------------------------------------------------------------------------------------------------------------
# Recomputation: each of these replaces a block's forward pass
# ---------------------------------------------------------------------------------------------------------------------


def _full(block: nn.Module, *args: Any) -> Any:
    return _checkpointed(block, args)


def _selective(block: nn.Module, *args: Any) -> Any:
    return _checkpointed(block, args, context_fn=_keep_matmuls)


def _selective_modulation(block: nn.Module, *args: Any) -> Any:
    return _checkpointed(block, args, context_fn=_keep_matmuls_but_the_modulation)


RECOMPUTING = {"full": _full, "selective": _selective, "selective_modulation": _selective_modulation}


def _checkpointed(block: nn.Module, args: Any, **how: Any) -> Any:
    # No dropout in the network, so there is no generator state to keep for the recomputation.
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **how)


def _keep_matmuls() -> Any:
    return create_selective_checkpoint_contexts(_all)  # type: ignore[no-untyped-call]


def _keep_matmuls_but_the_modulation() -> Any:
    return create_selective_checkpoint_contexts(_AllButTheFirst())  # type: ignore[no-untyped-call]


def _all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _policy(op in MATMULS)


class _AllButTheFirst:
    """Keeps every matmul but the first, which in a PiT block is the modulation. Some releases of torch ask in the
    recomputation, too, so each pass has its own count."""

    def __init__(self) -> None:
        self._seen = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op not in MATMULS:
            return _policy(False)
        self._seen[context.is_recompute] += 1
        return _policy(self._seen[context.is_recompute] > 1)


def _policy(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

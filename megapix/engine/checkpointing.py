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

import logging
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megapix.config import MachineConfig, recomputed_blocks
from megapix.engine.chunked import chunked
from megapix.engine.offload import offloaded
from megapix.model import PixelDiT

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


def apply(network: PixelDiT, machine: MachineConfig) -> None:
    """Give each block the policy of its pathway, and compile it if `machine.compile` is set.

    The block is compiled with its policy, so the compiler sees what is to be recomputed. Blocks of one kind share their
    code, so each kind is compiled once and not once per layer. What cannot be compiled is an error, not a slow step.
    """
    if machine.compile:
        # One graph per kind of block, with and without gradients, and per batch and image size.
        torch._dynamo.config.recompile_limit = 64
        # The blocks do write in place, but in autograd functions, into tensors of their own.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda r: "in-place ops" not in r.getMessage())
    for block in (*network.pixel_blocks, network.final_layer):
        _prepare(block, machine.pixel_checkpointing, machine.compile)
    recomputed = recomputed_blocks(machine.patch_checkpointing, len(network.patch_blocks))
    for number, block in enumerate(network.patch_blocks, 1):
        _prepare(block, "full" if number in recomputed else "none", machine.compile)


def _prepare(block: nn.Module, policy: str, compiled: bool) -> None:
    if policy == "chunked":
        block.forward = chunked(block, _compiled if compiled else lambda part: part)
        return
    forward: Any = MethodType(RECOMPUTING.get(policy, type(block).forward), block)
    if compiled:
        forward = _compiled(forward)
    if policy == "offload":
        forward = offloaded(block, forward)
    block.forward = forward


def _compiled(forward: Any) -> Any:
    return torch.compile(forward, fullgraph=True)


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

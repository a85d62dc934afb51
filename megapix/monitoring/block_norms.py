"""Norms per block in one step: of its gradient, and of its modulation.

The norm of the whole gradient says that a loss spike begins, these say in which block; the PiT blocks' modulation is
where spikes of the smaller models have come from.

A `Watch` lives for one step. Nothing of it stays in the network or the optimizer between two of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from megapix.engine.zero2 import Zero2Engine
from megapix.model.layers import PiTBlock

PARTS = {
    4: ("scale1", "shift1", "scale2", "shift2"),
    6: ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"),
}
"""Chunks of a PiT block's modulation, post and pre, in the order of `PiTBlock.forward`."""


class Watch:
    """Hooks for one step, on every rank: made before its first forward pass, and read after the optimizer step.

    Gradient norms are those of the whole step's averaged gradient before clipping. Each rank has only the
    fp32 gradient of its own partition, when ZeRO-2 calls the optimizer; the sums of squares per block are added over
    the ranks, which is a few hundred bytes.
    """

    def __init__(self, engine: Zero2Engine) -> None:
        """Put the hooks into the engine's network and optimizer."""
        self._engine = engine
        self._slices = [(block_of(name), start, count) for name, start, count in engine.fragments()]
        names = {block_of(name): None for name, _ in engine.network.named_parameters()}
        self._gradients = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        self._rows = {name: row for row, name in enumerate(names)}
        self._modulation: dict[str, Tensor] = {}
        # A compiled block's graph knows no hooks: this step runs eagerly.
        self._stance: Any = torch.compiler.set_stance("force_eager")
        self._handles = [engine.optimizer.register_step_pre_hook(self._add_gradients)]
        for name, block in engine.network.named_modules():
            for part, modulation in block.named_children():
                if part.startswith("adaLN_modulation"):
                    pixels = isinstance(block, PiTBlock)
                    chunks, width = (block.chunks, block.norm1.weight.numel()) if pixels else (0, 0)
                    tag = block_of(name + ".") + part.removeprefix("adaLN_modulation")  # of text blocks: _img, _txt
                    hook = partial(self._add_modulation, tag, chunks, width)
                    self._handles.append(modulation.register_forward_hook(hook))

    def read(self, ranks: int) -> dict[str, float]:
        """Remove the hooks and return the scalars over all ranks; none if the step was skipped. Every rank calls it."""
        for handle in self._handles:
            handle.remove()
        self._stance.__exit__(None, None, None)  # as it was
        if not self._engine.applied:
            return {}
        modulation = torch.cat(list(self._modulation.values()))  # [tags, 2]: sum of squares, count
        if ranks > 1:
            torch.distributed.all_reduce(self._gradients)
            torch.distributed.all_reduce(modulation)
        norms = (self._gradients.sqrt() * self._engine.unclipped).tolist()
        row = {f"blocks/grad_norm/{name}": norms[i] for name, i in self._rows.items()}
        tags = [tag for name, sums in self._modulation.items() for tag in _tags(name, len(sums))]
        rms = (modulation[:, 0] / modulation[:, 1]).sqrt().tolist()
        return row | {f"blocks/modulation_rms/{tag}": value for tag, value in zip(tags, rms, strict=True)}

    def _add_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """ZeRO-2 has put the fp32 gradient of this rank's partition into its one parameter; `unclipped` says which."""
        (partition,) = optimizer.param_groups[0]["params"]
        self._gradients.zero_()
        for name, start, count in self._slices:
            norm = torch.linalg.vector_norm(partition.grad[start : start + count]).double()
            self._gradients[self._rows[name]] += norm.square().to(self._gradients.device)

    def _add_modulation(self, name: str, chunks: int, width: int, module: nn.Module, _: Any, out: Tensor) -> None:
        """Sums of squares per part; a block that is recomputed in backward adds the same numbers twice."""
        with torch.no_grad():
            parts = out.view(-1, chunks, width) if chunks else out.view(-1, 1, out.shape[-1])
            squares = torch.linalg.vector_norm(parts, dim=(0, 2), dtype=torch.float32).double().square()
            sums = torch.stack([squares, torch.full_like(squares, parts.numel() / parts.shape[1])], dim=1)
            self._modulation[name] = self._modulation.get(name, torch.zeros_like(sums)) + sums


def block_of(name: str) -> str:
    """Block of a parameter: patch_blocks.3.norm1.weight -> patch_03, pixel_blocks.0.… -> pit_0, t_embedder.… as it is.

    The last dot ends a block's own name.
    """
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if first == "patch_blocks":
        return f"patch_{int(number):02d}"
    if first == "pixel_blocks":
        return f"pit_{number}"
    return first


def _tags(name: str, parts: int) -> list[str]:
    return [f"{name}/{part}" for part in PARTS[parts]] if parts > 1 else [name]

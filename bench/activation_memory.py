"""Bytes that each pathway of PixelDiT-XL holds between forward and backward, for each checkpointing policy.

    python -m bench.activation_memory

Counted are the storages that are alive after the forward pass of one image at 256 x 256 in bf16, each once, without
weights and inputs: of the pixel pathway (four PiT blocks and the output layer), and of the patch pathway (26 blocks).
What a policy has moved to host memory is counted by itself.
"""

from __future__ import annotations

import gc
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megapix import engine
from megapix.config import MachineConfig, ModelConfig, PixelPolicy, pixeldit_xl, replace
from megapix.model import PixelDiT
from megapix.model.embed import rope_table
from megapix.model.layers import Rope
from megapix.offload import InHostMemory


class Held(NamedTuple):
    """Bytes alive between forward and backward."""

    device: int
    host: int
    """Moved to host memory by the policy 'offload'."""

    def __str__(self) -> str:
        return f"{self.device / 2**20:.1f} MiB" + (f", {self.host / 2**20:.1f} MiB on the host" if self.host else "")


class LiveStorages(TorchDispatchMode):
    """Remembers, weakly, every storage that an operation makes inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> Held:
        """Of those that are still alive."""
        gc.collect()
        moved = {m.copy._cdata for m in gc.get_objects() if type(m) is InHostMemory}
        alive = {key: size for key, (reference, size) in self._seen.items() if not reference.expired()}
        host = sum(size for key, size in alive.items() if key in moved)
        return Held(sum(alive.values()) - host, host)


def held_by(work: Callable[[], Any]) -> Held:
    """Bytes of the storages made by `work` that are alive while its result is."""
    with LiveStorages() as live:
        result = work()
    held = live.held()
    del result
    return held


def pixel_pathway(config: ModelConfig, machine: MachineConfig, size: int = 256) -> Held:
    """Held for an image in bf16 by the pixel pathway; the patch pathway is left out, its depth plays no part."""
    net, x, rope = _set_up(replace(config, "depth", 1), machine, size)
    s = torch.randn(1, rope[0].shape[0], config.width).bfloat16().requires_grad_()
    net.pixel_pathway(x, s, rope)  # position tables are made once, before the count
    return held_by(lambda: net.pixel_pathway(x, s, rope))


def patch_pathway(config: ModelConfig, machine: MachineConfig, size: int = 256) -> Held:
    """Held for an image in bf16 by the patch pathway; the pixel pathway is left out."""
    net, x, rope = _set_up(replace(config, "pixel_depth", 1), machine, size)
    t, y = torch.rand(1), torch.zeros(1, dtype=torch.long)
    net.patch_pathway(x, t, y, rope)
    return held_by(lambda: net.patch_pathway(x, t, y, rope)[0])


def _set_up(model: ModelConfig, machine: MachineConfig, size: int) -> tuple[PixelDiT, torch.Tensor, Rope]:
    net = engine.build_network(model, 0, machine).bfloat16()
    side = size // model.patch_size
    rope = rope_table(side, side, model.width // model.heads, torch.device("cpu"))
    return net, torch.randn(1, 3, size, size).bfloat16(), rope


def main() -> None:
    """Print a line for each pathway and policy."""
    for policy in typing.get_args(PixelPolicy):
        print(f"pixel {policy}: {pixel_pathway(pixeldit_xl(), MachineConfig(pixel_checkpointing=policy))}")
    for every in ("none", 4, 2, "full"):
        print(f"patch {every}: {patch_pathway(pixeldit_xl(), MachineConfig(patch_checkpointing=every))}")


if __name__ == "__main__":
    main()

"""Bytes that each pathway of a network holds between forward and backward, for each checkpointing policy.

    python -m benchmarks.activation_memory [--preset xl-256]

Counted are the storages that are alive after a forward pass in bf16, each once, without weights and inputs: of the
pixel pathway (PiT blocks and output layer), and of the patch pathway. Printed is what one of two images holds, with as
much text as the preset lets it have: joint attention copies parts that a single image would not make it copy. What a
policy has moved to host memory is counted by itself.
"""

from __future__ import annotations

import argparse
import gc
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.made_up import told
from megapix.config import PRESETS, MachineConfig, ModelConfig, PixelPolicy, preset, replace
from megapix.engine.network import build_network
from megapix.engine.offload import InHostMemory
from megapix.model import PixelDiT

IMAGES = 2
"""Images that a measurement makes; its bytes are divided by them."""


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

    def alive(self) -> dict[int, int]:
        """Bytes of each of them that is still alive; the others are forgotten."""
        self._seen = {key: seen for key, seen in self._seen.items() if not seen[0].expired()}
        return {key: size for key, (_, size) in self._seen.items()}

    def held(self) -> Held:
        """Of those that are still alive."""
        gc.collect()
        moved, alive = {m.copy._cdata for m in gc.get_objects() if type(m) is InHostMemory}, self.alive()
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
    net, x = _set_up(replace(config, "depth", 1), machine, size)
    s = torch.randn(IMAGES, (size // config.patch_size) ** 2, config.width).bfloat16().requires_grad_()
    net.pixel_pathway(x, s)  # position tables are made once, before the count
    return _of_an_image(held_by(lambda: net.pixel_pathway(x, s)))


def patch_pathway(config: ModelConfig, machine: MachineConfig, size: int = 256, tokens: int = 0) -> Held:
    """Held for an image in bf16 by the patch pathway; the pixel pathway is left out."""
    net, x = _set_up(replace(config, "pixel_depth", 1), machine, size)
    t, condition = torch.rand(IMAGES), told(config, IMAGES, tokens)
    net.patch_pathway(x, t, condition)
    return _of_an_image(held_by(lambda: net.patch_pathway(x, t, condition)))


def _set_up(model: ModelConfig, machine: MachineConfig, size: int) -> tuple[PixelDiT, torch.Tensor]:
    net = build_network(model, 0, machine).bfloat16()
    return net, torch.randn(IMAGES, 3, size, size).bfloat16()


def _of_an_image(held: Held) -> Held:
    return Held(*(size // IMAGES for size in held))


def main() -> None:
    """Print a line for each pathway and policy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activation_memory", description=__doc__)
    parser.add_argument("--preset", default="xl-256", choices=PRESETS)
    c = preset(parser.parse_args().preset)
    for policy in typing.get_args(PixelPolicy):
        held = pixel_pathway(c.model, MachineConfig(pixel_checkpointing=policy), c.data.image_size)
        print(f"pixel {policy}: {held}", flush=True)
    for every in ("none", 4, 2, "full"):
        held = patch_pathway(c.model, MachineConfig(patch_checkpointing=every), c.data.image_size, c.text.max_tokens)
        print(f"patch {every}: {held}", flush=True)


if __name__ == "__main__":
    main()

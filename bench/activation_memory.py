"""Bytes that each pathway of PixelDiT-XL holds between forward and backward, for each checkpointing policy.

    python -m bench.activation_memory

Counted are the storages that are alive after the forward pass of one image at 256 x 256 in bf16, each once, without
weights and inputs: of the pixel pathway (four PiT blocks and the output layer), and of the patch pathway (26 blocks).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megapix.config import ModelConfig, pixeldit_xl, replace
from megapix.engine import checkpoint_function
from megapix.model import PixelDiT
from megapix.model.embed import rope_table
from megapix.model.layers import Rope

IMAGE_SIZE = 256


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

    def bytes(self) -> int:
        """Bytes of those that are still alive."""
        gc.collect()
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def held_by(work: Callable[[], Any]) -> int:
    """Bytes of the storages made by `work` that are alive while its result is."""
    with LiveStorages() as live:
        result = work()
    held = live.bytes()
    del result
    return held


def pixel_pathway_bytes(config: ModelConfig, policy: str) -> int:
    """Bytes an image in bf16; the patch pathway is left out, its depth plays no part."""
    torch.manual_seed(0)
    net = PixelDiT(replace(config, "depth", 1), pixel_checkpoint=checkpoint_function(policy)).bfloat16()
    x, rope = _image_and_rope(config)
    s = torch.randn(1, rope[0].shape[0], config.width).bfloat16().requires_grad_()
    net.pixel_pathway(x, s, rope)  # position tables are made once, before the count
    return held_by(lambda: net.pixel_pathway(x, s, rope))


def patch_pathway_bytes(config: ModelConfig, policy: str) -> int:
    """Bytes an image in bf16 of the whole patch pathway; the pixel pathway is left out."""
    torch.manual_seed(0)
    net = PixelDiT(replace(config, "pixel_depth", 1), patch_checkpoint=checkpoint_function(policy)).bfloat16()
    x, rope = _image_and_rope(config)
    t, y = torch.rand(1), torch.zeros(1, dtype=torch.long)
    net.patch_pathway(x, t, y, rope)
    return held_by(lambda: net.patch_pathway(x, t, y, rope)[0])


def _image_and_rope(config: ModelConfig) -> tuple[torch.Tensor, Rope]:
    side = IMAGE_SIZE // config.patch_size
    rope = rope_table(side, side, config.width // config.heads, torch.device("cpu"))
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE).bfloat16(), rope


def main() -> None:
    """Print a line for each pathway and policy."""
    for pathway, count in (("pixel", pixel_pathway_bytes), ("patch", patch_pathway_bytes)):
        for policy in ("none", "full"):
            print(f"{pathway}_checkpointing {policy}: {count(pixeldit_xl(), policy) / 2**20:.1f} MiB an image")


if __name__ == "__main__":
    main()

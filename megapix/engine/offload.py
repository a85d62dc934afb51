"""Activations offloaded to host memory between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves


def offloaded(block: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of `block`, with what autograd saves in it copied to host memory, and back when it is needed.

    Weights stay where they are, and so do the block's other inputs, which all blocks share. A GPU's
    copies lie in pinned memory and are queued behind the work that made them: the host does not wait, but neither do
    they overlap with other work.
    """

    def run(*args: Any) -> Tensor:
        stay = [*block.parameters(), *(a for a in tree_leaves(args[1:]) if isinstance(a, Tensor))]
        with saved_tensors_hooks(_Packer(stay), _unpack):
            return forward(*args)

    return run


class InHostMemory:
    """A storage's copy, which is on the device again from the first to the last use of its saved views."""

    def __init__(self, storage: UntypedStorage) -> None:
        self.views = 0
        self._device, self._used = storage.device, 0
        self._back: UntypedStorage | None = None
        self.copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda).untyped_storage()
        self.copy.copy_(storage, non_blocking=True)

    def back(self) -> UntypedStorage:
        """The storage on the device. Call it once per view."""
        storage = self._back
        if storage is None:
            storage = torch.empty(self.copy.nbytes(), dtype=torch.uint8, device=self._device).untyped_storage()
            storage.copy_(self.copy, non_blocking=True)
        self._used = (self._used + 1) % self.views
        self._back = storage if self._used else None
        return storage


@dataclass(frozen=True)
class _View:
    memory: InHostMemory
    dtype: torch.dtype
    offset: int | torch.SymInt
    size: Size
    stride: tuple[int, ...]


class _Packer:
    """Moves each storage once, however many views of it are saved, and leaves those of `stay`."""

    def __init__(self, stay: list[Tensor]) -> None:
        self._stay = {t.untyped_storage().data_ptr() for t in stay}
        self._moved: dict[int, tuple[StorageWeakRef, InHostMemory]] = {}  # a key with a weak reference is not reused

    def __call__(self, saved: Tensor) -> Tensor | _View:
        storage = saved.untyped_storage()
        if storage.data_ptr() in self._stay:
            return saved
        key = storage._cdata
        if key not in self._moved:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._moved[key] = reference, InHostMemory(storage)
        memory = self._moved[key][1]
        memory.views += 1
        return _View(memory, saved.dtype, saved.storage_offset(), saved.size(), saved.stride())


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    storage = packed.memory.back()
    return torch.empty(0, dtype=packed.dtype, device=storage.device).set_(
        storage, packed.offset, packed.size, packed.stride
    )

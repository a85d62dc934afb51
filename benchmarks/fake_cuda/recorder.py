"""What a step asks of the GPU: kernels, copies between host and device, reads that wait for the device."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GENERATOR = torch.Generator
ROOT = Path(__file__).resolve().parent.parent.parent
NO_KERNEL = {
    "aten.detach.default",
    "aten.alias.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
    "aten.resize_.default",
    "aten.lift_fresh.default",
    "aten.set_.source_Storage_storage_offset",
    "aten.sym_size.int",
    "aten._reshape_alias.default",
    "aten._unsafe_view.default",
    "prim.device.default",
}
"""Operations that only allocate or look at a tensor in another way."""
READS = {
    "aten.is_nonzero.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten._unique2.default",
}
"""Operations whose result's value or shape the host needs: it waits for the device."""
OVERWRITES = ("aten.copy_", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_", "aten.random_")
"""Operations that do not read what they write into."""


@dataclass(frozen=True)
class Kernel:
    """An operation on the device."""

    name: str
    """Such as 'aten.mm.default'."""
    bytes: int
    """Read and written: each tensor once, expanded dimensions once, and what it changes in place twice."""
    flops: int
    """Of matmuls and attention; 0 for all else."""
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    """Of the inputs."""


@dataclass(frozen=True)
class Copy:
    """A copy between host and device, or a read of the device by the host."""

    name: str
    """'to device', 'to host', 'item', 'tolist', or another operation that reads."""
    blocking: bool
    """Whether the host waits."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    line: str
    """Who asked: 'megapix/diffusion/flow.py: x = ...', the innermost line of ours or of transformers."""


class Recorder(TorchDispatchMode):
    """Lists the kernels and copies of what runs within it, backward passes too; to be entered within `FakeTensorMode`.

    What the host computes has numbers, as in a real process. What it reads of the device is 0.

    Args:
        pinned: tensors of the host that lie in page-locked memory: from elsewhere a copy waits, whatever it asks for.
        alone: whether recorders around this one leave out what it lists.
    """

    _alone: ClassVar[Recorder | None] = None

    def __init__(self, pinned: Sequence[Tensor] = (), alone: bool = False) -> None:
        super().__init__()
        self._to_be_alone = alone
        self._pinned = {tensor.untyped_storage().data_ptr() for tensor in pinned}
        self.kernels: list[Kernel] = []
        self.copies: list[Copy] = []
        self._put_back = ExitStack()

    @property
    def waits(self) -> list[Copy]:
        """Copies and reads for which the host waits."""
        return [copy for copy in self.copies if copy.blocking]

    def __enter__(self) -> Recorder:
        self._put_back = ExitStack()
        self._put_back.enter_context(mock.patch.object(FakeTensor, "tolist", self._read_list(FakeTensor.tolist)))
        self._put_back.enter_context(mock.patch.object(torch, "Generator", _HostGenerator))
        if self._to_be_alone:
            self._put_back.enter_context(mock.patch.object(Recorder, "_alone", self))
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._put_back.close()

    def _read_list(self, plain: Any) -> Any:
        """`tolist` of a fake tensor: one read, however many numbers."""

        def tolist(tensor: Tensor) -> Any:
            if tensor.device.type != "cuda":
                return plain(tensor)
            self.copies.append(Copy("tolist", True, tuple(tensor.shape), tensor.dtype, _asked()))
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist()

        return tolist

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if Recorder._alone not in (None, self):
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _of_host(inputs, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        args, kwargs = tree_map(_fake, (args, kwargs))
        if name == "aten._local_scalar_dense.default" and inputs[0].device.type == "cuda":
            self.copies.append(Copy("item", True, tuple(inputs[0].shape), inputs[0].dtype, _asked()))
            return 0.0 if inputs[0].dtype.is_floating_point else 0
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in (*inputs, *outputs)}
        if "cuda" not in devices:
            return out
        if name in READS:
            self.copies.append(Copy(name, True, tuple(inputs[0].shape), inputs[0].dtype, _asked()))
        if name in ("aten._to_copy.default", "aten.copy_.default") and devices == {"cpu", "cuda"}:
            source = inputs[1] if name.startswith("aten.copy_") else inputs[0]
            free = kwargs.get("non_blocking", args[2] if name.startswith("aten.copy_") and len(args) > 2 else False)
            way = "to host" if source.device.type == "cuda" else "to device"
            if way == "to device" and not isinstance(source, FakeTensor):
                free = free and source.untyped_storage().data_ptr() in self._pinned
            self.copies.append(Copy(way, not free, tuple(source.shape), source.dtype, _asked()))
        elif not _no_kernel(func, name):
            self.kernels.append(_kernel(func, name, inputs, outputs))
        return out


class _HostGenerator(GENERATOR):
    """In place of a generator of the device, which draws no numbers: one of the host will do."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


def _fake(leaf: Any) -> Any:
    """A tensor of the host on its way to the device, where it has no numbers."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
        return leaf
    mode = detect_fake_mode()
    assert mode, "a recorder records under FakeTensorMode"
    return mode.from_tensor(leaf)


def _of_host(inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether it is a computation of the host, which has all its numbers."""
    device = torch.device(kwargs.get("device") or "cpu")
    return device.type == "cpu" and all(
        tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) for tensor in inputs
    )


def _no_kernel(func: Any, name: str) -> bool:
    """Whether it launches nothing: it allocates, or its result is a view."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or name in NO_KERNEL


def _kernel(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Kernel:
    seen = {id(tensor): tensor for tensor in (*inputs, *outputs)}
    moved = sum(map(stored, seen.values()))
    if not name.startswith(OVERWRITES):  # a result that was an input, too, is read and written
        moved += sum(stored(tensor) for tensor in outputs if any(tensor is given for given in inputs))
    shapes = [tuple(tuple(tensor.shape) for tensor in tensors) for tensors in (inputs, outputs)]
    return Kernel(name, moved, flops(name, *shapes), *shapes, tuple(tensor.dtype for tensor in inputs))


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor's different numbers: expanded dimensions count once."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def flops(name: str, inputs: Any, outputs: Any) -> int:
    """FLOPs of a matmul or of fused attention, from the shapes of its tensors in order; a multiply-add is two.

    Attention: two matmuls of L × S × h for each head; its backward has five (Dao et al., arXiv 2205.14135).
    """
    if name.startswith(("aten.mm.", "aten.bmm.")):
        a, b = inputs[:2]
        return 2 * math.prod(a) * b[-1]
    if name.startswith(("aten.addmm.", "aten.baddbmm.")):
        a, b = inputs[1:3]
        return 2 * math.prod(a) * b[-1]
    if "_scaled_dot_product" in name:
        q, k = inputs[1:3] if "backward" in name else inputs[:2]
        return (10 if "backward" in name else 4) * math.prod(q) * k[-2]
    return 0


def _asked() -> str:
    """The innermost line of megapix, or of transformers, on the stack."""
    frame: Any = sys._getframe(2)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT / "megapix")):
            return f"{Path(path).relative_to(ROOT).as_posix()}: {frame.f_code.co_name}"
        if "/transformers/" in path:
            return f"transformers/{path.split('/transformers/')[-1]}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"

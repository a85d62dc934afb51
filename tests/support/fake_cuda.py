"""GPUs that are not there: the CPU computes, and where each tensor lies is kept beside it.

Within `FakeCuda` a program sees GPUs. Copies between host and GPU are recorded, and so is what is asked of torch.cuda.
As on a machine with GPUs, tensors of two devices in one operation are an error, and so are NumPy's access to one on a
GPU, and NCCL's to one on the host. A copy from a GPU to pinned memory with non_blocking=True lands when the host waits,
and no sooner; until then there is NaN. So does `to("cpu", non_blocking=True)`, whose result torch pins.

What is unlike a GPU: the numbers of an operation are the CPU's. A tensor that autograd's engine or another thread has
made has no known place: it goes with any, and says that it lies on the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
NAMES = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
ROOT = Path(__file__).resolve().parent.parent.parent
OURS = str(ROOT / "megapix"), str(ROOT / "data_prep")
ANY_PLACES = {"__getitem__", "__setitem__", "__set__", "_has_compatible_shallow_copy_type", "set_"}
"""Functions that take tensors of several devices."""
DEVICE, IS_CUDA, IS_CPU = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
DEVICE_OF, COPY = UntypedStorage.device, UntypedStorage.copy_


class WrongPlace(AssertionError, RuntimeError):
    """What torch refuses where there are GPUs."""


@dataclass(frozen=True)
class Copy:
    """A copy between host and GPU that code of ours has asked for."""

    module: str
    """Such as 'saver'."""
    source: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool
    """Whether the host's side is page-locked."""
    non_blocking: bool


@dataclass(frozen=True)
class Properties:
    """What is asked of a GPU's properties."""

    name: str
    total_memory: int


class FakeCuda(TorchFunctionMode):
    """GPUs of these names, as a context.

    Args:
        put: sets an attribute of an object for as long as this lasts: `monkeypatch.setattr`, or `setattr`.

    Attributes:
        calls: in order each `Copy`, ("pinned", shape, dtype) for new pinned memory, and what was asked of torch.cuda:
            its name and arguments.
        free, total: bytes of memory of each GPU.
        peak: bytes that GPU 0 has held at once; each further one a GiB more.
    """

    def __init__(self, put: Callable[[Any, str, Any], None], names: Sequence[str] = NAMES) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.free, self.total, self.peak = [79 * 2**30 for _ in names], 80 * 2**30, 3 * 2**29
        self.current = 0
        self._time = 0.0
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._on_their_way: list[tuple[UntypedStorage, Callable[[], Any]]] = []
        for name, answer in {
            "set_device": self._set_device,
            "get_device_name": lambda device=None: names[self._index(device)],
            "mem_get_info": lambda device=None: (self.free[self._index(device)], self.total),
            "max_memory_allocated": lambda device=None: self.peak + self._index(device) * 2**30,
            "synchronize": self._wait,
        }.items():
            put(torch.cuda, name, self._told(name, answer))
        put(torch.cuda, "get_device_properties", lambda device=None: Properties(names[self._index(device)], self.total))
        put(torch.cuda, "is_available", lambda: bool(names))
        put(torch.cuda, "device_count", lambda: len(names))
        put(torch.cuda, "current_device", lambda: self.current)
        put(torch.cuda, "Event", lambda enable_timing=False: _Event(self, enable_timing))
        put(torch.accelerator, "is_available", lambda: bool(names))
        put(torch, "Generator", _generator())
        for name in ("from_numpy", "asarray", "frombuffer"):  # of these a mode is not told
            put(torch, name, self._on_host(getattr(torch, name)))
        put(torch, "empty", self._within(torch.empty))  # for hooks of autograd, which run without the mode
        put(torch.autograd, "_engine_run_backward", self._within(self._backward(torch.autograd._engine_run_backward)))
        put(torch.distributed, "all_reduce", self._reduced(torch.distributed.all_reduce))
        group = torch.optim.Optimizer._group_tensors_by_device_and_dtype  # C++, which is not told of a tensor's place
        put(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(self._grouped(group)))
        put(UntypedStorage, "device", property(self._device_of))
        put(UntypedStorage, "is_cuda", property(lambda storage: self._device_of(storage).type == "cuda"))
        put(UntypedStorage, "copy_", lambda target, *source, **how: self._copy_storage(target, *source, **how))

    def place(self, tensor: Tensor) -> torch.device | None:
        """Where a tensor lies; None if nobody knows."""
        return None if tensor.device.type == "meta" else self._place(tensor.untyped_storage())

    def pinned(self, tensor: Tensor) -> bool:
        """Whether it is page-locked."""
        return self._is_pinned(tensor.untyped_storage())

    @property
    def copies(self) -> list[Copy]:
        """The copies among the calls."""
        return [call for call in self.calls if isinstance(call, Copy)]

    # -----------------------------------------------------------------------------------------------------------------
    # torch.cuda, and what else is no function of tensors
    # -----------------------------------------------------------------------------------------------------------------

    def _told(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            return answer(*args)

        return call

    def _set_device(self, device: Any) -> None:
        self.current = self._index(device)

    def _index(self, device: Any) -> int:
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    def _wait(self, *_: Any) -> None:
        """What is on its way to the host lands."""
        while self._on_their_way:
            self._on_their_way.pop(0)[1]()

    def _in_order(self, source: UntypedStorage) -> None:
        """A stream makes its copies one after the other: what is copied from here has landed here."""
        if any(storage._cdata == source._cdata for storage, _ in self._on_their_way):
            self._wait()

    def _on_host(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor if self.place(tensor) else self._put(tensor, CPU)

        return made

    def _within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self in _get_current_function_mode_stack() else self:
                return function(*args, **kwargs)

        return run

    def _backward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            """A gradient lies where that lies which it is of; `args` ends in that, if it is asked for."""
            found = run(*args, **kwargs)
            for gradient, of in zip(found, args[4], strict=True) if found else ():
                if gradient is not None and self.place(gradient) is None:
                    self._put(gradient, self.place(of))
            return found

        return backward

    def _reduced(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group is None and self.place(tensor) == CPU:
                raise WrongPlace("No backend type associated with device type cpu")
            return reduce(tensor, *args, group=group, **kwargs)

        return all_reduce

    def _grouped(self, group: Callable[..., Any]) -> Callable[..., Any]:
        def grouped(lists: Any, with_indices: bool = False) -> Any:
            """By the place of a group's first tensor; no optimizer of ours has tensors in two."""
            found = group(lists, with_indices).items()
            return {
                (self.place(tensors[0][0]) or device, kind): (tensors, at) for (device, kind), (tensors, at) in found
            }

        return grouped

    # -----------------------------------------------------------------------------------------------------------------
    # Storages
    # -----------------------------------------------------------------------------------------------------------------

    def _place(self, storage: UntypedStorage) -> torch.device | None:
        found = self._places.get(storage._cdata)
        return found[1] if found and not found[0].expired() else None

    def _is_pinned(self, storage: UntypedStorage) -> bool:
        found = self._pinned.get(storage._cdata)
        return found is not None and not found.expired()

    def _device_of(self, storage: UntypedStorage) -> torch.device:
        real = DEVICE_OF.__get__(storage)
        return self._place(storage) or (real if real.type == "meta" else torch.device("cuda", self.current))

    def _copy_storage(self, target: UntypedStorage, source: UntypedStorage, non_blocking: bool = False) -> Any:
        self._in_order(source)
        self._moved((source.nbytes(),), torch.uint8, source, target, non_blocking)
        here, there = self._place(source), self._place(target)
        if there == CPU != here and non_blocking and self._is_pinned(target):
            kept = COPY(UntypedStorage(source.nbytes()), source)
            self._on_their_way.append((target, lambda: COPY(target, kept)))
            return target
        return COPY(target, source)

    def _put(self, tensor: Tensor, place: torch.device | None, pin: bool = False) -> Tensor:
        """Keep where a tensor lies."""
        if place is None or place.type == "meta" or tensor.device.type == "meta":
            return tensor
        storage = tensor.untyped_storage()
        self._places[storage._cdata] = StorageWeakRef(storage), self._full(place)
        self._pinned.pop(storage._cdata, None)
        if pin:
            assert place == CPU, "only memory of the host can be pinned"
            self._pinned[storage._cdata] = StorageWeakRef(storage)
            self.calls.append(("pinned", tuple(tensor.shape), tensor.dtype))
        return tensor

    def _full(self, device: Any) -> torch.device:
        """A device with its number."""
        device = torch.device(device)
        return torch.device("cuda", self._index(device)) if device.type == "cuda" else device

    # -----------------------------------------------------------------------------------------------------------------
    # Tensors
    # -----------------------------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function in (DEVICE, IS_CUDA, IS_CPU):
            return self._asked(function, args[0])
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self._to(name, *args, **kwargs)
        if name == "copy_":
            return self._copy_(*args, **kwargs)
        if name == "is_pinned":
            return self.pinned(args[0])
        if name == "pin_memory":
            return args[0] if self.pinned(args[0]) else self._put(args[0].clone(), self.place(args[0]), pin=True)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = [self.place(t) for t in tensors]
        if name in ("numpy", "__array__") and places[0] not in (CPU, None):
            raise WrongPlace(f"can't convert {places[0]} device type tensor to numpy")
        if name not in ANY_PLACES:
            _check(name, tensors, places, kwargs.get("generator"))
        device, pin = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if device is not None:
            kwargs["device"] = _played(device)
        result = function(*args, **kwargs)
        known = [place for place in places if place]
        where = next((place for place in known if place != CPU), known[0] if known else None) if tensors else CPU
        if device is not None:
            where = self._full(device)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and self.place(made) is None:
                self._put(made, where, bool(pin))
        return result

    def _asked(self, function: Any, tensor: Tensor) -> Any:
        place = tensor.device if tensor.device.type == "meta" else self._device_of(tensor.untyped_storage())
        return place if function == DEVICE else place.type == ("cuda" if function == IS_CUDA else "cpu")

    def _to(self, name: str, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (self._asked(DEVICE, args[0]), args[0].dtype, *args[1:])
        args = args if name == "to" else (name, *args)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        here = self.place(tensor)
        there = None if device is None else self._full(device)
        move = there is not None and there != here and tensor.device.type != "meta"
        if move:
            self._in_order(tensor.untyped_storage())
        more = {} if layout is None else {"memory_format": layout}
        result = tensor.to(dtype=dtype or tensor.dtype, copy=copy or move, **more)
        if not move:
            return result if self.place(result) else self._put(result, here)
        self._put(result, there, pin=there == CPU and non_blocking)
        self._moved(tuple(tensor.shape), tensor.dtype, tensor.untyped_storage(), result.untyped_storage(), non_blocking)
        return self._later(result, result.detach().clone()) if there == CPU and non_blocking else result

    def _copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        here, there = self.place(source), self.place(target)
        if here and there and here != there:
            self._in_order(source.untyped_storage())
            ends = source.untyped_storage(), target.untyped_storage()
            self._moved(tuple(source.shape), source.dtype, *ends, non_blocking)
            if there == CPU and non_blocking and self.pinned(target):
                return self._later(target, source.detach().clone())
        return target.copy_(source)

    def _later(self, target: Tensor, numbers: Tensor) -> Tensor:
        """Let them arrive when the host waits."""
        data = target.detach()
        self._on_their_way.append((target.untyped_storage(), lambda: data.copy_(numbers)))
        data.fill_(float("nan") if data.is_floating_point() else 0)
        return target

    def _moved(
        self, shape: Any, dtype: torch.dtype, source: UntypedStorage, target: UntypedStorage, non_blocking: bool
    ) -> None:
        """Record a copy, if code of ours makes it."""
        frame: Any = sys._getframe(2)
        while frame and (frame.f_code.co_filename == __file__ or "site-packages" in frame.f_code.co_filename):
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith(OURS):
            here, there = self._place(source), self._place(target)
            pinned = self._is_pinned(target if there == CPU else source)
            module = Path(frame.f_code.co_filename).stem
            self.calls.append(Copy(module, str(here), str(there), tuple(shape), dtype, pinned, non_blocking))


class _Event:
    """A mark in the GPU's time, which advances by a second with each of them."""

    def __init__(self, cuda: FakeCuda, timing: bool) -> None:
        self._cuda, self._timing, self._time = cuda, timing, 0.0

    def record(self) -> None:
        """Now."""
        self._cuda._time += 1000.0
        self._time = self._cuda._time
        self._cuda.calls.append(("record",))

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds until another one; both must have happened."""
        assert self._timing, "made without enable_timing"
        recorded = len(self._cuda.calls) - 1 - self._cuda.calls[::-1].index(("record",))
        assert ("synchronize",) in self._cuda.calls[recorded:], "the GPU has not got there yet"
        return end._time - self._time


def _check(name: str, tensors: list[Tensor], places: list[torch.device | None], generator: Any) -> None:
    """Numbers of the host may meet tensors of a GPU; nothing else may meet what lies elsewhere."""
    found = {p for t, p in zip(tensors, places, strict=True) if p and (t.dim() or p != CPU)}
    if len(found) > 1:
        raise WrongPlace(f"{name}: Expected all tensors on the same device, but found {sorted(map(str, found))}")
    if generator is not None and {p.type for p in found} - {generator.place.type}:
        raise WrongPlace(f"{name}: Expected a generator on {found}, but found one on {generator.place}")


def _generator() -> type[torch.Generator]:
    class Generator(torch.Generator):
        place: torch.device

        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, _played(device))  # type: ignore[call-arg]
            made.place = torch.device(device)
            return made

    return Generator


def _played(device: Any) -> torch.device:
    """The device that plays it."""
    real = torch.device(device)
    return CPU if real.type == "cuda" else real

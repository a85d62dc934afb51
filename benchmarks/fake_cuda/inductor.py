"""torch.compile for a GPU that is not there: its real passes and code, counted and never run.

A compiled function goes through Dynamo, AOT autograd with its partitioner, and Inductor down to the Triton source of
each kernel. The graphs themselves run in place of that code, so that forward and backward follow each other on fake
tensors, and what backward keeps is what the partitioner chose.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._functorch.partitioners
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.fx_passes.misc_patterns
import torch._inductor.fx_passes.pad_mm
import torch._inductor.runtime.triton_helpers
import torch.utils._triton
import triton
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

from benchmarks.fake_cuda.recorder import Kernel, Recorder
from megapix.engine.compiled import READS


@dataclass(frozen=True)
class Launch:
    """A call of one of Inductor's Triton kernels."""

    name: str
    bytes: int
    """Read and written, as Inductor counts it."""
    written: int
    """Of these, what it writes."""


@dataclass(frozen=True)
class Graph:
    """One forward or backward pass of a compiled function."""

    source: str
    """Inductor's module: Triton's kernels, and the code that calls them."""
    backward: bool
    launches: tuple[Launch, ...]
    extern: tuple[str, ...]
    """Kernels of others that it calls: matmuls, attention, our own operations."""
    kernels: list[Kernel] = field(default_factory=list)
    """Once it has run, the graph's operations one by one, uncompiled: matmuls and attention have FLOPs."""


def pretend(capability: int = 90) -> None:
    """For the rest of this process let torch.compile and Triton find a GPU of this compute capability (90: H100)."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20,
        gcnArchName="",
        clock_rate=1980000,
    )
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "current_stream": stream,
        "is_current_stream_capturing": False,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.device = torch.cuda._DeviceGuard = lambda *_: nullcontext()  # type: ignore[assignment, misc]
    torch.version.cuda = "12.9"  # type: ignore[assignment]
    found = torch._dynamo.device_interface.CudaInterface
    interface = {**answers, "get_raw_stream": 0, "get_compute_capability": capability}
    for name in (
        "current_device",
        "device_count",
        "get_device_properties",
        "synchronize",
        "is_bf16_supported",
        "get_raw_stream",
        "get_compute_capability",
        "is_available",
    ):
        setattr(found, name, staticmethod(_always(interface[name])))
    found.device = lambda *_: nullcontext()  # type: ignore[assignment, misc]
    for name in ("get_device_properties", "current_device"):
        setattr(found.Worker, name, staticmethod(_always(interface[name])))
    settings: Any = torch._inductor.config
    torch._functorch.config.force_non_lazy_backward_lowering = True  # as `engine/compiled.py`
    settings.profile_bandwidth, settings.compile_threads = True, 1  # Inductor's own count of bytes stands in the source
    settings.fx_graph_cache = settings.shape_padding = False
    settings.realize_reads_threshold = READS
    triton.runtime.driver.set_active(_driver(capability))
    for module in (torch.utils._triton, torch._inductor.codecache):
        for name, answer in (("triton_hash_with_backend", "none"), ("triton_backend", None)):
            if hasattr(module, name):
                setattr(module, name, _always(answer))
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = _always(None)
    # Patterns that are traced on tensors of the device: attention written out, random indices, matmuls to be padded.
    for module, name in (
        (torch._inductor.fx_passes.fuse_attention, "_sfdp_init"),
        (torch._inductor.fx_passes.misc_patterns, "_misc_patterns_init"),
        (torch._inductor.fx_passes.pad_mm, "_pad_mm_init"),
    ):
        setattr(module, name, _always(None))
    folder: Any = UniformValueConstantFolder
    folder._deduce_value = _on_host(folder._deduce_value)
    # Recomputing attention would save CUDA's generator, of which without dropout nothing is drawn.
    torch._functorch.partitioners.functionalize_rng_ops = lambda joint, forward, backward, symbols: (forward, backward)


def _on_host(deduce: Callable[..., Any]) -> Callable[..., Any]:
    """Constant folding, which computes its constants on the device, computes them on the host."""

    def deduce_value(folder: Any, node: Any) -> Any:
        given = node.kwargs
        if "device" in given:
            node.kwargs = {**given, "device": torch.device("cpu")}
        try:
            return deduce(folder, node)
        finally:
            node.kwargs = given

    return deduce_value


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _driver(capability: int) -> Any:
    """Triton's, which names the target and has no device."""
    return types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
    )


def compiled(function: Callable[..., Any], graphs: list[Graph]) -> Callable[..., Any]:
    """`torch.compile(function, fullgraph=True)` for the GPU of `pretend`; each graph is added to `graphs` when it is
    compiled: both at the first call. Forward comes first."""

    def inner(graph: Any, inputs: Any, **how: Any) -> Any:
        sources: list[str] = []
        with mock.patch.object(GraphLowering, "compile_to_module", _not_loaded(sources)):
            compile_fx_inner(graph, inputs, **how)
        read = _read(sources[-1], bool(how.get("is_backward")))
        graphs.append(read)
        graphs.sort(key=lambda graph: graph.backward)

        def run(*arguments: Any) -> Any:
            with Recorder(alone=True) as recorder:
                out = graph.forward(*arguments)
            read.kernels[:] = recorder.kernels
            return out

        return make_boxed_func(run)

    return torch.compile(function, fullgraph=True, backend=lambda graph, inputs: compile_fx(graph, inputs, inner))


def _not_loaded(sources: list[str]) -> Callable[[Any], Any]:
    """In place of `GraphLowering.compile_to_module`: keeps the source, which only a GPU could run."""

    def compile_to_module(lowering: Any) -> Any:
        wrapper, _ = lowering.codegen()
        sources.append(wrapper.value)

        def call(arguments: Any) -> Any:
            raise RuntimeError("this code is not meant to run")

        return types.SimpleNamespace(__file__="/dev/null", call=call)

    return compile_to_module


def _read(source: str, backward: bool) -> Graph:
    """What a module of Inductor's launches: the calls in its code, with the bytes that it notes for each kernel."""
    moved, roles = {}, {}
    for text in source.split("async_compile.triton(")[1:]:
        name = text.split("'")[1]
        found = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", text)
        moved[name] = round(float(found[1]) * 1e9) if found else 0
        roles[name] = re.findall(r"'(\w+)': '", re.search(r"'signature': \{(.*?)\}", text)[1])  # type: ignore[index]
    body = source.split("def call(")[-1]
    sizes = _sizes(body)
    launches = []
    for name, given in re.findall(r"^\s+(triton_\w+)\.run\((.*)\)", body, re.M):
        arguments = re.findall(r"reinterpret_tensor\((?:[^()]|\([^()]*\))*\)|[^,\s][^,]*", given)
        outputs = [a for a, role in zip(arguments, roles[name], strict=False) if "out_ptr" in role]
        launches.append(Launch(name, moved[name], sum(sizes.get(output, 0) for output in outputs)))
    # Sums that Inductor leaves to torch: the end of a reduction in two directions at once.
    launches += [Launch("aten.sum", 0, 0)] * len(re.findall(r"\.sum\(dim=0\)", body))
    extern = tuple(re.findall(r"(extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.\w+)\(", body))
    return Graph(source, backward, tuple(launches), extern)


def _sizes(body: str) -> dict[str, int]:
    """Bytes of each buffer that the code allocates, takes a part of, or writes into again under another name."""
    widths: dict[str, int] = {}
    sizes: dict[str, int] = {}
    shaped = r"(?:empty_strided_cuda\(|reinterpret_tensor\((\w+), )\(([\d, ]*)\), \([\d, ]*\)(?:, torch\.(\w+))?"
    for name, of, shape, dtype, other in re.findall(rf"(\w+) = (?:{shaped}|(\w+); del \w+  # reuse)", body):
        widths[name] = getattr(torch, dtype).itemsize if dtype else widths.get(of or other, 2)
        if other:
            sizes[name] = sizes.get(other, 0)
        else:
            sizes[name] = math.prod(int(n) for n in shape.split(",") if n.strip()) * widths[name]
    # What matmuls' and attention's own operations return has its size stated below.
    stated = re.findall(r"assert_size_stride\((\w+), \(([\d, ]*)\), ", body)
    for name, shape in stated:
        sizes.setdefault(name, math.prod(int(n) for n in shape.split(",") if n.strip()) * 2)
    return sizes

"""Which kernels a step really ran, by the names that torch's profiler has seen."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined] # of torch._C, as its documentation has it
from torch.profiler import ProfilerActivity, supported_activities

KINDS = (
    ("copies", r"^Mem(cpy|set)"),
    ("collectives", r"nccl"),
    ("triton", r"^triton_"),  # Inductor's: before attention, since their names list the operators around them
    ("fused", r"^(norm_modulate|tail)_"),
    ("attention", r"sdpa|flash_(fwd|bwd)|FlashAttn|fmha"),
    ("matmuls", r"gemm|gemv|nvjet|cublas|cutlass|splitKreduce|wgmma"),
)
"""Kind of kernel -> what such names have in common, the first that fits; all others are element-wise work and sums."""
OTHERS = "others"
FORWARD = (
    ("cudnn", r"cudnn.*fprop"),
    ("flash", r"flash_fwd|FlashAttnFwd"),
    ("efficient", r"fmha_cutlassF"),
)
"""Attention's forward kernels on a GPU: cuDNN's, FlashAttention (Dao-AILab's, within torch), and CUTLASS's."""
OPERATORS = {
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash for CPUs",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_attention_math": "math",
}
"""torch's operators of attention, as `F.scaled_dot_product_attention` chooses among them."""
REGION = "Torch-Compiled Region: "
"""What torch.compile calls a graph that it runs; number of its code and of its recompilation follow."""
QUIET = "6"
"""Level at which the profiler's library no longer writes a line at its start and its end."""


@dataclass(frozen=True)
class Kernels:
    """What ran in one step of this rank."""

    attention: dict[str, int]
    """Attention's forward passes, recomputed ones too, by kernel. 'math' is matmuls and softmax, with 0 passes where
    they went into a compiled graph and cannot be told from other work."""
    graphs: int
    """Different graphs of torch.compile in the forward pass; 0 if nothing was compiled."""
    fused: int
    """Calls of the pixel pathway's own Triton kernels."""
    launches: dict[str, int]
    """Kernels on a GPU by kind; empty on a CPU, and where the driver lets no profiler see them."""

    def numbers(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def text(self) -> str:
        """Such as 'attention flash x 30; 5 compiled graphs; plain pixel kernels; 1,330 launches: 402 matmuls, …'."""
        attention = ", ".join(name + f" x {passes}" * (passes > 0) for name, passes in self.attention.items())
        graphs = f"{self.graphs} compiled graph{'s' * (self.graphs != 1)}" if self.graphs else "not compiled"
        pixels = f"fused pixel kernels x {self.fused}" if self.fused else "plain pixel kernels"
        text = f"attention {attention}; {graphs}; {pixels}"
        if self.launches:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.launches.items())
            text += f"; {sum(self.launches.values()):,} launches: {kinds}"
        return text


def traced(step: Callable[[], object]) -> Kernels:
    """Take a step under torch's profiler, and say what it ran. The step is slower, so it is not for timing."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    gpu = torch.cuda.is_available() and ProfilerActivity.CUDA in supported_activities()  # type: ignore[no-untyped-call]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    operators, kernels = list[str](), list[str]()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            operators.append(event.name)
        elif not event.is_user_annotation:  # a range of the host's, drawn on the GPU's time line too
            kernels.append(event.name)
    return read(operators, kernels)


def read(operators: Iterable[str], kernels: Iterable[str]) -> Kernels:
    """What names say.

    Args:
        operators: of the host: torch's operators, and ranges such as REGION's.
        kernels: of a GPU.
    """
    called, launched = Counter(operators), Counter(kernels)
    graphs = {name for name in called if name.startswith(REGION)}
    launches: Counter[str] = Counter()
    for name, count in launched.items():
        launches[kind(name)] += count
    attention: Counter[str] = Counter()
    for name, count in launched.items():
        if (which := forward(name)) is not None:
            attention[which] += count
    for name, which in OPERATORS.items():
        if called[name] and (which == "math" or not launched):
            attention[which] += called[name]
    fused = sum(count for name, count in called.items() if name.startswith("megapix::"))
    return Kernels(dict(attention) or {"math": 0}, len(graphs), fused, dict(launches.most_common()))


def kind(kernel: str) -> str:
    """The kind of a GPU's kernel."""
    return next((name for name, pattern in KINDS if re.search(pattern, kernel)), OTHERS)


def forward(kernel: str) -> str | None:
    """Which attention a GPU's kernel is the forward pass of; None for all others."""
    if kind(kernel) != "attention":
        return None
    return next((name for name, pattern in FORWARD if re.search(pattern, kernel)), None)

"""Inductor's Triton kernels as machine code of a GPU: registers, and what does not fit them.

Triton's wheel has NVIDIA's assembler and its disassembler, so this needs neither a GPU nor CUDA.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.fake_cuda.inductor import Graph

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What a thread of a kernel takes."""

    name: str
    capability: int
    registers: int
    spilled: int
    """Bytes of registers that overflow into its stack."""


def compile_for(graph: Graph, capability: int) -> list[Resources]:
    """Each kernel of a graph for a GPU of this compute capability (90: H100), in its first configuration.

    Inductor times several configurations of a kernel where there is a GPU, and leaves out those that spill.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", graph.source, re.S):
            path = Path(folder, f"{name}.py")
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(Resources(name, capability, *_resources(_cubin(getattr(module, name), capability))))
    return found


def _cubin(kernel: Any, capability: int) -> bytes:
    """Machine code of one of Inductor's kernels (`triton_heuristics.CachingAutotuner`)."""
    meta, chosen = kernel.triton_meta, kernel.configs[0]
    names, signature = kernel.fn.arg_names, dict(meta["signature"])
    constants = {**meta["constants"], **chosen.kwargs}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel.fn, {name: signature[name] for name in names}, values, meta["configs"][0])
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def _resources(code: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that overflow into its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])

"""Compile the pixel kernels for GPUs, on a machine without one, and print what a program of each takes.

usage: python -m tests.programs.compiled_kernels

A line for each kernel: name, chunks of the modulation, GPU, number format, registers a thread, bytes of registers that
overflow a thread's, bytes of shared memory a program.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megapix.model import fused_block, pixel_kernels
from megapix.model.layers import EPS

DTYPES = {"bf16": 2, "fp32": 4}
KERNELS = {
    pixel_kernels.norm_modulate_forward: ((6,), dict.fromkeys(DTYPES, fused_block.NORM_BLOCK)),
    pixel_kernels.norm_modulate_backward: ((6,), dict.fromkeys(DTYPES, fused_block.NORM_BLOCK)),
    pixel_kernels.tail_forward: ((6, 4), dict.fromkeys(DTYPES, fused_block.TAIL_BLOCK)),
    pixel_kernels.tail_backward: (
        (6, 4),
        {name: fused_block.TAIL_BACKWARD_BLOCK[size] for name, size in DTYPES.items()},
    ),
}
"""Kernel -> chunks of the modulation, rows of a block for each number format."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel: Any, capability: int, dtype: str, constants: dict[str, Any]) -> Any:
    """The kernel for pointers to `dtype` (to fp32 for the sums) that are aligned to 16 bytes, as torch's are."""
    names = kernel.arg_names
    types = {name: "*fp32" if name == "sums" else f"*{dtype}" for name in names} | {"rows": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused_block.COMPILED)


def resources(code: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that overflow into its stack, out of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def main() -> None:
    for kernel, (modulations, blocks) in KERNELS.items():
        for capability, dtype, chunks in itertools.product((80, 90), DTYPES, modulations):
            constants = {"EPS": EPS, "D": 16, "BLOCK": blocks[dtype], "CHUNKS": chunks}
            taken = {name: value for name, value in constants.items() if name in kernel.arg_names}
            result = compiled(kernel, capability, dtype, taken)
            registers, overflow = resources(result.asm["cubin"])
            print(kernel.__name__, chunks, f"sm_{capability}", dtype, registers, overflow, result.metadata.shared)


if __name__ == "__main__":
    main()

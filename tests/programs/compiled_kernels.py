"""Compile the pixel kernels for GPUs, on a machine without one, and print what a program of each takes.

usage: python -m tests.programs.compiled_kernels

A line for each kernel: name, chunks of the modulation, GPU, number format, registers a thread, bytes of registers that
overflow a thread's, bytes of shared memory a program.
"""

from __future__ import annotations

import itertools

from benchmarks import kernel_count


def main() -> None:
    for dtype, capability in itertools.product(kernel_count.SIZES, (80, 90)):
        for subject in kernel_count.subjects(dtype):
            result = kernel_count.compiled(subject, capability, dtype)
            taken = *kernel_count.resources(result.asm["cubin"]), result.metadata.shared
            print(subject.kernel.__name__, subject.chunks, f"sm_{capability}", dtype, *taken)


if __name__ == "__main__":
    main()

"""What the pixel kernels take on a GPU, counted from their machine code on a machine without one.

    python -m benchmarks.kernel_count                      sm_80, sm_90, sm_100, a Markdown table
    python -m benchmarks.kernel_count --sm 90 120 --dtype fp32

Triton compiles each kernel as a run would; its own copies of NVIDIA's tools disassemble it. Times are of one PiT block
of 32 images of 256 x 256 pixels, 2,097,152 rows:

    issue     warp instructions, one a clock for each of a multiprocessor's four schedulers
    pipes     the busiest unit among those that take longer than that for an instruction (PIPES)
    traffic   each input read and each output written once, at 80 % of the memory's bandwidth; in `counted` also the
              programs' sums of weight gradients, written and read
    counted   the largest of these, as if they overlapped wholly

All kernels are counted on an H100's clocks and bandwidth, whatever they were compiled for, so that rows compare; the
last column is counted / traffic with the numbers of the card that they were compiled for. Bank conflicts of shared
memory, latencies that too few warps do not hide, and caches are not counted: these are bounds, no measured times.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megapix.model import fused_block, pixel_kernels
from megapix.model.layers import EPS

ROWS = 32 * 256 * 256
WIDTH = 16
SIZES = {"bf16": 2, "fp32": 4}
REACHED = 0.8
"""Share of a memory's bandwidth that a kernel reaches at best."""
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Card:
    """Multiprocessors, their clock in Hz under load, bytes a second, and clocks a quarter of a multiprocessor takes for
    a warp's fp32 instruction (NVIDIA's data sheets; CUDA programming guide, arithmetic throughput)."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    fp32: int = 1


CARDS = {
    80: Card("A100", 108, 1.41e9, 2.039e12, fp32=2),
    90: Card("H100", 132, 1.755e9, 3.35e12),
    100: Card("B200", 148, 1.965e9, 8.0e12),
    120: Card("RTX 5090", 170, 2.407e9, 1.792e12),
}
H100 = CARDS[90]


@dataclass(frozen=True)
class Subject:
    """A kernel as `fused_block.py` launches it: rows of a block, options of the compiler, programs at most (None: one
    for each block), numbers of a row that it reads and writes, columns of its sums."""

    kernel: Any
    chunks: int
    block: int
    options: dict[str, Any]
    programs: int | None
    numbers: int
    sums: int = 0


def subjects(dtype: str) -> list[Subject]:
    """Every kernel of rows, the tail's for both kinds of modulation. 'post' has no use for shift2 in its backward."""
    size, norm, tail = SIZES[dtype], fused_block.NORM_BLOCK, fused_block.TAIL_BLOCK
    most, backward = fused_block.PROGRAMS, fused_block.TAIL_BACKWARD_BLOCK[size]
    forward_options, options = fused_block.TAIL_COMPILED, fused_block.TAIL_BACKWARD_COMPILED[size]
    weights = 8 * WIDTH * WIDTH + 6 * WIDTH
    k = pixel_kernels
    return [
        Subject(k.norm_modulate_forward, 6, norm, fused_block.COMPILED, None, 4 * WIDTH),
        Subject(k.norm_modulate_backward, 6, norm, fused_block.COMPILED, most, 7 * WIDTH, WIDTH),
        Subject(k.tail_forward, 6, tail, forward_options, None, 7 * WIDTH),
        Subject(k.tail_forward, 4, tail, forward_options, None, 7 * WIDTH),
        Subject(k.tail_backward, 6, backward, options, most, 13 * WIDTH, weights),
        Subject(k.tail_backward, 4, backward, options, most, 12 * WIDTH, weights),
    ]


def compiled(subject: Subject, capability: int, dtype: str) -> Any:
    """The kernel for pointers to `dtype` (to fp32 for the sums) that are aligned to 16 bytes, as torch's are."""
    names = subject.kernel.arg_names
    constants = {"EPS": EPS, "D": WIDTH, "BLOCK": subject.block, "CHUNKS": subject.chunks}
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "*fp32" if name == "sums" else f"*{dtype}" for name in names} | {"rows": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(subject.kernel, types, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=subject.options)


def disassembled(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, what, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that overflow into its stack."""
    report = disassembled(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


# ---------------------------------------------------------------------------------------------------------------------
# Machine code
# ---------------------------------------------------------------------------------------------------------------------

Code = list[tuple[int, str]]
"""Address and text of each instruction, its predicate left out."""


def instructions(sass: str) -> Code:
    """The instructions of a listing by `cuobjdump -sass`, up to the endless loop that fills it up."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", sass)
    code = [(int(address, 16), text) for address, text in found]
    return [(at, text) for at, text in code if text != "NOP" and _target(text) != at]


def _target(text: str) -> int | None:
    """Where a branch goes."""
    found = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def loop(code: Code) -> Code:
    """From the target of the longest backward branch to that branch, if results are stored there; else nothing."""
    bodies = [
        [(at, text) for at, text in code if start <= at <= end]
        for end, branch in code
        if (start := _target(branch)) is not None and start < end
    ]
    bodies = [body for body in bodies if any(text.startswith("STG") for _, text in body)]
    return max(bodies, key=len, default=[])


FP32 = ("FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HMUL2", "HADD2")
INTEGER = (
    "LOP3",
    "SHF",
    "PRMT",
    "IADD3",
    "LEA",
    "SEL",
    "FSEL",
    "ISETP",
    "FSETP",
    "PLOP3",
    "F2FP",
    "FMNMX",
    "IABS",
    "MOV",
)
SPECIAL = ("MUFU", "F2F", "I2F", "F2I")
MEMORY = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG", "LDL", "STL", "SHFL", "ATOMS")
PIPES = ("issue", "fp32", "integer", "special", "tensor", "shared memory")


def clocks(text: str, card: Card) -> dict[str, int]:
    """Clocks for which a warp's instruction keeps a quarter of a multiprocessor from issuing, and from its pipes.

    Integers and logic: 64 lanes of a multiprocessor; special functions and conversions: 16; products on tensor cores:
    an A100's 256 multiplications of a quarter, which `mma.sync` at least reaches on later cards. Shared memory and L1
    serve all four quarters with 128 bytes a clock. (CUDA programming guide; A100 white paper.)
    """
    name, *parts = text.split()[0].split(".")
    taken = {"issue": 1}
    if name.rstrip("2") in FP32 or name in FP32:
        taken["fp32"] = card.fp32 * (2 if name in ("FADD2", "FMUL2", "FFMA2") else 1)
    if name in INTEGER:
        taken["integer"] = 2
    if name in SPECIAL:
        taken["special"] = 8
    if name == "HMMA":
        taken["tensor"] = 8 if "16816" in parts else 4
    if name in MEMORY:
        lines = 4 if "128" in parts or "4" in parts else 2 if "64" in parts or "2" in parts else 1
        taken["shared memory"] = 4 * lines
    return taken


def total(code: Code, card: Card) -> Counter[str]:
    """Clocks of a quarter by pipe, for one warp that runs through `code` once."""
    taken: Counter[str] = Counter()
    for _, text in code:
        taken.update(clocks(text, card))
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What one kernel takes: times in milliseconds, `pipes` by name, `ratio` counted / traffic; `own` that ratio on the
    card that it was compiled for; `instructions` of all warps for a block of rows, `barriers` met by each."""

    kernel: str
    capability: int
    registers: int
    spilled: int
    instructions: int
    barriers: int
    pipes: dict[str, float]
    traffic: float
    counted: float
    own: float

    @property
    def ratio(self) -> float:
        return self.counted / self.traffic

    @property
    def binds(self) -> str:
        """What takes longest."""
        pipe = max(self.pipes, key=self.pipes.__getitem__)
        return pipe if self.pipes[pipe] >= self.counted else "traffic"


def _times(subject: Subject, code: Code, dtype: str, card: Card) -> tuple[dict[str, float], float, float]:
    """Milliseconds by pipe, of the traffic that has to be, and of the larger of pipes and all traffic."""
    blocks, warps = -(-ROWS // subject.block), subject.options["num_warps"]
    programs = min(blocks, subject.programs or blocks)
    body = loop(code)
    for_block, once = total(body, card), total(code, card)
    once.subtract(for_block)
    rounds = blocks if body else 0
    speed = card.multiprocessors * 4 * card.clock / 1e3
    pipes = {name: warps * (for_block[name] * rounds + once[name] * programs) / speed for name in PIPES}
    rate = card.bandwidth * REACHED / 1e3
    traffic = ROWS * subject.numbers * SIZES[dtype] / rate
    sums = 2 * programs * subject.sums * 4 / rate
    return pipes, traffic, max(*pipes.values(), traffic + sums)


@cache
def counted(index: int, capability: int, dtype: str = "bf16") -> Counted:
    """Of `subjects(dtype)[index]`, compiled for sm_<capability>."""
    subject = subjects(dtype)[index]
    cubin = compiled(subject, capability, dtype).asm["cubin"]
    code = instructions(disassembled(cubin, "-sass"))
    pipes, traffic, most = _times(subject, code, dtype, H100)
    _, own_traffic, own_most = _times(subject, code, dtype, CARDS[capability])
    body = loop(code) or code
    return Counted(
        f"{subject.kernel.__name__}, {'pre' if subject.chunks == 6 else 'post'}",
        capability,
        *resources(cubin),
        len(body) * subject.options["num_warps"],
        sum(text.startswith("BAR") for _, text in body),
        pipes,
        traffic,
        most,
        own_most / own_traffic,
    )


def table(capabilities: list[int], dtype: str) -> str:
    heads = [
        "kernel",
        "card",
        "registers",
        "spilled bytes",
        "rows: instructions of a block",
        "barriers",
        *(f"{name}, ms" for name in PIPES),
        "traffic, ms",
        "counted, ms",
        "binds",
        "counted / traffic",
        "by its own card",
    ]
    rows = [heads, ["---"] * len(heads)]
    for index, subject in enumerate(subjects(dtype)):
        for capability in capabilities:
            c = counted(index, capability, dtype)
            cells = [c.kernel, f"sm_{capability} {CARDS[capability].name}", c.registers, c.spilled]
            cells += [f"{subject.block}: {c.instructions:,}", c.barriers, *(f"{c.pipes[name]:.3f}" for name in PIPES)]
            cells += [f"{c.traffic:.3f}", f"{c.counted:.3f}", c.binds, f"{c.ratio:.2f}", f"{c.own:.2f}"]
            rows.append([str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100], choices=sorted(CARDS))
    parser.add_argument("--dtype", choices=sorted(SIZES), default="bf16")
    arguments = parser.parse_args()
    print(table(arguments.sm, arguments.dtype))


if __name__ == "__main__":
    main()

"""Options of `megapix plan`, and everything that its predictions assume, in one place."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

from megapix.config import IMAGENET_IMAGES
from megapix.costs.flops import DATA_SHEETS, known_gpu
from megapix.errors import InputError, one_of

UNITS = {"GB": 10**9, "TB": 10**12, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "MiB": 2**20}

FP32_SHARE = 0.07
"""fp32's peak as a share of bf16's on tensor cores (67 of 989 TFLOP/s, the H100's data sheet)."""


@dataclass(frozen=True)
class Assumptions:
    """What a prediction assumes of the machines. Bandwidths are in GB/s, 10^9 bytes per second, per GPU."""

    compute_share: float = 0.68
    """Share of the peak that the matmuls of linear layers reach."""
    attention_share: float = 0.2
    """Share of the peak that attention's kernels reach, with their softmax (200 TFLOP/s of an H100)."""
    memory: float = 0.0
    """Bandwidth of the GPU's memory; 0 takes the data sheet's."""
    memory_share: float = 0.8
    """Share of it that element-wise work reaches."""
    sum_share: float = 0.6
    """Share of it that sums over many rows reach."""
    launch: float = 2.0
    """Microseconds that a kernel takes at least."""
    link: float = 0.0
    """Bandwidth between the GPUs of a node in one direction; 0 takes the data sheet's."""
    network: float = 25.0
    """Bandwidth between nodes in one direction, per GPU (25 is one network card of 200 Gbit/s per GPU)."""
    wire_share: float = 0.7
    """Share of `link` and `network` that a collective reaches."""
    link_latency: float = 5.0
    """Microseconds per hop within a node."""
    network_latency: float = 15.0
    """Microseconds per hop between nodes."""
    optimizer_passes: float = 0.0
    """fp32 numbers that AdamW reads or writes in memory per parameter;
    0 takes torch's implementation: 7 for the fused one, 18 for foreach."""
    overhead: float = 0.005
    """Seconds per step for everything else: the sync of all ranks, host time that nothing hides."""
    pcie: float = 25.0
    """Bandwidth between a GPU and host memory in one direction."""
    host: float = 20.0
    """Bandwidth of host memory, per GPU."""
    reserve: str = "10%"
    """Memory of a GPU not available to tensors, a share or a size such as 6GB: CUDA's context, NCCL's buffers,
    fragmentation."""
    write: float = 2.0
    """Bandwidth of the file system for a whole checkpoint."""
    restart: float = 600.0
    """Seconds from a failure to the first new step."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of `megapix plan` besides those of a run."""

    gpus: int = 1
    """GPUs of the run, one rank each."""
    nodes: int = 0
    """Nodes that they are on; 0 fills nodes of `gpus_per_node`."""
    gpus_per_node: int = 8
    """GPUs per node."""
    gpu_memory: str = ""
    """Memory per GPU, such as 80GB (10^9 bytes) or 80GiB (2^30); empty takes the data sheet's."""
    gpu: str = "H100"
    """GPU whose data sheet gives peak, memory and bandwidths: A100, H100, H100 PCIe, H100 NVL, H800, H800 PCIe, H20,
    H200, H200 NVL, GH200, B200, RTX 4090, RTX 5090, RTX A6000, L40S, MI300X; or another, of which all is given."""
    scaling: tuple[int, ...] = (1, 8, 16, 64)
    """Numbers of GPUs in the scaling table."""
    images: int = IMAGENET_IMAGES
    """Images per epoch; the default is ImageNet-1k's."""
    text_encoder_parameters: float = 0.0
    """Parameters of a frozen text encoder on every GPU (text.encoder), 2.6e9 for Gemma-2-2B;
    0 if text features are stored with the shards."""
    mtbf: float = 6300.0
    """Hours between two failures of one node (6,300: 419 failures in 54 days of 2,048 nodes, arXiv 2407.21783, 3.3.4).
    """
    assume: Assumptions = field(default_factory=Assumptions)
    """Assumptions about the machines."""


@dataclass(frozen=True)
class Machine:
    """A GPU and its links: bytes, seconds, bytes per second and FLOPs per second; and a text encoder on it."""

    memory: int
    """Bytes of a GPU that tensors can use."""
    peak: float
    """Dense peak in FLOP/s, in the run's precision."""
    memory_bandwidth: float
    link: float
    network: float
    assume: Assumptions
    text_encoder: float = 0.0
    """Parameters of a frozen text encoder on it."""


def machine(options: PlanOptions, precision: str, peak_tflops: float) -> Machine:
    """The machine that the options describe.

    Args:
        peak_tflops: `machine.peak_tflops`; 0 takes the data sheet's dense bf16 peak.

    Raises:
        InputError: an unknown GPU, a size that cannot be read, or no peak for this precision.
    """
    if precision != "bf16" and not peak_tflops:
        raise InputError(
            f"precision = {precision!r}: only bf16 peaks are known; give the GPU's with --machine.peak-tflops"
        )
    a, sheet = options.assume, DATA_SHEETS.get(options.gpu)
    if sheet is None and not (peak_tflops and a.memory and a.link):
        raise _no_sheet(options.gpu)
    total = read_bytes("--gpu-memory", options.gpu_memory)
    reserve = _reserve(a.reserve, total)
    if reserve >= total:
        raise InputError(f"--assume.reserve = {a.reserve!r}: expected less than --gpu-memory = {options.gpu_memory!r}")
    return Machine(
        memory=total - reserve,
        peak=(peak_tflops or (sheet.tflops if sheet else 0.0)) * 1e12,
        memory_bandwidth=(a.memory or (sheet.memory if sheet else 0.0)) * 1e9,
        link=(a.link or (sheet.link if sheet else 0.0)) * 1e9,
        network=a.network * 1e9,
        assume=a,
        text_encoder=options.text_encoder_parameters,
    )


def of_card(name: str, memory: int, precision: str, peak_tflops: float) -> Machine:
    """A GPU at hand, with what its data sheet says; one without is taken for an A100, and fp32 for FP32_SHARE of bf16:
    what is compared on it are ways to run one network, not GPUs.

    Args:
        name: as its driver gives it.
        memory: its bytes, of which all can be used.
        peak_tflops: `machine.peak_tflops`; 0 takes the data sheet's.
    """
    known, a = known_gpu(name) or "A100", Assumptions()
    sheet = DATA_SHEETS[known]
    share = 1.0 if precision == "bf16" else FP32_SHARE
    peak = peak_tflops or sheet.tflops * share
    return Machine(memory, peak * 1e12, sheet.memory * 1e9, sheet.link * 1e9, a.network * 1e9, a)


def nodes_of(options: PlanOptions, gpus: int) -> int:
    """Nodes of `gpus` GPUs, filled one after another.

    Raises:
        InputError: the last node would not be full.
    """
    if gpus > options.gpus_per_node and gpus % options.gpus_per_node:
        raise InputError(
            f"{gpus} GPUs on nodes of {options.gpus_per_node} leave one half empty: expected a multiple of "
            f"{options.gpus_per_node}, or another --gpus-per-node"
        )
    return max(1, gpus // options.gpus_per_node)


def check(options: PlanOptions) -> PlanOptions:
    """Check the ranges; returns the options with `gpu_memory` and, if `nodes` is set, `gpus_per_node` filled in.

    Raises:
        InputError: naming option, value and what would be right.
    """
    o = options
    gpu = _named(o.gpu)
    if gpu not in DATA_SHEETS and not o.gpu_memory:
        raise _no_sheet(o.gpu)
    o = dataclasses.replace(o, gpu=gpu, gpu_memory=o.gpu_memory or f"{DATA_SHEETS[gpu].gigabytes}GB")
    for name, value, low in (("gpus", o.gpus, 1), ("nodes", o.nodes, 0), ("gpus-per-node", o.gpus_per_node, 1)):
        if value < low:
            raise InputError(f"--{name} = {value}: expected at least {low}")
    if o.images < 1:
        raise InputError(f"--images = {o.images}: expected at least 1")
    if any(n < 1 for n in o.scaling):
        raise InputError(f"--scaling = {' '.join(map(str, o.scaling))}: expected numbers of GPUs, at least 1 each")
    if not 0 <= o.text_encoder_parameters <= MOST_PARAMETERS:
        raise InputError(
            f"--text-encoder-parameters = {o.text_encoder_parameters}: expected 0 (features are stored) to "
            f"{MOST_PARAMETERS:g}"
        )
    if not SMALLEST <= o.mtbf <= LARGEST:
        raise InputError(f"--mtbf = {o.mtbf}: expected {SMALLEST} to {LARGEST:g} hours")
    for f in dataclasses.fields(o.assume):
        value = getattr(o.assume, f.name)
        if isinstance(value, float):
            _check_assumption(f.name, value)
    if o.nodes and o.gpus % o.nodes:
        raise InputError(
            f"--gpus = {o.gpus} on --nodes = {o.nodes}: expected a multiple "
            f"({o.gpus} = {o.nodes} x {o.gpus // o.nodes} + {o.gpus % o.nodes})"
        )
    if o.nodes:
        o = dataclasses.replace(o, gpus_per_node=o.gpus // o.nodes)
    nodes_of(o, o.gpus)
    return o


def _no_sheet(gpu: str) -> InputError:
    return InputError(
        f"--gpu = {gpu!r}: no data sheet is known{one_of(gpu, list(DATA_SHEETS))}; of another GPU give --gpu-memory, "
        "--machine.peak-tflops, --assume.memory and --assume.link"
    )


def _named(gpu: str) -> str:
    """The name in DATA_SHEETS of a GPU as its driver or people name it: '4090', 'rtx 5090', 'a6000'."""
    written = {name.lower(): name for name in DATA_SHEETS}
    last = {name.split()[-1].lower(): name for name in DATA_SHEETS if name.startswith("RTX ")}
    return written.get(gpu.lower()) or last.get(gpu.lower()) or known_gpu(gpu) or gpu


SMALLEST, LARGEST = 0.001, 1e9
"""Range of an assumption's value."""
MOST_PARAMETERS = 1e12
"""Most parameters that a text encoder may have."""
MAY_BE_ZERO = ("memory", "link", "launch", "optimizer_passes", "link_latency", "network_latency", "overhead", "restart")


def _check_assumption(name: str, value: float) -> None:
    option = f"--assume.{name.replace('_', '-')}"
    if not (SMALLEST <= value <= LARGEST or (value == 0 and name in MAY_BE_ZERO)):
        allowed = "0, or " if name in MAY_BE_ZERO else ""
        raise InputError(f"{option} = {value}: expected {allowed}{SMALLEST} to {LARGEST:g}")
    if name.endswith("_share") and value > 1:
        raise InputError(f"{option} = {value}: expected a share, at most 1")


def _reserve(text: str, total: int) -> int:
    """Bytes of --assume.reserve, a share of `total` or a size."""
    if match := re.fullmatch(r"(\d{1,2}(?:\.\d{1,9})?) ?%", text.strip(), flags=re.ASCII):
        return round(float(match[1]) / 100 * total)
    return read_bytes("--assume.reserve", text, zero=True)


def read_bytes(option: str, text: str, zero: bool = False) -> int:
    """Bytes of a size such as 80GB, 79.5GiB or 500MB; 0GB only if `zero`.

    Raises:
        InputError: not such a size.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+)", text.strip(), flags=re.ASCII)
    if not match or match[2] not in UNITS or (float(match[1]) == 0 and not zero):
        raise InputError(f"{option} = {text!r}: expected a size such as 80GB or 79.5GiB (units: {', '.join(UNITS)})")
    return round(float(match[1]) * UNITS[match[2]])

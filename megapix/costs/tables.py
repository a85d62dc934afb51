"""The plan as Markdown tables, for a terminal and for a document alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megapix.config import Config, get
from megapix.config.ds_config import read_knobs
from megapix.costs import flops, speed
from megapix.costs.assumptions import Assumptions, Machine, PlanOptions
from megapix.costs.choose import Candidate
from megapix.costs.memory import Bytes
from megapix.costs.save_interval import Interval
from megapix.costs.speed import Seconds, adamw_passes

GIB = 2**30
WHAT = {
    "weights": "weights, whole on each GPU",
    "masters": "fp32 masters, this GPU's share",
    "moments": "Adam's two moments, its share",
    "ema": "EMA, its share",
    "encoder": "frozen text encoder, whole on each GPU",
    "gradients": "averaged fp32 gradients, its share, within a step",
    "bucket": "reduce bucket, within a backward pass",
    "reducing": "copies of a bucket while it is reduced",
    "stepping": "temporaries of AdamW or the gradient norm",
    "activations": "activations of the micro batch",
    "backward": "one block's backward pass, with recomputed activations",
    "peak": "**peak**",
    "host": "host memory of optimizer and activations, if offloaded",
}
PARTS = {
    "matmuls": "matmuls of linear layers",
    "attention": "attention",
    "recomputed": "recomputed matmuls and attention",
    "encoder": "frozen text encoder's matmuls",
    "elementwise": "everything else in the network: memory traffic or launches",
    "moved": "to and from host memory",
    "staged": "ZeRO-2's own copies of gradients and weights",
    "reduced": "gradients between GPUs",
    "optimizer": "clipping and AdamW",
    "ema": "EMA",
    "gathered": "weights between GPUs",
    "rest": "everything else (assumed)",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown with padded columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def assumptions(c: Config, o: PlanOptions, m: Machine) -> str:
    """Everything that is assumed, with the option that changes it."""
    used = {"memory": m.memory_bandwidth / 1e9, "link": m.link / 1e9, "optimizer_passes": adamw_passes(c, m)}
    unit = {
        "compute_share": "of the peak, reached by the matmuls of linear layers",
        "attention_share": "of the peak, reached by attention",
        "memory": "GB/s, GPU memory",
        "memory_share": "of it, reached by element-wise work",
        "sum_share": "of it, reached by sums over many rows",
        "launch": "µs that a kernel takes at least",
        "link": "GB/s in one direction, GPU to GPU in a node",
        "network": "GB/s in one direction per GPU, between nodes",
        "wire_share": "of these two, reached by collectives",
        "link_latency": "µs per hop within a node",
        "network_latency": "µs per hop between nodes",
        "optimizer_passes": "fp32 numbers moved by AdamW per parameter",
        "overhead": "s per step, everything else",
        "pcie": "GB/s in one direction, GPU to host",
        "host": "GB/s, host memory per GPU",
        "reserve": "of GPU memory for CUDA, NCCL and fragmentation",
        "write": "GB/s, a whole checkpoint to the file system",
        "restart": "s, from a failure to the first new step",
    }
    rows = [["--machine.peak-tflops", f"{m.peak / 1e12:g}", f"TFLOP/s, dense peak of one {o.gpu}"]]
    for f in fields(Assumptions):
        value = used.get(f.name, getattr(o.assume, f.name))
        shown = value if isinstance(value, str) else f"{value:g}"
        rows.append([f"--assume.{f.name.replace('_', '-')}", shown, unit[f.name]])
    rows.append(["--mtbf", f"{o.mtbf:g}", "hours between two failures of one node"])
    rows.append(["--images", f"{o.images:,}", "images per epoch"])
    if c.model.text_width:
        encoder = f"{o.text_encoder_parameters:g}"
        rows.append(["--text.max-tokens", str(c.text.max_tokens), "text tokens of each image: an upper bound"])
        rows.append(["--text-encoder-parameters", encoder, "of a frozen text encoder on each GPU (0: stored features)"])
    return table(["assumption", "value", "what"], rows)


def memory(chosen: list[Candidate]) -> str:
    """Bytes of a rank in GiB, one column per candidate; rows of zeros are left out."""
    head = [
        "GiB per GPU",
        *(f"{x.config.machine.ds_config}, micro batch {x.config.machine.micro_batch}" for x in chosen),
    ]
    rows = [(WHAT[f.name], [getattr(x.bytes, f.name) for x in chosen]) for f in fields(Bytes)]
    return table(head, [[what, *(f"{n / GIB:.2f}" for n in row)] for what, row in rows if any(row)])


def policies(c: Config, found: list[Candidate], m: Machine) -> str:
    """Every policy with its largest micro batch, what it takes and how fast it should be."""
    rows = []
    for x in found:
        machine = x.config.machine
        own = all(get(c.machine, key) == get(machine, key) for key in POLICY)
        speed = [f"{x.seconds.total:.3f}", f"{x.images_per_s:,.0f}", f"{x.mfu(m):.1%}"] if x.fits else ["", "", ""]
        fit = (
            f"{machine.micro_batch} x {x.accumulation}"
            if x.fits
            else f"{(x.bytes.peak - m.memory) / GIB:.1f} GiB short"
        )
        which = [machine.ds_config, str(machine.pixel_checkpointing), str(machine.patch_checkpointing)]
        held = [f"{n / GIB:.1f}" for n in (x.bytes.activations, x.bytes.peak)]
        rows.append([*which, "requested" if own else "", fit, *held, *speed])
    head = ["ds_config", "pixel", "patch", "", "micro x accumulation", "activations GiB", "peak GiB"]
    return table([*head, "step s", "images/s", "MFU"], rows)


POLICY = ("ds_config", "pixel_checkpointing", "patch_checkpointing")


def step(x: Candidate) -> str:
    """The parts of a step; those that take no time are left out."""
    parts = [(PARTS[f.name], getattr(x.seconds, f.name)) for f in fields(Seconds)]
    rows = [[what, f"{seconds:.4f}", f"{seconds / x.seconds.total:.1%}"] for what, seconds in parts if seconds]
    return table(["part of a step", "s", "share"], [*rows, ["**step**", f"{x.seconds.total:.4f}", ""]])


def ways(rows: list[tuple[str, int, Seconds]], c: Config, images: int, m: Machine) -> str:
    """The step eager, compiled and with fused kernels; of each its name, its kernels besides matmuls, and its parts."""
    lines = []
    for name, launches, s in rows:
        mfu = images * flops.of_run(c) / s.total / m.peak
        lines.append([name, f"{launches:,}", f"{s.elementwise:.4f}", f"{s.total:.4f}", f"{mfu:.1%}"])
    return table(["network", "kernels besides matmuls", "their s", "step s", "MFU"], lines)


def scaling(rows: list[tuple[int, int, Candidate | str]], o: PlanOptions, c: Config, m: Machine) -> str:
    """Predictions for several numbers of GPUs, or the reason why there is none."""
    lines, first = [], None
    for gpus, nodes, x in rows:
        if isinstance(x, str):
            lines.append([str(gpus), str(nodes), x, *[""] * 8])
            continue
        machine, each = x.config.machine, x.images_per_s / gpus
        first = first or each
        policy = f"{machine.pixel_checkpointing}/{machine.patch_checkpointing}"
        policy += f", {machine.ds_config}" * (machine.ds_config != c.machine.ds_config)
        passes = speed.passes_of(read_knobs(machine.ds_config, machine.unproven))
        sent = speed.sent_by(c.model, c.precision, gpus, x.accumulation, passes)
        cells = [policy, f"{machine.micro_batch} x {x.accumulation}", f"{x.bytes.peak / GIB:.1f}"]
        cells += [f"{(sent.gradients + sent.weights) / GIB:.2f}", f"{x.seconds.total:.3f}", f"{x.images_per_s:,.0f}"]
        cells += [f"{x.mfu(m):.1%}", f"{each / first:.0%}", f"{o.images / x.images_per_s / 3600:.2f}"]
        lines.append([str(gpus), str(nodes), *cells])
    head = ["GPUs", "nodes", "pixel/patch", "micro x accumulation", "peak GiB", "GiB sent per step", "step s"]
    return table([*head, "images/s", "MFU", "speed per GPU, of the first row's", "hours per epoch"], lines)


def schedule(x: Candidate, o: PlanOptions) -> Iterator[str]:
    """Time of an epoch and of the whole schedule."""
    end, rate = x.config.optim.end_at, x.images_per_s
    assert isinstance(end, int)
    steps = -(-end // x.config.optim.global_batch)
    yield f"an epoch of {o.images:,} images: {_time(o.images / rate)}"
    yield f"the whole schedule, {end:,} images in {steps:,} steps: {_time(end / rate)}"


def saving(i: Interval, x: Candidate) -> Iterator[str]:
    """The checkpoint interval and what it costs."""
    images = max(1, int(i.best / x.seconds.total)) * x.config.optim.global_batch
    yield (
        f"a checkpoint has {i.size / GIB:.1f} GiB, is written in {_time(i.writing)}, and training waits "
        f"{i.stall:.1f} s for it"
    )
    yield f"a failure every {_time(i.failures)} on these nodes; best interval sqrt(2 x wait x that) = {_time(i.best)}"
    yield f"--checkpoint.every {images} (images)"
    yield f"a failure loses {_time(i.lost)} on average; saving and failures take {i.waste:.2%} of the time"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"

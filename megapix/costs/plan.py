"""What `megapix plan` prints: memory, policies, step, scaling, checkpoint interval. Needs neither GPU nor torch."""

from __future__ import annotations

from collections.abc import Iterator

from megapix.config import Config, freeze, replace, validate
from megapix.config.ds_config import read_knobs
from megapix.costs import automatic, choose, memory, parameters, save_interval, speed, tables
from megapix.costs.assumptions import Machine, PlanOptions, check, machine, nodes_of, read_bytes
from megapix.costs.automatic import Cards
from megapix.costs.choose import Candidate
from megapix.costs.speed import Seconds
from megapix.errors import InputError


def show(requested: Config, options: PlanOptions, name: str) -> str:
    """The plan of a configuration, as text.

    Args:
        name: what the user calls the configuration: a preset, or `--config FILE`.

    Raises:
        InputError: bad options, or nothing fits.
    """
    o = check(options)
    c = _runnable(requested, o.images)
    if o.text_encoder_parameters and not c.model.text_width:
        raise InputError(
            f"--text-encoder-parameters = {o.text_encoder_parameters:g} has no effect: the network takes classes"
        )
    m = machine(o, c.precision, c.machine.peak_tflops)
    nodes = nodes_of(o, o.gpus)
    found = choose.candidates(c, o.gpus, nodes, m)
    best = choose.best(found)
    if best is None:
        raise choose.refuse(found, c, m, o.gpu_memory)
    psi = parameters.count(c.model)
    chosen = _like(best, found)
    interval = save_interval.interval(psi, o.gpus, nodes, c.checkpoint.background, o)
    parts = [
        f"# {name}: {psi / 1e6:.1f} M parameters, {c.data.image_size} pixels, {c.precision}, global batch "
        f"{c.optim.global_batch}, on {o.gpus} x {o.gpu} of {o.gpu_memory}, nodes: {nodes}",
        "Predicted, not measured, from these assumptions:",
        tables.assumptions(c, o, m),
        f"## Memory\n\nThe policies are pixel {chosen[0].config.machine.pixel_checkpointing}, patch "
        f"{chosen[0].config.machine.patch_checkpointing}.",
        tables.memory(chosen),
        f"## Policies\n\nThe largest micro batch that fits into {m.memory / tables.GIB:.1f} GiB, without the reserve.",
        tables.policies(c, _shown(found, c), m),
        "Recommended, the fastest that fits: `" + " ".join(best.options) + "`",
        _automatic(c, o, m),
        "## The recommended step",
        tables.step(best),
        tables.ways(_ways(best, m), best.config, best.config.machine.micro_batch * best.accumulation, m),
        "\n".join(f"- {line}" for line in tables.schedule(best, o)),
        "## Scaling\n\nThe fastest that fits, with its largest micro batch.",
        tables.scaling(_scaled(c, o, m), o, c, m),
        "## Checkpoints",
        "\n".join(f"- {line}" for line in tables.saving(interval, best)),
    ]
    return "\n\n".join(parts + list(_notes(c, o)))


def _automatic(c: Config, o: PlanOptions, m: Machine) -> str:
    """What a run takes by itself on these GPUs."""
    total = read_bytes("--gpu-memory", o.gpu_memory)
    cards = Cards(o.gpu, total, o.gpus, nodes_of(o, o.gpus), f"{o.gpus} x {o.gpu}")
    try:
        choice = automatic.choose(c, cards, compiler=True, encoders=round(m.text_encoder * memory.WIDTH[c.text.dtype]))
    except InputError as error:
        return f"A run would not start: {error}."
    return f"A run takes by itself what is 'auto', from {', '.join(automatic.POLICIES)}: {choice.about(cards)}."


def _ways(best: Candidate, m: Machine) -> list[tuple[str, int, Seconds]]:
    """The recommended step, run in each way that there is."""
    machine, found = best.config.machine, []
    knobs = read_knobs(machine.ds_config, machine.unproven)
    for name, compiled, fused in WAYS:
        c = replace(replace(best.config, "machine.compile", compiled), "machine.pixel_kernels", fused)
        if fused == "triton" and machine.pixel_checkpointing == "chunked":
            continue  # the fused kernels take all patches at once
        launches = best.accumulation * speed.moved(c).launches
        step = speed.of_step(c, knobs, best.ranks, best.nodes, machine.micro_batch, best.accumulation, m)
        found.append((name, launches, step))
    return found


WAYS = (("eager", False, "plain"), ("compiled", True, "plain"), ("compiled, Triton kernels", True, "triton"))
"""Name, machine.compile and machine.pixel_kernels of each."""


def _notes(c: Config, o: PlanOptions) -> Iterator[str]:
    """What the plan leaves out, and how it counts what varies."""
    if c.repa.wanted:
        yield "REPA's encoder and projector are not counted in any of this."
    if c.model.text_width:
        yield "Aspect buckets are counted as squares of data.image_size, which have about their area."
    if c.model.text_width and not o.text_encoder_parameters:
        width = memory.WIDTH[c.text.dtype]
        yield (
            "Text features are assumed to be stored with the shards. A text encoder beside the engine (text.encoder) "
            f"would add {width} bytes per parameter to each GPU, and its forward pass to each step: Gemma-2-2B "
            f"{2.6 * width:.1f} GB, with --text-encoder-parameters 2.6e9."
        )


def _runnable(requested: Config, images: int) -> Config:
    """The configuration with its spans in images; neither data nor a run folder is needed."""
    c = replace(replace(requested, "out", requested.out or "-"), "data.path", requested.data.path or "-")
    validate(c)
    c = replace(c, "machine.compile", c.machine.compile is not False)  # on GPUs
    return freeze(c, images)


def _shown(found: list[Candidate], c: Config) -> list[Candidate]:
    """Every policy with the requested DeepSpeed configuration, and the best one with each of the others."""
    by_name: dict[str, list[Candidate]] = {}
    for x in found:
        by_name.setdefault(x.config.machine.ds_config, []).append(x)
    own = by_name.pop(c.machine.ds_config)
    return own + [choose.best(some) or min(some, key=lambda x: x.bytes.peak) for some in by_name.values()]


def _like(best: Candidate, found: list[Candidate]) -> list[Candidate]:
    """With the recommended policies: one of each DeepSpeed configuration."""

    def policy(x: Candidate) -> tuple[object, object]:
        return x.config.machine.pixel_checkpointing, x.config.machine.patch_checkpointing

    return [x for x in found if policy(x) == policy(best)]


def _scaled(c: Config, o: PlanOptions, m: Machine) -> list[tuple[int, int, Candidate | str]]:
    """The best candidate for each number of GPUs, or why there is none."""
    rows: list[tuple[int, int, Candidate | str]] = []
    for gpus in sorted({*o.scaling, o.gpus}):
        try:
            nodes = nodes_of(o, gpus)
            best = choose.best(choose.candidates(replace(c, "machine.micro_batch", 0), gpus, nodes, m))
        except InputError as error:
            rows.append((gpus, -(-gpus // o.gpus_per_node), str(error).split(";")[0]))
            continue
        rows.append((gpus, nodes, best or "does not fit"))
    return rows

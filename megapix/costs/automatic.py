"""What 'auto' stands for on a GPU: compilation, the pixel pathway's policy and the micro batch, chosen together.

The choice is the most images/s that `megapix plan` predicts among those with a tenth of the card's memory free. A step
that logs the norms of blocks runs eagerly, so it has to fit too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megapix.config import BatchLayout, Config, PixelPolicy, batch_layout, replace
from megapix.config.ds_config import read_knobs
from megapix.costs import memory, speed
from megapix.costs.assumptions import Machine, of_card
from megapix.costs.memory import Bytes
from megapix.errors import InputError

FREE = 0.1
"""Share of a card's memory that a choice leaves free: CUDA's context, NCCL's buffers, fragmentation."""
POLICIES: tuple[PixelPolicy, ...] = ("none", "selective", "selective_modulation", "full")
"""Values that 'auto' chooses from, from the fastest to the one with the least memory."""
GIB = 2**30


@dataclass(frozen=True)
class Cards:
    """The GPUs of a run, one for each rank."""

    name: str
    """Of the one with the least memory, as its driver gives it."""
    memory: int
    """Its bytes."""
    ranks: int
    nodes: int
    about: str
    """All of them in words: a resume compares it with the checkpoint's."""


@dataclass(frozen=True)
class Choice:
    """A configuration without 'auto', and what it takes of each card."""

    config: Config
    layout: BatchLayout
    peak: int
    """Bytes at the most."""
    held: int
    """Bytes of weights, states and what the policies keep: the least that a step cannot do without."""
    images_per_s: float

    def about(self, cards: Cards) -> str:
        """One line for the run's start."""
        m = self.config.machine
        return (
            f"{'compiled' if m.compile else 'not compiled'}, pixel checkpointing {m.pixel_checkpointing}, micro batch "
            f"{self.layout.micro} x accumulation {self.layout.accumulation}: {self.peak / GIB:.1f} GiB predicted of "
            f"{cards.memory / GIB:.1f} GiB ({cards.about})"
        )


def is_open(c: Config) -> bool:
    """Whether a GPU run of this configuration leaves something to the choice."""
    m = c.machine
    return m.compile == "auto" or m.pixel_checkpointing == "auto" or m.micro_batch == 0


def choose(c: Config, cards: Cards, compiler: bool, encoders: int = 0) -> Choice:
    """The fastest predicted choice with FREE of the memory free; where none has, the one with the least memory.

    Args:
        c: what its options say is kept.
        cards: the run's.
        compiler: whether all ranks have what compilation needs.
        encoders: bytes of frozen encoders on each card.

    Raises:
        InputError: weights, states and what the policies keep exceed the card; with the arithmetic, and what would fit.
    """
    m = of_card(cards.name, cards.memory, c.precision, c.machine.peak_tflops)
    found = list(_choices(c, cards, m, compiler, encoders))
    roomy = [x for x in found if x.peak <= (1 - FREE) * cards.memory]
    if roomy:
        return max(roomy, key=lambda x: x.images_per_s)
    least = min(found, key=lambda x: (x.held, x.peak))
    if least.held > cards.memory:
        raise _refusal(c, least, cards, m, compiler, encoders)
    return least


def _choices(c: Config, cards: Cards, m: Machine, compiler: bool, encoders: int) -> Iterator[Choice]:
    images = batch_layout(c, cards.ranks).total // cards.ranks
    micros = [c.machine.micro_batch] if c.machine.micro_batch else [n for n in range(images, 0, -1) if images % n == 0]
    compiled = compiler if c.machine.compile == "auto" else c.machine.compile
    asked = c.machine.pixel_checkpointing
    knobs = read_knobs(c.machine.ds_config, c.machine.unproven)
    for policy in POLICIES if asked == "auto" else (asked,):
        planned = replace(replace(c, "machine.compile", compiled), "machine.pixel_checkpointing", policy)
        for micro in micros:
            accumulation = images // micro
            used = _most(planned, knobs, cards.ranks, micro, accumulation, encoders)
            seconds = speed.of_step(planned, knobs, cards.ranks, cards.nodes, micro, accumulation, m)
            yield Choice(
                replace(planned, "machine.micro_batch", micro),
                BatchLayout(micro, accumulation, cards.ranks),
                used.peak + encoders,
                used.states + used.activations + encoders,
                c.optim.global_batch / seconds.total,
            )


def _most(c: Config, knobs: dict[str, object], ranks: int, micro: int, accumulation: int, encoders: int) -> Bytes:
    """Bytes of a rank in the step that takes the most: an eager one, if any is."""
    eager = replace(c, "machine.compile", c.machine.compile is True and c.log.blocks_every == "never")
    return memory.of_rank(eager, knobs, ranks, micro, accumulation)


def _refusal(c: Config, least: Choice, cards: Cards, m: Machine, compiler: bool, encoders: int) -> InputError:
    machine, micro = least.config.machine, least.layout.micro
    knobs = read_knobs(machine.ds_config, machine.unproven)
    used = _most(least.config, knobs, cards.ranks, micro, least.layout.accumulation, encoders)
    states = used.states + encoders
    free = replace(replace(c, "machine.micro_batch", 0), "machine.pixel_checkpointing", "auto")
    fitting = [x for x in _choices(free, cards, m, compiler, encoders) if x.peak <= (1 - FREE) * cards.memory]
    best = max(fitting, key=lambda x: x.images_per_s, default=None)
    if best:
        fits = (
            f"--machine.micro-batch {best.layout.micro} --machine.pixel-checkpointing "
            f"{best.config.machine.pixel_checkpointing}, which takes {best.peak / GIB:.1f} GiB"
        )
    else:
        fits = "more ranks, --machine.patch-checkpointing full, or --machine.ds-config zero2_offload"
    return InputError(
        f"machine.micro_batch = {micro} with machine.pixel_checkpointing = {machine.pixel_checkpointing!r}: weights "
        f"and optimizer states {states / GIB:.1f} GiB + activations {micro} x {used.activations / micro / GIB:.2f} GiB "
        f"= {least.held / GIB:.1f} GiB, and {cards.name} has {cards.memory / GIB:.1f} GiB; expected {fits}"
    )

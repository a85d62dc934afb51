"""What 'auto' stands for on a GPU: compilation, the pixel pathway's policy and the micro batch, chosen together.

The choice is the most images/s that `megapix plan` predicts among those with a tenth of the card's memory free. Bytes
are those of eager blocks, which keep at least as much as compiled ones: a step that logs norms of blocks runs eagerly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megapix.config import BatchLayout, Config, PixelPolicy, batch_layout, replace
from megapix.config.ds_config import read_knobs
from megapix.costs import memory, speed
from megapix.costs.assumptions import Machine, of_card
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

    @property
    def room(self) -> float:
        """Bytes of that card that a choice may take."""
        return (1 - FREE) * self.memory


@dataclass(frozen=True)
class Choice:
    """A configuration without 'auto', and what it takes of each card."""

    config: Config
    layout: BatchLayout
    peak: int
    """Bytes at the most."""
    states: int
    """Bytes of weights, optimizer states and encoders."""
    activations: int
    """Bytes that the policies keep."""
    images_per_s: float

    @property
    def held(self) -> int:
        """The least that a step cannot do without."""
        return self.states + self.activations

    def about(self, cards: Cards) -> str:
        """One line for the run's start."""
        taken = f"{self.peak / GIB:.1f} GiB predicted of {cards.memory / GIB:.1f} GiB ({cards.about})"
        return f"{in_words(self.config, self.layout)} x accumulation {self.layout.accumulation}: {taken}"


def in_words(c: Config, layout: BatchLayout) -> str:
    """What is chosen, of a configuration without 'auto'."""
    m = c.machine
    compiled = "compiled" if m.compile else "not compiled"
    return f"{compiled}, pixel checkpointing {m.pixel_checkpointing}, micro batch {layout.micro}"


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
    if best := _fastest(found, cards):
        return best
    least = min(found, key=lambda x: (x.held, x.peak))
    if least.held > cards.memory:
        free = replace(replace(c, "machine.micro_batch", 0), "machine.pixel_checkpointing", "auto")
        raise _refusal(least, cards, _fastest(_choices(free, cards, m, compiler, encoders), cards))
    return least


def _fastest(found: Iterable[Choice], cards: Cards) -> Choice | None:
    """The most images/s that fit; of equals the first."""
    return max((x for x in found if x.peak <= cards.room), key=lambda x: x.images_per_s, default=None)


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
            used = memory.of_rank(planned, knobs, cards.ranks, micro, accumulation)
            seconds = speed.of_step(planned, knobs, cards.ranks, cards.nodes, micro, accumulation, m)
            yield Choice(
                replace(planned, "machine.micro_batch", micro),
                BatchLayout(micro, accumulation, cards.ranks),
                used.peak + encoders,
                used.states + encoders,
                used.activations,
                c.optim.global_batch / seconds.total,
            )


def _refusal(least: Choice, cards: Cards, best: Choice | None) -> InputError:
    machine, micro = least.config.machine, least.layout.micro
    if best:
        fits = (
            f"--machine.micro-batch {best.layout.micro} --machine.pixel-checkpointing "
            f"{best.config.machine.pixel_checkpointing}, which takes {best.peak / GIB:.1f} GiB"
        )
    else:
        fits = "more ranks, --machine.patch-checkpointing full, or --machine.ds-config zero2_offload"
    return InputError(
        f"machine.micro_batch = {micro} with machine.pixel_checkpointing = {machine.pixel_checkpointing!r}: weights "
        f"and optimizer states {least.states / GIB:.1f} GiB + activations {micro} x "
        f"{least.activations / micro / GIB:.2f} GiB = {least.held / GIB:.1f} GiB, and {cards.name} has "
        f"{cards.memory / GIB:.1f} GiB; expected {fits}"
    )

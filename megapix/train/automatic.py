"""What 'auto' stands for in this run: chosen for its GPUs at the start, and kept by a resume on the same ones."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import replace

import torch

from megapix import config
from megapix.checkpoint.find import Saved
from megapix.config import BatchLayout, Config, batch_layout, get
from megapix.costs import automatic
from megapix.costs.automatic import GIB, Cards
from megapix.dist import World, gather
from megapix.engine import compiler
from megapix.train.resolve import ResolvedRun

CPUS = "CPUs"
DECIDING = ("compile", "pixel_checkpointing", "micro_batch", "patch_checkpointing", "pixel_kernels", "ds_config")
"""Options under `machine` that a choice is of, or that it depends on."""
OPEN = ("auto", 0)
"""Values of theirs that leave the choice to the run's start."""


def cards_of(world: World, device: torch.device) -> Cards | None:
    """The GPUs of all ranks; None on CPUs. Every rank calls it."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_properties(device)
    found = gather(world, (socket.gethostname(), own.name, own.total_memory))
    _, name, memory = min(found, key=lambda card: card[2])
    counts = Counter(f"{name}, {memory / GIB:.0f} GiB" for _, name, memory in found)
    about = " + ".join(f"{n} x {card}" for card, n in sorted(counts.items()))
    return Cards(name, memory, world.size, len({host for host, *_ in found}), about)


def check_here(resolved: ResolvedRun, world: World) -> None:
    """Refuse what a run would refuse on the ranks' machines, as far as this one can tell before any rank has started:
    options of kernels and compilation that it has not got, and on GPUs what does not fit one.

    Raises:
        InputError: as `build_network`, `attention_of` and `settled`.
    """
    c, gpus = resolved.config, torch.cuda.device_count() if torch.cuda.is_available() else 0
    compiler.require(c.machine, cuda=gpus > 0)
    if (c.machine.attention, c.machine.pixel_kernels) != ("auto", "plain"):
        from megapix.engine import network  # late: DeepSpeed, which takes seconds

        network.pit_block(c.machine.pixel_kernels)
        network.attention_of(c, torch.device("cuda" if gpus else "cpu"))
    if gpus:
        own = torch.cuda.get_device_properties(world.local_rank % gpus)
        settle(resolved, Cards(own.name, own.total_memory, world.size, -(-world.size // gpus), own.name), "")


def lacking(world: World, cards: Cards | None) -> str:
    """What some rank lacks of what compilation needs there; empty if nothing. Every rank calls it."""
    return next((f"rank {rank}: {what}" for rank, what in enumerate(gather(world, _missing(cards))) if what), "")


def settle(resolved: ResolvedRun, cards: Cards | None, lacks: str) -> tuple[ResolvedRun, list[str]]:
    """The run without 'auto', and lines about that for its start; a pure function of its arguments.

    Raises:
        InputError: as `settled`.
    """
    c, lines, layout = settled(
        resolved.config, resolved.layout, cards, lacks, resolved.saved, _encoders(resolved) if cards else 0
    )
    about = cards.about if cards else CPUS
    return replace(resolved, config=c, layout=layout, cards=about), lines


def settled(
    c: Config, layout: BatchLayout, cards: Cards | None, lacks: str, saved: Saved | None = None, encoders: int = 0
) -> tuple[Config, list[str], BatchLayout]:
    """A configuration without 'auto', lines about that, and its layout in place of the one that was asked for.

    Args:
        cards: the run's GPUs; None on CPUs.
        lacks: what compilation lacks; 'auto' does without it then.
        saved: the checkpoint that the run resumes from.
        encoders: bytes of frozen encoders on each GPU.

    Raises:
        InputError: the micro batch, or what fits at all, exceeds the smallest GPU.
    """
    if cards is None:
        return replace(c, machine=config.on_cpus(c.machine)), _moved(saved, CPUS), layout
    if (kept := _kept(c, saved, cards)) is not None:
        layout = batch_layout(kept, cards.ranks)
        said = f"as in the checkpoint: {automatic.in_words(kept, layout)}"
        return kept, [said] if automatic.is_open(c) else [], layout
    choice, lines = automatic.choose(c, cards, not lacks, encoders), _moved(saved, cards.about)
    if lacks and c.machine.compile == "auto":
        lines.append(f"not compiled: {lacks}")
    if automatic.is_open(c):
        lines.append(f"chosen for these GPUs: {choice.about(cards)}")
    return choice.config, lines, choice.layout


def _missing(cards: Cards | None) -> str:
    return (compiler.missing(cuda=True) or "") if cards else ""


def _kept(c: Config, saved: Saved | None, cards: Cards) -> Config | None:
    """The configuration with the checkpoint's choice, if that was for the same GPUs and the same requested options."""
    if saved is None or saved.state.layout.ranks != cards.ranks or saved.state.cards not in ("", cards.about):
        return None
    before = saved.state.config.machine
    machine = replace(
        c.machine,
        **{name: getattr(before, name) for name in DECIDING if get(c, f"machine.{name}") in OPEN},
    )
    same = all(getattr(machine, name) == getattr(before, name) for name in DECIDING)
    return replace(c, machine=machine) if same else None


def _moved(saved: Saved | None, about: str) -> list[str]:
    if saved is None or saved.state.cards in ("", about):
        return []
    return [f"the checkpoint was made on {saved.state.cards}, this run is on {about}: results may differ in rounding"]


def _encoders(resolved: ResolvedRun) -> int:
    """Bytes of the frozen encoders beside the engine."""
    found = [encoder for encoder in (resolved.teacher, resolved.text.encoder) if encoder]
    return sum(p.nbytes for encoder in found for p in encoder.parameters())

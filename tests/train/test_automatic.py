"""What a run takes where an option says 'auto': on GPUs by the plan, on a resume by the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megapix import config
from megapix.checkpoint.find import Choice, Saved
from megapix.checkpoint.layout import FileRecord, Layout
from megapix.checkpoint.manifest import Counters, State, read_state, write_state
from megapix.config import Config, batch_layout
from megapix.config.ds_config import read_knobs
from megapix.costs import memory
from megapix.costs.automatic import Cards
from megapix.errors import InputError
from megapix.train.automatic import CPUS, settle
from megapix.train.resolve import ResolvedRun

GIB = 2**30
H100 = Cards("NVIDIA H100 80GB HBM3", 80 * 10**9, 8, 1, "8 x NVIDIA H100 80GB HBM3, 75 GiB")
XL = config.freeze(config.preset("xl-256"), 1_281_167)
ZERO2 = read_knobs("zero2")


def run(c: Config, ranks: int = 8, state: State | None = None) -> ResolvedRun:
    """A run as `resolve` gives it; of the data nothing is read here."""
    choice = Choice(Saved(Path("checkpoint"), state) if state else None)
    nothing: Any = None
    return ResolvedRun(c, nothing, batch_layout(c, ranks), choice, None, [])


def checkpoint(cards: str, ranks: int = 8, **machine: object) -> State:
    """A checkpoint of such a run with these options under `machine`."""
    c = replace(XL, machine=replace(XL.machine, **machine))  # type: ignore[arg-type]
    return State(Counters(256, 256), c, "", (), Layout({"a": (8,)}, ranks), 1, cards=cards)


def asked(**machine: object) -> Config:
    return replace(XL, machine=replace(XL.machine, **machine))  # type: ignore[arg-type]


def test_a_new_run_takes_the_fastest_that_fits() -> None:
    """80 GB hold 32 images of XL at 256 pixels without checkpointing, which nothing is faster than."""
    settled, (line,) = settle(run(XL), H100, "")
    m = settled.config.machine
    assert (m.compile, m.pixel_checkpointing, m.micro_batch) == (True, "none", 32)
    assert (settled.layout.micro, settled.layout.accumulation, settled.cards) == (32, 1, H100.about)
    peak = memory.of_rank(config.replace(settled.config, "machine.compile", False), ZERO2, 8, 32, 1).peak
    assert line == (
        f"chosen for these GPUs: compiled, pixel checkpointing none, micro batch 32 x accumulation 1: {peak / GIB:.1f} "
        f"GiB predicted of 74.5 GiB ({H100.about})"
    )


def test_one_card_gets_a_micro_batch_that_fits() -> None:
    """256 images at once are 120 GiB of activations; a tenth of the card stays free, in eager steps too."""
    card = replace(H100, ranks=1, about="1 x NVIDIA H100 80GB HBM3, 75 GiB")
    settled, _ = settle(run(XL, 1), card, "")
    micro = settled.layout.micro
    eager = config.replace(settled.config, "machine.compile", False)
    assert settled.layout.total == 256
    assert 32 <= micro < 256
    assert memory.of_rank(eager, ZERO2, 1, micro, 256 // micro).peak <= 0.9 * card.memory


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 40])
def test_smaller_cards_are_filled_and_not_overfilled(gib: int) -> None:
    cards = replace(H100, memory=gib * GIB)
    settled, _ = settle(run(XL), cards, "")
    m, micro = settled.config.machine, settled.layout.micro
    assert m.pixel_checkpointing in ("none", "selective", "selective_modulation", "full")
    assert (m.pixel_kernels, m.patch_checkpointing) == ("plain", "none")
    eager = config.replace(settled.config, "machine.compile", False)
    assert memory.of_rank(eager, ZERO2, 8, micro, 32 // micro).peak <= 0.9 * cards.memory
    if micro < 32:
        full = config.replace(eager, "machine.pixel_checkpointing", "none")
        assert memory.of_rank(full, ZERO2, 8, 32, 1).peak > 0.9 * cards.memory, "or it would have been taken"


@pytest.mark.parametrize(
    "fixed",
    [
        {"compile": False},
        {"compile": True, "pixel_checkpointing": "offload"},
        {"pixel_checkpointing": "chunked"},
        {"pixel_checkpointing": "full", "micro_batch": 8},
        {"micro_batch": 4},
        {"micro_batch": 16, "compile": True, "pixel_checkpointing": "selective"},
    ],
)
def test_an_explicit_value_wins(fixed: dict[str, object]) -> None:
    settled, lines = settle(run(asked(**fixed)), H100, "")
    for name, value in fixed.items():
        assert getattr(settled.config.machine, name) == value
    assert config.get(settled.config, "machine.compile") in (True, False)
    assert len(lines) == (len(fixed) < 3), "a run that leaves nothing open has nothing to say"


def test_a_resume_takes_the_checkpoints_choice() -> None:
    state = checkpoint(H100.about, compile=False, pixel_checkpointing="selective", micro_batch=2)
    settled, (line,) = settle(run(XL, state=state), H100, "")
    m = settled.config.machine
    assert (m.compile, m.pixel_checkpointing, m.micro_batch) == (False, "selective", 2)
    assert settled.layout == batch_layout(settled.config, 8)
    assert line == "as in the checkpoint: not compiled, pixel checkpointing selective, micro batch 2"


def test_a_checkpoint_of_a_release_without_a_choice_goes_on_as_it_was() -> None:
    """It says nothing of its GPUs, and its micro batch of 0 was global batch / ranks."""
    state = checkpoint("", compile=False, pixel_checkpointing="full", micro_batch=0)
    settled, _ = settle(run(XL, state=state), H100, "")
    m = settled.config.machine
    assert (m.compile, m.pixel_checkpointing, settled.layout.micro) == (False, "full", 32)


@pytest.mark.parametrize(
    ("cards", "ranks", "fixed", "said"),
    [
        ("8 x NVIDIA A100-SXM4-80GB, 79 GiB", 8, {}, "the checkpoint was made on 8 x NVIDIA A100-SXM4-80GB, 79 GiB"),
        (CPUS, 2, {}, "the checkpoint was made on CPUs, this run is on 8 x NVIDIA H100"),
        (H100.about, 8, {"micro_batch": 16}, ""),
        (H100.about, 8, {"pixel_kernels": "triton"}, ""),
    ],
)
def test_a_resume_elsewhere_chooses_again(cards: str, ranks: int, fixed: dict[str, object], said: str) -> None:
    state = checkpoint(cards, ranks, compile=False, pixel_checkpointing="full", micro_batch=1)
    settled, lines = settle(run(asked(**fixed), state=state), H100, "")
    assert settled.config.machine.compile is True
    assert settled.config.machine.pixel_checkpointing == "none"
    assert any(said in line for line in lines)
    assert lines[-1].startswith("chosen for these GPUs: compiled")


def test_without_a_compiler_auto_does_without_it() -> None:
    settled, lines = settle(run(XL), H100, "rank 3: no gcc")
    assert settled.config.machine.compile is False
    assert "not compiled: rank 3: no gcc" in lines
    settled, lines = settle(run(asked(compile=False)), H100, "rank 3: no gcc")
    assert not any("no gcc" in line for line in lines), "nobody has asked for it"


def test_a_micro_batch_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    cards = replace(H100, name="NVIDIA L4", memory=24 * GIB, ranks=1, about="1 x NVIDIA L4, 24 GiB")
    with pytest.raises(InputError) as raised:
        settle(run(asked(micro_batch=64, pixel_checkpointing="none"), 1), cards, "")
    used = memory.of_rank(asked(pixel_checkpointing="none", compile=False), ZERO2, 1, 64, 4)
    message = str(raised.value)
    assert message.startswith(
        "machine.micro_batch = 64 with machine.pixel_checkpointing = 'none': weights and optimizer"
    )
    assert f"states {used.states / GIB:.1f} GiB + activations 64 x {used.activations / 64 / GIB:.2f} GiB" in message
    assert "and NVIDIA L4 has 24.0 GiB; expected " in message


def test_a_micro_batch_that_may_fit_is_tried() -> None:
    """What a plan adds to what is surely held is an estimate; torch has the last word."""
    c, ranks = asked(micro_batch=32, pixel_checkpointing="none"), 8
    used = memory.of_rank(config.replace(c, "machine.compile", False), ZERO2, ranks, 32, 1)
    tight = replace(H100, memory=used.states + used.activations + 1)
    assert settle(run(c), tight, "")[0].layout.micro == 32
    with pytest.raises(InputError, match=r"machine\.micro_batch = 32"):
        settle(run(c), replace(tight, memory=used.states + used.activations - 1), "")


def test_on_cpus_nothing_is_chosen() -> None:
    settled, lines = settle(run(XL), None, "")
    m = settled.config.machine
    assert (m.compile, m.pixel_checkpointing, m.micro_batch, settled.cards) == (False, "full", 0, CPUS)
    assert not lines
    state = checkpoint(H100.about, compile=True, pixel_checkpointing="none", micro_batch=32)
    _, (line,) = settle(run(XL, state=state), None, "")
    assert line.startswith("the checkpoint was made on 8 x NVIDIA H100")


def test_the_cards_stand_in_the_manifest(tmp_path: Path) -> None:
    state = checkpoint(H100.about, compile=True, pixel_checkpointing="none", micro_batch=32)
    write_state(tmp_path, replace(state, files={name: FileRecord(1, "0" * 64) for name in state.layout.files}))
    found = read_state(tmp_path)
    assert found.cards == H100.about
    assert found.config.machine.compile is True

"""ZeRO-2 against plain PyTorch: the cover, the measurement, real ranks, offload, and what the configuration refuses."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapix import config
from megapix.checkpoint.folder import latest
from megapix.cli import main as cli
from megapix.config import Config, MachineConfig, ds_config
from megapix.diffusion.condition import Condition
from megapix.engine.network import build_network
from megapix.errors import InputError
from megapix.parity import plain, zero2
from megapix.parity.cases import CLIP, LOCAL_RANKS, MODEL, OPTIONS, STEPS, Case, cases, configuration
from megapix.parity.command import ParityOptions, finish
from megapix.parity.compare import TOLERANCES, Difference, Result, compare
from megapix.parity.pairwise import pairwise
from megapix.parity.plain import Trace
from tests.support.launch import ROOT, start, succeed
from tests.support.small_run import arguments, shard_tensors

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The cover
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=7))
def test_every_two_values_of_two_options_meet(sizes: list[int]) -> None:
    options = {f"option {i}": list(range(size)) for i, size in enumerate(sizes)}
    rows = pairwise(options)
    for a, b in itertools.combinations(options, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(options[a], options[b]))
    assert len(rows) <= np.prod(sizes)
    assert all(list(row) == list(options) for row in rows)


@pytest.mark.parametrize("ranks", [LOCAL_RANKS, (8,)])
def test_the_table_covers_all_pairs_in_few_cases(ranks: tuple[int, ...]) -> None:
    covered = cases(ranks, compiling=True)
    assert len(covered) == len(set(covered)) <= 30
    options = {"ranks": ranks} | OPTIONS
    for a, b in itertools.combinations(options, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in covered}
        assert met == set(itertools.product(options[a], options[b])), (a, b)
    uncompiled = cases(ranks, compiling=False)
    assert uncompiled == [case for case in covered if not case.compile]
    for a, b in itertools.combinations(options.keys() - {"compile"}, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in uncompiled}
        assert met == set(itertools.product(options[a], options[b])), (a, b)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_a_case_has_the_accumulation_it_names(ranks: int, accumulation: int) -> None:
    layout = config.batch_layout(configuration(Case(ranks, accumulation)), ranks)
    assert (layout.ranks, layout.accumulation) == (ranks, accumulation)


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


SAMPLES: plain.Samples = partial(zero2.samples, MODEL, CPU)


def run(case: Case, change: Callable[[Config], Config] = lambda c: c, samples: plain.Samples = SAMPLES) -> Trace:
    c = change(configuration(case))
    return plain.train(zero2.network(c), c, samples, STEPS, c.optim.global_batch // 2)


@pytest.fixture(scope="module")
def honest() -> dict[str, Trace]:
    """The plain process with clipping hit and not hit."""
    return {"hit": run(Case(clip="hit")), "not hit": run(Case(clip="not hit"))}


def test_the_reference_learns_and_clips_as_named(honest: dict[str, Trace]) -> None:
    assert min(honest["hit"].norms) > CLIP["hit"]
    assert max(honest["not hit"].norms) < CLIP["not hit"]
    for trace in honest.values():
        assert trace.losses[-1] < 0.95 * trace.losses[0], "it learns, so agreement means something"
        assert all(g.abs().max() > 0 for g in trace.gradient.values()), "no weight is without a gradient"


def test_the_reference_does_not_depend_on_its_micro_batch(honest: dict[str, Trace]) -> None:
    c = configuration(Case())
    whole = plain.train(zero2.network(c), c, SAMPLES, STEPS, c.optim.global_batch)
    assert compare(honest["hit"], whole).within(TOLERANCES["fp32"])


def lost(positions: np.ndarray) -> tuple[torch.Tensor, Condition]:
    """The data, but a sixteenth of each batch is another sample than it should be."""
    return SAMPLES(np.where(positions % 16 == 5, positions + 1, positions))


FAULTS: dict[str, tuple[str, Callable[[], Trace]]] = {
    "clipping left out": ("gradient", lambda: run(Case(), lambda c: config.replace(c, "optim.grad_clip", 0.0))),
    "clipping by another bound": (
        "gradient",
        lambda: run(Case(), lambda c: config.replace(c, "optim.grad_clip", 0.051)),
    ),
    "one sample of sixteen lost": ("loss", lambda: run(Case(), samples=lost)),
    "the learning rate's step missed": (
        "weights",
        lambda: run(Case(), lambda c: config.replace(c, "optim.lr_step_at", "never")),
    ),
    "no weight decay": ("norm", lambda: run(Case(), lambda c: config.replace(c, "optim.weight_decay", 0.0))),
    "another EMA decay": ("ema", lambda: run(Case(), lambda c: config.replace(c, "optim.ema_decay", 0.91))),
    "bf16 instead of fp32": ("gradient", lambda: run(Case(precision="bf16"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, honest: dict[str, Trace]) -> None:
    """By the number that should show it, and by at least ten times its tolerance."""
    name, faulty = FAULTS[fault]
    difference = compare(faulty(), honest["hit"])
    assert not difference.within(TOLERANCES["fp32"])
    assert getattr(difference, name) > 10 * getattr(TOLERANCES["fp32"], name), difference


def test_a_gradient_of_the_wrong_size_is_seen_though_adam_hides_it(honest: dict[str, Trace]) -> None:
    """Twice the gradient moves Adam's weights alike, and after clipping it is the same: its norm tells."""
    doubled = replace(honest["hit"], norms=[2 * norm for norm in honest["hit"].norms])
    assert not compare(doubled, honest["hit"]).within(TOLERANCES["fp32"])


def test_a_number_that_is_not_finite_never_holds() -> None:
    nan = Difference(float("nan"), 0.0, 0.0, 0.0, 0.0)
    assert not nan.within(TOLERANCES["bf16"])
    assert Difference(0.0, 0.0, 0.0, 0.0, 0.0).within(TOLERANCES["fp32"])


def test_a_case_that_differs_is_named_and_ends_with_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = Result(Case(), Difference(0, 0, 0, 0, 0), Difference(0, 0, 0, 0, 0))
    bad = Result(Case(overlap_comm=True), Difference(0, 0, 0.25, 0, 0), Difference(0, 0, 0.25, 0, 0))
    options = ParityOptions(out=tmp_path / "table.md")
    assert finish([good], options) == 0
    assert finish([good, bad], options) == 1
    printed = capsys.readouterr()
    assert "differs from the plain PyTorch reference: 2 ranks: overlap_comm True" in printed.err
    assert "| 2.5e-01 |" in (tmp_path / "table.md").read_text()
    assert "**differs**" in printed.out


# ---------------------------------------------------------------------------------------------------------------------
# Real ranks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_compiled_ranks_compute_what_a_plain_process_computes() -> None:
    """And gradients that are reduced in bf16 are seen."""
    succeed(2, "tests.programs.parity_cases", ["compiled"])


@pytest.mark.parametrize(
    ("ranks", "which"),
    [pytest.param(*row, marks=pytest.mark.long) for row in ((1, "thirds"), (3, "odd"), (6, "thirds"))],
)
def test_dividing_by_three_costs_no_rounding(ranks: int, which: str) -> None:
    """Ranks and micro batches whose number is no power of two: a bf16 gradient divided by it would be off by 2e-3."""
    succeed(ranks, "tests.programs.parity_cases", [which])


@pytest.mark.long
def test_the_table_holds(tmp_path: Path) -> None:
    """On 2 and 3 ranks, started by the command itself. The whole of it, with torch.compile, is in docs/parity.md."""
    command = [sys.executable, "-m", "megapix", "doctor", "--parity", "--out", str(tmp_path / "table.md")]
    command += ["--ranks", "2", "3", "--no-compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.count("| holds |") == len(cases((2, 3), compiling=False))
    assert "differs" not in text


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_offloaded_ema_equals_a_dense_one_bit_for_bit(precision: str, shards: Path) -> None:
    """With skipped steps, after which DeepSpeed alone would keep the gradient that was not finite."""
    succeed(2, "tests.programs.dense_ema", [precision, "classes", shards, "zero2_offload"])


@pytest.mark.long
def test_an_offloaded_run_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    """8 steps, against 4 steps, a new process, and 4 more; bf16, both pathways checkpointed."""
    options = ["--precision", "bf16", "--machine.ds-config", "zero2_offload", "--machine.patch-checkpointing", "full"]
    options += ["--machine.pixel-checkpointing", "full", "--checkpoint.every", "32"]
    for run_, ends in (("whole", [64]), ("parts", [32, 64])):
        for end in ends:
            succeed(2, "megapix", arguments(shards, tmp_path / run_, *options, "--optim.end-at", str(end)))
    whole, parts = (shard_tensors(latest(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_compiled_run_trains_samples_and_resumes(shards: Path, tmp_path: Path) -> None:
    """With both pathways checkpointed; its checkpoint has the names of any other, so it loads without compiling, on two
    ranks as well."""
    from megapix.weights.read import load_model, load_weights

    options = ["--machine.compile", "--machine.patch-checkpointing", "full", "--machine.pixel-checkpointing", "full"]
    options += ["--log.samples-every", "32", "--log.grid-columns", "1", "--checkpoint.every", "32"]
    for end in (32, 64):
        succeed(1, "megapix", arguments(shards, tmp_path / "run", *options, "--optim.end-at", str(end)))
    net = load_model(tmp_path / "run")
    assert [name for name, _ in net.named_parameters()] == list(load_weights(tmp_path / "run").tensors)
    succeed(2, "megapix", arguments(shards, tmp_path / "run", "--optim.end-at", "96"))


def test_compiling_changes_no_name_and_happens_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def record(forward: Callable[..., object], fullgraph: bool) -> Callable[..., object]:
        compiled.append(forward)
        assert fullgraph, "what cannot be compiled is an error"
        return forward

    monkeypatch.setattr(torch, "compile", record)
    c = configuration(Case(compile=True))
    net, usual = build_network(c.model, 0, c.machine), build_network(c.model, 0)
    assert list(net.state_dict()) == list(usual.state_dict())
    assert len(compiled) == 2 + 4, "patch blocks, PiT blocks, and what is no block: embed, two of the pixels, output"
    assert len(set(compiled)) == len(compiled)


def test_compiling_without_a_compiler_is_bad_input() -> None:
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    # Not monkeypatch, which takes the configuration for a class, and deletes from it what it should put back.
    without = inductor.patch({"cpp.cxx": (None, "no-such-compiler")})
    with without, pytest.raises(InputError, match=r"machine\.compile = True: .* no C\+\+ compiler; expected g\+\+"):
        build_network(configuration(Case()).model, 0, MachineConfig(compile=True))


# ---------------------------------------------------------------------------------------------------------------------
# What the configuration refuses
# ---------------------------------------------------------------------------------------------------------------------


def knobs_file(folder: Path, zero: dict[str, object], **others: object) -> str:
    path = folder / "knobs.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2} | zero} | others))
    return str(path)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "others", "words"),
    [
        ({"overlap_comm": True}, {}, "docs/parity.md tests it on CPU ranks only"),
        ({"allgather_partitions": True}, {}, "is refused: DeepSpeed's ZeRO-2 does not read it"),
        ({"round_robin_gradients": True}, {}, "checkpoints hold the network's order of parameters"),
        ({"compute_grad_norm": False}, {}, "is refused: the optimizer's step needs the norm"),
        ({}, {"gradient_allreduce_op": "mean"}, "set by optim.global_batch: gradients are summed"),
        ({}, {"prescale_gradients": True}, "'prescale_gradients' is refused: gradients are reduced in fp32"),
        ({}, {"compile": {}}, "'compile' does not belong here; it is set by machine.compile"),
        (OFFLOAD, {}, "zero_force_ds_cpu_optimizer = None: expected false beside offload_optimizer"),
        (OFFLOAD, {"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer = True: expected false"),
        ({"offload_optimizer": "cpu"}, {}, "offload_optimizer = 'cpu': expected a table"),
        ({"offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device = 'nvme': expected 'cpu'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "unknown or refused key 'ratio'"),
        ({"offload_param": {"device": "cpu"}}, {}, "unknown or refused key 'offload_param'"),
    ],
)
def test_what_is_not_proven_is_refused(
    zero: dict[str, object], others: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = knobs_file(tmp_path, zero, **others)
    with pytest.raises(InputError) as error:
        ds_config.read_knobs(path)
    assert words in str(error.value)
    assert str(error.value).startswith(path)


def test_what_is_proven_on_cpu_ranks_only_is_named(tmp_path: Path) -> None:
    c = configuration(Case())
    assert ds_config.unproven(c) == []
    c = config.replace(c, "machine.ds_config", knobs_file(tmp_path, {"overlap_comm": True}))
    with pytest.raises(InputError, match=r"--machine\.unproven lets it in"):
        ds_config.unproven(c)
    c = config.replace(config.replace(c, "machine.unproven", True), "machine.compile", True)
    assert ds_config.unproven(c) == ["zero_optimization.overlap_comm", "machine.compile"]
    c = configuration(Case(offload=True))
    assert ds_config.unproven(c) == ["zero_optimization.offload_optimizer"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], "--ranks 0: expected numbers of at least 1"),
        (["--out", "missing/table.md"], "--out 'missing/table.md': expected a file in a folder that exists"),
        (["--results", "missing/r.json"], "--results 'missing/r.json': expected a file in a folder that exists"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--parity", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_launch_must_be_among_the_ranks_it_covers() -> None:
    ranks = start(2, "megapix", ["doctor", "--parity", "--ranks", "4", "1"])
    assert [rank.code for rank in ranks] == [2, 2]
    assert "--ranks 4 1: expected this launch's 2 among them" in ranks[0].err

"""The benchmark of a step: parts that add up, MFU by hand, the plain eager step beside ours, and real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.plain_eager import PlainPixelDiT, PlainStep
from benchmarks.step import compare
from megapix import config
from megapix.bench import peak, stopwatch
from megapix.bench.command import batches, prepare
from megapix.bench.kernels import Kernels
from megapix.bench.options import StepOptions
from megapix.bench.peak import Matmul
from megapix.bench.report import Measured, Saves, numbers, table
from megapix.bench.step import PARTS
from megapix.bench.stopwatch import Spread, Stopwatch
from megapix.cli import main as cli
from megapix.config import BatchLayout, ModelConfig
from megapix.costs import flops
from megapix.dist import World
from megapix.errors import InputError
from megapix.model import PixelDiT
from tests.support.launch import ROOT, succeed
from tests.support.small_run import SMALL

CPU = torch.device("cpu")
TINY = StepOptions.of(config.tiny())


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_time_belongs_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 step 1 [forward 3] 6 [backward 10 [reduce 15] 21] 28: 10 s of the step are in no part."""
    monkeypatch.setattr(stopwatch.time, "perf_counter", iter([0, 1, 3, 6, 10, 15, 21, 28, 30, 31]).__next__)
    watch = Stopwatch(CPU)
    reduce = watch.timed("reduce", lambda x: x + 1)
    with watch.part("step"):
        with watch.part("forward"):
            pass
        with watch.part("backward"):
            assert reduce(2) == 3
    assert watch.read() == {"step": 1 + 3 + 7, "forward": 2, "backward": 4 + 6, "reduce": 5}
    with watch.part("step"):  # and the two seconds between the two are nobody's
        pass
    assert watch.read() == {"step": 1}


def test_a_part_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch.time, "perf_counter", iter([0, 1, 4, 9]).__next__)
    watch = Stopwatch(CPU)
    with watch.part("step"), pytest.raises(ZeroDivisionError), watch.part("inner"):
        raise ZeroDivisionError
    assert watch.read() == {"step": 6, "inner": 3}


def measured(saves: Saves | None = None) -> Measured:
    """Two steps of 8 images on 2 ranks: 2 s and 4 s."""
    first = dict.fromkeys(PARTS, 0.0) | {"patch_forward": 0.5, "backward": 1.0, "ema": 0.25, "unexplained": 0.25}
    second = dict.fromkeys(PARTS, 0.0) | {"patch_forward": 1.0, "backward": 2.0, "ema": 0.5, "unexplained": 0.5}
    products = {Matmul(8, 8, 8): 0.001, Matmul(16, 8, 8): 0.004}
    c = config.replace(config.tiny(), "machine.peak_tflops", 0.01)
    ran = Kernels({"flash for CPUs": 5}, 3, 0, {})
    return Measured(c, BatchLayout(4, 1, 2), CPU, [first, second], products, ran, saves)


def test_numbers_by_hand() -> None:
    """Median step 3 s: 8 / 3 images/s; each rank 4 / 3 of them, times the FLOPs of an image, over the best product."""
    n = numbers(measured())
    each = flops.training(config.tiny().model, 32) * 4 / 3 / 1e12
    assert n["step"] == {"median": 3.0, "low": 2.0, "high": 4.0, "each": [2.0, 4.0]}
    assert n["images_per_s"] == pytest.approx(8 / 3)
    assert n["tflops_per_rank"] == pytest.approx(each)
    assert (n["peak"]["tflops"], n["peak"]["product"]) == (0.004, "16 x 8 x 8")
    assert n["mfu"] == pytest.approx(each / 0.004)
    assert n["mfu_of_data_sheet"] == pytest.approx(each / 0.01)
    assert n["parts"]["backward"] == {"median": 1.5, "low": 1.0, "high": 2.0, "share": pytest.approx(3 / 6)}
    assert sum(part["share"] for part in n["parts"].values()) == pytest.approx(1)
    assert n["batch"] == {"micro": 4, "accumulation": 1, "ranks": 2, "total": 8}
    assert n["save"] is None
    assert n["kernels"] == {"attention": {"flash for CPUs": 5}, "graphs": 3, "fused": 0, "launches": {}}
    assert json.loads(json.dumps(n)) == json.loads(json.dumps(numbers(measured())))


def test_without_a_data_sheet_there_is_no_share_of_it() -> None:
    n = numbers(replace(measured(), config=config.tiny()))
    assert n["mfu_of_data_sheet"] is None
    assert n["peak"]["data_sheet_tflops"] is None
    assert "of the data sheet's: not known" in table(n)


def test_the_table_has_all_parts() -> None:
    text = table(numbers(measured(Saves([0.5, 0.25, 0.75], [2.0, 3.0, 4.0]))))
    for what in PARTS.values():
        assert f"\n{what} " in text
    assert "\nkernels   attention flash for CPUs x 5; 3 compiled graphs; plain pixel kernels\n" in text
    backward = next(line for line in text.splitlines() if line.startswith("backward"))
    assert backward.split()[-2:] == ["50.0", "%"]
    assert "save      training waits 0.5 s (0.25 to 0.75); written after 3 s (2 to 4)" in text
    assert "save      not timed: --save FOLDER does" in table(numbers(measured()))


def test_the_products_of_the_peak() -> None:
    """tiny: 4 images of 16 patches, width 128, 64 pixels of width 16 a patch."""
    found = peak.matmuls(config.tiny(), 4, "cpu")
    assert found[-5:] == [
        *(Matmul(64, 128, 384), Matmul(64, 128, 512), Matmul(64, 512, 128)),
        *(Matmul(64, 128, 6 * 1024), Matmul(64, 1024, 128)),
    ]
    assert Matmul(2, 3, 5).flops == 60
    for precision in ("bf16", "fp32"):
        assert all(tflops > 0 for tflops in peak.measure([Matmul(4, 8, 2)], precision, CPU).values())


def test_times_as_fast() -> None:
    """Ours 1, 2, 3 s; plain 2, 3, 9 s: 3 / 2 by the medians, and 2, 1.5 and 3 times by pairs."""
    found = compare([1.0, 2.0, 3.0], [2.0, 3.0, 9.0])
    assert found["ratio"] == 1.5
    assert found["ratio_of_pairs"] == {"median": 2.0, "low": 1.5, "high": 3.0}
    assert Spread(2.0, 1.5, 3.0).text() == "2 s (1.5 to 3)"


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "megapix bench 'nope' does not exist (one of: step)"),
        (["step", "tinyy"], "preset 'tinyy' does not exist (did you mean 'tiny'?)"),
        (["step", "--micro-batch", "4"], "the first argument is '--micro-batch': expected a preset"),
        (
            ["step", "tiny", "--machine.micro-batch", "8"],
            "machine.micro_batch = 8 has no effect beside --micro-batch 4: expected --micro-batch alone, "
            "or --micro-batch 0 for the run's own batch",
        ),
        (["step", "tiny", "--optim.global-batch", "8"], "optim.global_batch = 8 has no effect beside --micro-batch 4"),
    ],
)
def test_bad_commands(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_bad_options(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fits = replace(TINY, data=replace(TINY.data, image_size=16), model=replace(TINY.model, num_classes=3))
    for options, words in (
        (replace(TINY, repeats=0), "--repeats = 0: expected at least 1"),
        (replace(TINY, warmup=-1), "--warmup = -1: expected at least 0"),
        (replace(TINY, micro_batch=-1), "--micro-batch = -1: expected at least 0"),
        (replace(TINY, save=tmp_path / "none"), "expected a folder that exists"),
        (replace(TINY, out=tmp_path / "file" / "x.json"), "nothing can be written there"),
        (replace(TINY, model=replace(TINY.model, heads=3)), "model.heads = 3: expected a divisor"),
        (replace(TINY, machine=replace(TINY.machine, ds_config="nope")), "machine.ds_config = 'nope'"),
        (replace(TINY, data=replace(TINY.data, path=str(tmp_path))), str(tmp_path)),
        (replace(fits, data=replace(TINY.data, path=str(shards))), "data.image_size = 32, but the images"),
    ):
        with pytest.raises(InputError) as raised:
            prepare(options, 1)
        assert words in str(raised.value)


def test_what_a_step_consists_of(shards: Path) -> None:
    """One micro batch a rank by default; with 0 the run's own batch; made-up images differ by rank and go on."""
    assert prepare(TINY, 2).layout == BatchLayout(4, 1, 2)
    own = replace(TINY, micro_batch=0, machine=replace(TINY.machine, micro_batch=4))
    prepared = prepare(own, 2)
    assert prepared.layout == BatchLayout(4, 2, 2)
    assert prepared.config.optim == config.freeze(config.tiny(), 1).optim
    assert (prepared.config.machine.compile, prepared.config.machine.pixel_checkpointing) == (False, "none")
    made_up = batches(prepared, World(1, 2, 1), CPU)
    first, second = next(made_up), next(made_up)
    assert first.images.shape == (4, 3, 32, 32)
    assert first.images.dtype == torch.uint8
    assert (first.positions.tolist(), second.positions.tolist()) == (list(range(4, 8)), list(range(12, 16)))
    data = replace(TINY.data, path=str(shards), image_size=16, workers=0)
    fits = replace(TINY, data=data, model=replace(TINY.model, num_classes=3))
    assert next(batches(prepare(fits, 1), World(), CPU)).images.shape == (4, 3, 16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Plain eager
# ---------------------------------------------------------------------------------------------------------------------


def randomised(model: ModelConfig) -> PixelDiT:
    """Random numbers in every weight, those that start at zero too."""
    net = PixelDiT(model)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


@pytest.mark.parametrize(("mlp", "modulation"), [("gelu", "pre"), ("swiglu", "post")])
def test_plain_eager_is_the_same_network(mlp: str, modulation: str) -> None:
    """Outputs and gradients in fp32 within 1e-5 of the largest."""
    model = config.replace(config.replace(SMALL.model, "mlp", mlp), "modulation", modulation)
    ours, plain = randomised(model), PlainPixelDiT(model, 16)
    plain.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(3, 3, 16, 16, generator=generator) for _ in range(2))
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 2, 3])
    gradients = []
    for net in (ours, plain):
        out = net(x, t, y)
        (out - target).square().mean().backward()
        gradients.append({"output": out.detach()} | {name: p.grad for name, p in net.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize(("precision", "bf16"), [("fp32", "weights"), ("bf16", "weights"), ("bf16", "autocast")])
def test_a_plain_step(precision: str, bf16: str) -> None:
    """Every weight moves by AdamW's first step, at most the learning rate; the EMA follows; bf16 is rounded."""
    c = config.replace(SMALL, "precision", precision)
    initial = randomised(c.model).state_dict()
    step = PlainStep(c, initial, bf16, CPU)
    torch.manual_seed(0)
    step(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    for (name, p), master, average in zip(step.net.named_parameters(), step.masters, step.ema, strict=True):
        moved = (master - initial[name]).abs().max().item()
        assert 0.5 * c.optim.lr < moved <= 1.01 * c.optim.lr, name
        torch.testing.assert_close(average, initial[name].lerp(master.detach(), 0.1))
        assert p.dtype == (torch.bfloat16 if (precision, bf16) == ("bf16", "weights") else torch.float32)
        assert torch.equal(p, master.to(p.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Real runs
# ---------------------------------------------------------------------------------------------------------------------


def check_parts(n: dict) -> None:
    """Every part took time, but those that need not; together they are the steps."""
    assert list(n["parts"]) == list(PARTS)
    assert sum(part["share"] for part in n["parts"].values()) == pytest.approx(1)
    for name in PARTS:
        assert 0 < n["parts"][name]["low"] <= n["parts"][name]["median"] <= n["parts"][name]["high"]
    assert n["parts"]["unexplained"]["share"] < 0.5


@pytest.mark.long
def test_beside_plain_eager(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["tiny", "--repeats", "2", "--warmup", "1", "--micro-batch", "1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.step", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n = json.loads(out.read_text())
    check_parts(n)
    assert n["configuration"]["optim"]["global_batch"] == 1
    assert n["flops_per_image"] == flops.training(config.tiny().model, 32)
    assert n["mfu"] == pytest.approx(n["flops_per_image"] / n["step"]["median"] / n["peak"]["tflops"] / 1e12)
    assert (len(n["step"]["each"]), len(n["plain_eager"]["each"])) == (2, 2)
    assert n["plain_eager"]["ratio"] == pytest.approx(n["plain_eager"]["median"] / n["step"]["median"])
    assert f"ours / plain eager: {n['plain_eager']['ratio']:.3f} times as fast" in done.stdout


@pytest.mark.long
def test_on_two_ranks_with_real_data_and_saves(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["bench", "step", "tiny", "--data.path", shards, "--data.image-size", "16", "--model.num-classes", "3"]
    options += ["--precision", "bf16", "--micro-batch", "0", "--machine.micro-batch", "4", "--out", out]
    ranks = succeed(2, "megapix", [*options, "--save", tmp_path, "--repeats", "2", "--warmup", "1"])
    n = json.loads(out.read_text())
    check_parts(n)
    passes = 2 * (3 + 2)  # two micro batches; the tiny preset's blocks, of which none is recomputed
    assert n["kernels"] == {"attention": {"flash for CPUs": passes}, "graphs": 0, "fused": 0, "launches": {}}
    assert n["batch"] == {"micro": 4, "accumulation": 2, "ranks": 2, "total": 16}
    assert 0 < n["save"]["stall"]["median"] < n["save"]["written"]["low"]
    assert "MFU" in ranks[0].out
    assert "MFU" not in ranks[1].out
    assert list(tmp_path.iterdir()) == [out], "checkpoints are gone"

"""`megapix plan` against real ranks, against the network itself, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.bytes_sent import least
from benchmarks.made_up import told
from megapix import config
from megapix.cli import main as cli
from megapix.config import Config
from megapix.config.ds_config import read_knobs
from megapix.costs import assumptions, choose, flops, memory, parameters, save_interval, speed
from megapix.costs.assumptions import Assumptions, Machine, PlanOptions
from megapix.model import build
from tests.model.test_pixeldit_t2i import TEXT
from tests.programs.bytes_alive import configuration
from tests.support.launch import succeed

ZERO2 = read_knobs("zero2")
H100 = assumptions.machine(assumptions.check(PlanOptions()), "bf16", 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Against real ranks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "ranks"),
    [("tiny", 2)]
    + [pytest.param(*case, marks=pytest.mark.long) for case in (("tiny", 1), ("tiny", 4), ("t2i-tiny", 2))],
)
def test_real_ranks_hold_and_send_what_is_predicted(preset: str, ranks: int) -> None:
    for rank in succeed(ranks, "tests.programs.bytes_alive", [preset]):
        for precision, found in json.loads(rank.out.splitlines()[-1]).items():
            c = configuration(preset, precision, ranks)
            _check_memory(found["held"], c, ranks)
            _check_wire(found, c, ranks)


def _check_memory(held: dict[str, int], c: Config, ranks: int) -> None:
    b = memory.of_rank(c, ZERO2, ranks, 1, 1)
    expected = {part: getattr(b, part) for part in ("weights", "masters", "moments", "ema", "gradients", "bucket")}
    expected["between steps"] = b.states
    expected["as AdamW steps"] = b.states + b.gradients
    at_once = b.gradients + b.reducing if c.precision == "bf16" else b.reducing
    expected["as a bucket is reduced"] = b.states + b.bucket + at_once
    assert held == pytest.approx(expected, rel=0.02), (c.precision, ranks)


def _check_wire(found: dict[str, Any], c: Config, ranks: int) -> None:
    """ZeRO-2's minimum: each gradient is reduced to its owner, and weights are gathered once."""
    psi = parameters.count(c.model)
    gradients = psi - parameters.without_gradient(c.model)
    predicted = speed.sent_by(c.model, c.precision, ranks, 1, speed.passes_of(ZERO2))
    assert found["sent"] == pytest.approx(predicted.gradients + predicted.weights, rel=1e-3)
    assert found["sent"] == pytest.approx(least(psi, gradients, c.precision, ranks), rel=1e-3)
    # One rank's go nowhere, in the type and by the call that need least.
    call = (
        "reduce_ torch.float32"
        if ranks > 1
        else f"allreduce_ torch.{'bfloat16' if c.precision == 'bf16' else 'float32'}"
    )
    assert found["calls"][call] == pytest.approx(gradients, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Against the network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulation", ["pre", "post"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_parameters_are_the_networks(mlp: Any, modulation: Any) -> None:
    models = {config.preset(name).model for name in config.PRESETS}
    other_widths = {replace(m, pixel_attention_width=0 if m.pixel_attention_width else 3 * m.width) for m in models}
    for model in models | other_widths:
        model = replace(model, mlp=mlp, modulation=modulation)
        with torch.device("meta"):
            sizes = [p.numel() for p in build(model).parameters()]
        assert (parameters.count(model), parameters.largest(model)) == (sum(sizes), max(sizes)), model


def test_parameters_of_the_published_text_network() -> None:
    t2i = config.pixeldit_t2i()
    assert parameters.count(t2i) == 1_302_470_787
    assert parameters.without_gradient(t2i) == (1536 * 1536 + 1536) + 1536 + 3 * 1536 * 4096


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_parameters_without_a_gradient_are_the_networks(mlp: Any) -> None:
    for model in (TEXT, config.tiny().model):
        model = replace(model, mlp=mlp)
        with torch.device("meta"):
            net, images = build(model), torch.zeros(1, 3, 16, 16)
            net(images, torch.zeros(1), *told(model, 1, 5)).sum().backward()
        assert parameters.without_gradient(model) == sum(p.numel() for p in net.parameters() if p.grad is None)


def test_recomputed_products_by_hand() -> None:
    """XL: a PiT block has 22.6 GFLOPs, 14.5 of them its modulation's; the whole patch pathway about 220."""
    xl = config.pixeldit_xl()
    assert flops.recomputed(xl, 256, "none", "none") == 0
    assert flops.recomputed(xl, 256, "selective", "none") == 0
    assert flops.recomputed(xl, 256, "full", "none") / 1e9 == pytest.approx(4 * 22.6, abs=0.3)
    assert flops.recomputed(xl, 256, "selective_modulation", "none") / 1e9 == pytest.approx(4 * 14.5, abs=0.1)
    mlp = 2 * 2 * 256 * 256 * 16 * 64 / 1e9
    assert flops.recomputed(xl, 256, "chunked", "none") / 1e9 == pytest.approx(4 * (14.5 + mlp), abs=0.1)
    assert flops.recomputed(xl, 256, "none", "full") / 1e9 == pytest.approx(220, abs=1)
    assert flops.recomputed(xl, 256, "none", 2) * 2 == flops.recomputed(xl, 256, "none", "full")
    whole = flops.recomputed(xl, 256, "full", "full")
    assert whole < flops.forward(xl, 256) < 1.01 * whole, "all but the embedders"


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


def test_states_of_xl_by_hand() -> None:
    """Ψ = 797.5 M on 8 ranks: 1.595 GB of weights, and 16 bytes of states and 4 of gradients for an eighth of them."""
    c, psi = config.preset("xl-256"), 797.5e6
    b = memory.of_rank(c, ZERO2, 8, 32, 1)
    assert b.weights == pytest.approx(2 * psi, rel=1e-4)
    assert b.states == pytest.approx(2 * psi + 16 * psi / 8, rel=1e-4)
    assert b.gradients == pytest.approx(4 * psi / 8, rel=1e-4)
    assert b.bucket == 1_000_000_000, "500 M numbers"
    assert b.reducing == pytest.approx(6 * psi / 8, rel=1e-4), "what one owner gets, copied and widened"
    offloaded = memory.of_rank(c, read_knobs("zero2_offload"), 8, 32, 1)
    assert offloaded.states == b.weights
    assert offloaded.host == pytest.approx((20 + 2) * psi / 8, rel=1e-4)


def test_a_text_encoder_by_hand() -> None:
    """2.6 B parameters take 5.2 GB in bf16, and 2 x 2.6 G x 300 FLOPs of each caption."""
    c = config.replace(config.preset("t2i-1024-ms"), "machine.pixel_checkpointing", "none")
    without, used = (memory.of_rank(c, ZERO2, 8, 4, 8, parameters) for parameters in (0.0, 2.6e9))
    assert used.peak - without.peak == used.states - without.states == used.encoder == 5_200_000_000
    fp32 = memory.of_rank(config.replace(c, "text.dtype", "fp32"), ZERO2, 8, 4, 8, 2.6e9)
    assert fp32.encoder == 10_400_000_000
    with_encoder = replace(H100, text_encoder=2.6e9)
    none, s = (speed.of_step(c, ZERO2, 8, 1, 4, 8, m) for m in (H100, with_encoder))
    assert s.encoder == pytest.approx(32 * 2 * 2.6e9 * 300 / (989e12 * 0.68))
    assert s.total - none.total == pytest.approx(s.encoder)
    for x in choose.candidates(config.replace(c, "machine.micro_batch", 1), 8, 1, with_encoder):
        assert x.bytes.encoder == 5_200_000_000


def test_time_on_the_wire_by_hand() -> None:
    """8 GPUs, 450 GB/s of which 70 % are reached: 1 GB takes 3.17 ms and 7 hops of 5 µs. 2 nodes of 8 cards of 25 GB/s:
    1 GB at 140 GB/s takes 7.14 ms, and 15 hops of 15 µs."""
    assert speed.wire_seconds(1e9, 1, 8, 1, H100) == pytest.approx(1 / 315 + 35e-6)
    assert speed.wire_seconds(1e9, 2, 16, 2, H100) == pytest.approx(1 / 140 + 2 * 225e-6)
    assert speed.wire_seconds(1e9, 2, 1, 1, H100) == 0


def test_time_of_a_step_by_hand() -> None:
    c = config.replace(config.preset("xl-256"), "machine.pixel_checkpointing", "full")
    s = speed.of_step(c, ZERO2, 8, 1, 16, 2, H100)
    compute, attends, attention = 989e12 * 0.68, 989e12 * 0.2, 4 * 256**2 * 1152  # of a block
    assert s.matmuls == pytest.approx(32 * (0.933e12 - 3 * 30 * attention) / compute, rel=0.01)
    assert s.attention == pytest.approx(32 * 3.5 * 30 * attention / attends)
    again = 4 * (22.6e9 - attention) / compute + 4 * attention / attends
    assert s.recomputed == pytest.approx(32 * again, rel=0.01), "the PiT blocks"
    moved = speed.moved(c)
    read = ((moved.elementwise + moved.narrow) / 0.8 + moved.sums / 0.6) / 3350e9
    large = moved.launches - moved.matmuls - moved.small
    assert s.elementwise == pytest.approx(2 * (moved.small * 2e-6 + max(16 * read, large * 2e-6)))
    # After each of two micro batches; 8 owners and one bucket's end are 9 calls of 7 hops.
    assert s.reduced == pytest.approx(2 * (4 * 797.5e6 * 7 / 8 / 315e9 + 9 * 7 * 5e-6), rel=1e-3)
    everywhere = speed.of_step(c, read_knobs("zero2_allreduce"), 8, 1, 16, 2, H100)
    assert everywhere.reduced == pytest.approx(2 * 2 * (4 * 797.5e6 * 7 / 8 / 315e9 + 2 * 7 * 5e-6), rel=1e-3)
    assert s.gathered == pytest.approx(2 * 797.5e6 * 7 / 8 / 315e9, rel=0.01)
    assert s.ema == pytest.approx(12 * 797.5e6 / 8 / (3350e9 * 0.8), rel=1e-3)
    assert s.optimizer == pytest.approx(10 * 4 * 797.5e6 / 8 / (3350e9 * 0.8), rel=1e-3)
    # Each of two micro batches: 14 bytes of all parameters and 24 of the share. A step: 10 of the share, its gradients
    # zeroed and the weights made of the masters.
    assert s.staged == pytest.approx((2 * (14 + 24 / 8) + 10 / 8) * 797.5e6 / (3350e9 * 0.8), rel=1e-3)
    foreach = speed.of_step(config.replace(c, "machine.fused_adamw", False), ZERO2, 8, 1, 16, 2, H100)
    assert foreach.optimizer == pytest.approx(s.optimizer * 2.1), "21 numbers instead of 10"
    assert s.moved == 0
    parts = s.matmuls, s.attention, s.recomputed, s.elementwise, s.staged, s.reduced, s.optimizer, s.ema, s.gathered
    assert s.total == pytest.approx(sum(parts) + s.rest)


def test_a_step_that_nothing_slows_has_the_assumed_mfu() -> None:
    a = Assumptions(compute_share=0.5, attention_share=0.5 * 3.5 / 3, overhead=0.0, link_latency=0.0, launch=0.0)
    free = Machine(10**15, 1e15, 1e30, 1e30, 1e30, a)
    found = choose.candidates(config.preset("xl-256"), 8, 1, free)
    best = choose.best(found)
    assert best is not None
    assert best.mfu(free) == pytest.approx(0.5)
    machine = best.config.machine
    assert (machine.pixel_checkpointing, machine.patch_checkpointing) == ("none", "none"), "nothing is repeated"
    whole = next(
        x for x in found if x.config.machine.patch_checkpointing == x.config.machine.pixel_checkpointing != "none"
    )
    assert whole.mfu(free) == pytest.approx(0.5 * 3 / 4, rel=0.01), "a second forward pass counts in time, not in MFU"


def test_the_micro_batch_is_the_largest_divisor_that_fits() -> None:
    c = config.preset("xl-512")
    for x in choose.candidates(c, 8, 1, H100):
        micro, images = x.config.machine.micro_batch, 256 // 8
        assert micro * x.accumulation == images
        if x.fits and micro < images:
            larger = next(n for n in range(micro + 1, images + 1) if images % n == 0)
            knobs = read_knobs(x.config.machine.ds_config)
            assert x.bytes.peak <= H100.memory
            assert memory.of_rank(x.config, knobs, 8, larger, images // larger).peak > H100.memory
    (asked, *_) = choose.candidates(config.replace(c, "machine.micro_batch", 2), 8, 1, H100)
    assert (asked.config.machine.micro_batch, asked.accumulation) == (2, 16), "the user's own"


@pytest.mark.parametrize("asked", ["none", "full", 1, 3, 99])
def test_the_policy_asked_for_is_planned(asked: str | int) -> None:
    c = config.replace(config.preset("xl-256"), "machine.patch_checkpointing", asked)
    own = {"ds_config": "zero2", "pixel_checkpointing": "full", "patch_checkpointing": asked}  # among all of them
    found = [x.config.machine for x in choose.candidates(c, 8, 1, H100)]
    assert sum(all(getattr(m, key) == value for key, value in own.items()) for m in found) == 1
    assert len({x.ds_config for x in found}) == 3


def test_fused_kernels_are_not_planned_with_chunks() -> None:
    for kernels, planned in (("plain", True), ("triton", False)):
        c = config.replace(config.preset("xl-256"), "machine.pixel_kernels", kernels)
        found = {x.config.machine.pixel_checkpointing for x in choose.candidates(c, 8, 1, H100)}
        assert ("chunked" in found) == planned


def test_defaults_of_a_gpu_and_what_offload_takes_on_the_host() -> None:
    h200 = assumptions.check(PlanOptions(gpu="H200", assume=Assumptions(reserve="0GB")))
    assert assumptions.machine(h200, "bf16", 0.0).memory == 141 * 10**9


def test_a_gpu_by_any_of_its_names_and_one_of_which_all_is_given() -> None:
    for gpu in ("4090", "rtx 4090", "NVIDIA GeForce RTX 4090"):
        found = assumptions.check(PlanOptions(gpu=gpu, assume=Assumptions(reserve="0GB")))
        m = assumptions.machine(found, "bf16", 0.0)
        assert (found.gpu, m.memory, m.peak) == ("RTX 4090", 24 * 10**9, 165.2e12)
        assert (m.memory_bandwidth, m.link) == (1008e9, 32e9)
    other = PlanOptions(gpu="X1", gpu_memory="7GB", assume=Assumptions(reserve="0GB", memory=900.0, link=30.0))
    m = assumptions.machine(assumptions.check(other), "bf16", 70.0)
    assert (m.memory, m.peak, m.memory_bandwidth, m.link) == (7 * 10**9, 70e12, 900e9, 30e9)
    c = config.replace(config.preset("xl-256"), "machine.pixel_checkpointing", "offload")
    assert memory.of_rank(c, ZERO2, 8, 32, 1).host / 2**20 == pytest.approx(32 * 184.4, abs=4)


def test_checkpoint_interval_by_hand() -> None:
    """Two nodes that fail every 200 h each, a stall of 2 s: sqrt(2 x 2 x 360,000) = 1,200 s, then 600 s lost of it."""
    o = PlanOptions(mtbf=200.0, assume=Assumptions(pcie=1.0, write=10.0, restart=60.0))
    i = save_interval.interval(10**9, 8, 2, True, o)  # 16 GB, of which each rank copies 2
    assert (i.size, i.stall, i.writing, i.failures) == (16 * 10**9, 2.0, 1.6, 360_000.0)
    assert i.best == pytest.approx(1200.0)
    assert i.lost == pytest.approx(600 + 1.6 + 60)
    assert i.waste == pytest.approx(2 / 1200 + i.lost / 360_000)
    assert save_interval.interval(10**9, 8, 2, False, o).best == pytest.approx(math.sqrt(2 * 3.6 * 360_000))


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("79.5GiB", round(79.5 * 2**30)), ("1 TB", 10**12)])
def test_sizes(text: str, size: int) -> None:
    assert assumptions.read_bytes("--gpu-memory", text) == size


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["t2i-512", "t2i-1024-ms"])
def test_a_network_that_takes_text_is_planned(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", preset, "--gpus", "8"]) == 0
    stored = capsys.readouterr().out
    assert "1302.5 M parameters" in stored
    assert "Gemma-2-2B 5.2 GB, with --text-encoder-parameters 2.6e9" in stored
    assert "frozen text encoder, whole" not in stored
    assert cli.main(["plan", preset, "--gpus", "8", "--text-encoder-parameters", "2.6e9"]) == 0
    encoded = capsys.readouterr().out
    for text in ("frozen text encoder, whole on each GPU", "frozen text encoder's matmuls", "4.84"):
        assert text in encoded
    assert "Gemma-2-2B" not in encoded


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "xl-256", "--gpus", "8", "--machine.peak-tflops", "500", "--assume.link", "200"]) == 0
    out = capsys.readouterr().out
    for text in (
        "797.5 M parameters",
        "| --machine.peak-tflops ",
        "| --assume.link ",
        "## Scaling",
        "--checkpoint.every",
    ):
        assert text in out
    assert "A run takes by itself what is 'auto', from none, selective, selective_modulation, full: compiled" in out
    assert "| compiled, Triton kernels | " in out
    assert "requested" not in out, "nothing was"
    assert "Recommended, the fastest that fits: `--machine.pixel-checkpointing" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["xl-25"], "preset 'xl-25' does not exist (did you mean 'xl-256'?)"),
        (["xl-256", "--gpu-memory", "80"], "--gpu-memory = '80': expected a size such as 80GB or 79.5GiB"),
        (
            ["xl-256", "--gpu-memory", "4GB", "--assume.reserve", "6GB"],
            "--assume.reserve = '6GB': expected less than --gpu-memory = '4GB'",
        ),
        (["xl-256", "--gpu", "T4", "--gpu-memory", "16GB"], "of another GPU give --gpu-memory, --machine.peak-tflops"),
        (["xl-256", "--gpu", "H1000"], "--gpu = 'H1000': no data sheet is known (did you mean 'H100'?)"),
        (["xl-256", "--gpus", "0"], "--gpus = 0: expected at least 1"),
        (["xl-256", "--gpus", "8", "--nodes", "3"], "(8 = 3 x 2 + 2)"),
        (["xl-256", "--gpus", "12"], "12 GPUs on nodes of 8 leave one half empty"),
        (["xl-256", "--gpus", "7"], "optim.global_batch = 256 is not micro batch x accumulation x ranks"),
        (["xl-256", "--assume.wire-share", "1.5"], "--assume.wire-share = 1.5: expected a share, at most 1"),
        (["xl-256", "--assume.pcie", "0"], "--assume.pcie = 0.0: expected 0.001 to 1e+09"),
        (["xl-256", "--mtbf", "1e308"], "--mtbf = 1e+308: expected 0.001 to 1e+09 hours"),
        (["xl-256", "--images", "0"], "--images = 0: expected at least 1"),
        (
            ["xl-256", "--text-encoder-parameters", "1e9"],
            "= 1e+09 has no effect: the network takes classes",
        ),
        (
            ["t2i-512", "--text-encoder-parameters", "nan"],
            "= nan: expected 0 (features are stored) to 1e+12",
        ),
        (["xl-256", "--gpu-memory", "9" * 400 + "GB"], "expected a size such as 80GB"),
        (["tiny"], "precision = 'fp32': only bf16 peaks are known; give the GPU's with --machine.peak-tflops"),
        (["xl-256", "--gpu-memory", "6GB"], "GiB too few, even with pixel-checkpointing"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("gib", "micro", "expected"),
    [
        (20.0, 256, "expected a smaller --machine.micro-batch"),
        (4.0, 0, "expected --gpus 8 or more"),  # ZeRO-2 shares masters, moments, EMA and gradients out
        (2.0, 0, "nor do more GPUs help, up to optim.global_batch = 256: ZeRO-2 keeps all weights on each"),
    ],
)
def test_what_does_not_fit_says_what_would(gib: float, micro: int, expected: str) -> None:
    c, m = config.replace(config.preset("xl-256"), "machine.micro_batch", micro), replace(H100, memory=int(gib * 2**30))
    found = choose.candidates(c, 1, 1, m)
    assert choose.best(found) is None
    assert expected in str(choose.refuse(found, c, m, f"{gib}GiB"))

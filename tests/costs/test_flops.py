"""Model FLOPs by hand against torch's counter on the real network, and the MFU made of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.made_up import told
from megapix import config
from megapix.config import ModelConfig
from megapix.costs import flops
from megapix.model import build
from megapix.model.embed import TIMESTEP_CHANNELS
from megapix.model.pixeldit import CHANNELS
from tests.model.test_pixeldit_t2i import TEXT

SMALL = ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=3)
OWN_WIDTH = replace(SMALL, pixel_attention_width=24, pixel_heads=3)
CASES = {
    "small": (SMALL, 16, 0),
    "swiglu": (replace(SMALL, mlp="swiglu"), 24, 0),
    "post": (replace(SMALL, modulation="post"), 16, 0),
    "own attention width": (OWN_WIDTH, 16, 0),
    "swiglu and post, deeper": (
        ModelConfig(8, 64, 3, 4, 12, 3, mlp="swiglu", modulation="post", num_classes=2),
        32,
        0,
    ),
    "text": (TEXT, 16, 5),
    "text with gelu": (replace(TEXT, mlp="gelu", depth=1), 24, 7),
} | {name: (c.model, c.data.image_size, c.text.max_tokens) for name in config.PRESETS if (c := config.preset(name))}


def counted(model: ModelConfig, size: int, tokens: int, batch: int = 2) -> tuple[int, int]:
    """FLOPs of an image that torch counts, without computing: forward, and forward with backward."""
    with torch.device("meta"):
        net = build(model)
        inputs = torch.randn(batch, CHANNELS, size, size), torch.rand(batch), *told(model, batch, tokens)
    # The plain attention: its backward is four products, where the fused one computes the first product again.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = net(*inputs).square().mean()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() // batch, (forward.get_total_flops() + backward.get_total_flops()) // batch


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if "512" in case or "1024" in case else case for case in CASES]
)
def test_the_hand_count_is_what_torch_counts(case: str) -> None:
    model, size, tokens = CASES[case]
    forward, both = counted(model, size, tokens)
    assert flops.forward(model, size, tokens) == forward
    # Images, text and sinusoids need no gradient: that of the layers which read them is the only product left out.
    patches, pixels = (size // model.patch_size) ** 2, size**2
    unneeded = 2 * patches * CHANNELS * model.patch_size**2 * model.width
    unneeded += 2 * pixels * CHANNELS * model.pixel_width + 2 * TIMESTEP_CHANNELS * model.width
    unneeded += 2 * tokens * model.text_width * model.width
    assert flops.training(model, size, tokens) - unneeded == both


def test_a_run_is_counted_with_the_longest_captions_and_classes_have_none() -> None:
    text, classes = config.preset("t2i-512"), config.preset("xl-256")
    assert flops.of_run(text) == flops.training(text.model, 512, 300) > flops.training(text.model, 512, 299)
    assert flops.of_run(classes) == flops.training(classes.model, 256)


def test_the_paper_models_cost_what_is_known_of_them() -> None:
    """XL at 256 pixels: 311 G forward, of which the patch pathway 220 G and each PiT block 22.6 G; 0.93 T a step."""
    xl = config.pixeldit_xl()
    without = config.replace(xl, "pixel_depth", 3)
    assert flops.forward(xl, 256) / 1e9 == pytest.approx(311, abs=0.5)
    assert (flops.forward(xl, 256) - flops.forward(without, 256)) / 1e9 == pytest.approx(22.6, abs=0.05)
    assert flops.forward(config.replace(xl, "pixel_depth", 0), 256) / 1e9 == pytest.approx(220, abs=1)
    assert flops.training(xl, 256) / 1e12 == pytest.approx(0.93, abs=0.005)


def test_peaks_by_name() -> None:
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.0,
        "NVIDIA H200 NVL": 835.0,
        "NVIDIA GH200 480GB": 989.0,
        "NVIDIA B200": 2250.0,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,  # a slice of one
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 4090 D": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 5090": 209.5,
        "NVIDIA RTX A6000": 154.8,
        "NVIDIA RTX 6000 Ada Generation": None,
        "NVIDIA L40S": 362.0,
        "NVIDIA L40": None,
        "NVIDIA H20": 148.0,
        "NVIDIA H800": 989.0,
        "NVIDIA H800 PCIe": 756.0,
        "AMD Instinct MI300X": 1307.4,
        "NVIDIA GeForce RTX 3090": None,
    }
    assert {name: flops.peak_by_name(name) for name in peaks} == peaks


def test_no_mfu_where_the_peak_is_unknown_and_the_option_has_the_last_word() -> None:
    cpu = torch.device("cpu")
    assert flops.peak_of(config.preset("xl-256"), cpu) is None
    assert flops.peak_of(config.replace(config.tiny(), "machine.peak_tflops", 0.1), cpu) == 0.1


def test_mfu_by_hand() -> None:
    """1,000 images/s of 0.93 TFLOP on 8 ranks are 116.25 TFLOP/s on each: 37.26 % of an A100."""
    row = flops.speed(1_000.0, 930_000_000_000, 8, 312.0)
    assert row == {"speed/tflops_per_rank": pytest.approx(116.25), "speed/mfu": pytest.approx(0.37260, rel=1e-4)}
    assert list(flops.speed(1.0, 1, 1, None)) == ["speed/tflops_per_rank"], "no peak, no MFU"

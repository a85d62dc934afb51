"""Samplers against flows with known solutions, the guidance interval, seeds, and the picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megapix import sample
from megapix.config import ModelConfig
from megapix.model import PixelDiT


class Analytic:
    """A velocity given by a formula; counts its evaluations and remembers what it was asked."""

    null_class = 5

    def __init__(self, formula: object) -> None:
        self.formula, self.calls = formula, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.append((t[0].item(), y.tolist()))
        return self.formula(x, t[:, None, None, None], y)  # type: ignore[operator]


LABELS = torch.tensor([1, 2])


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", ["euler", "ab2"])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_velocity_lands_on_the_image(sampler: sample.Sampler, steps: int, shift: float) -> None:
    image, start = torch.full((2, 3, 4, 4), 0.5), noise()
    net = Analytic(lambda x, t, y: image - start)
    out = sample.generate(net, start, LABELS, sampler=sampler, steps=steps, shift=shift)
    torch.testing.assert_close(out, image, rtol=0, atol=2e-6)
    assert len(net.calls) == steps


def test_time_grid() -> None:
    assert sample.time_grid(4, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert sample.time_grid(2, 3.0) == [0.0, 0.25, 1.0]  # shift(0.5) = 0.5 / (0.5 + 0.5·3)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(sampler: sample.Sampler, order: int) -> None:
    # dx/dt = cos(3t)·x has x(1) = x(0)·exp(sin(3)/3)
    net = Analytic(lambda x, t, y: torch.cos(3 * t) * x)
    start = torch.ones(2, 3, 1, 1)
    exact = float(np.exp(np.sin(3.0) / 3.0))
    errors = [
        abs(sample.generate(net, start, LABELS, sampler=sampler, steps=steps)[0, 0, 0, 0].item() - exact)
        for steps in (20, 40, 80)
    ]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2.0**order, rel=0.15)


def test_ab2_by_hand() -> None:
    # v = t on three equal steps: Euler with v0 = 0, then dt·(1.5·1/3 - 0), then dt·(1.5·2/3 - 0.5·1/3)
    net = Analytic(lambda x, t, y: t.expand_as(x))
    out = sample.generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="ab2", steps=3)
    assert out[0, 0, 0, 0].item() == pytest.approx((0 + 0.5 + 5 / 6) / 3, rel=1e-6)


def test_guidance_acts_strictly_inside_its_interval_and_costs_nothing_outside() -> None:
    net = Analytic(lambda x, t, y: torch.where(y == 5, 1.0, 3.0)[:, None, None, None].expand_as(x))
    out = sample.generate(
        net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=4, guidance=2.0, interval=(0.25, 0.75)
    )
    # conditional 3, unconditional 1, guided 1 + 2·(3 - 1) = 5, and only t = 0.5 lies strictly between the bounds
    assert out[0, 0, 0, 0].item() == pytest.approx((3 + 3 + 5 + 3) / 4)
    assert net.calls == [(0.0, [1, 2]), (0.25, [1, 2]), (0.5, [1, 2, 5, 5]), (0.75, [1, 2])]


def test_guidance_of_one_is_the_conditional_velocity() -> None:
    net = Analytic(lambda x, t, y: torch.where(y == 5, 1.0, 3.0)[:, None, None, None].expand_as(x))
    out = sample.generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=4, guidance=1.0)
    assert out[0, 0, 0, 0].item() == pytest.approx(3.0)
    assert all(labels == [1, 2] for _, labels in net.calls)


def test_interval_is_compared_in_fp32() -> None:
    # 0.1 in float64 lies below float32's 0.1, which is a point of this grid: it must count as the bound, not above it.
    net = Analytic(lambda x, t, y: x)
    sample.generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=10, guidance=2.0, interval=(0.1, 0.25))
    guided = [round(t, 2) for t, labels in net.calls if len(labels) == 4]
    assert guided == [0.2]


def test_refuses_unknown_samplers_and_no_steps() -> None:
    net = Analytic(lambda x, t, y: x)
    with pytest.raises(ValueError, match="expected one of euler, ab2"):
        sample.generate(net, noise(), LABELS, sampler="dpm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps = 0"):
        sample.generate(net, noise(), LABELS, steps=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    net = PixelDiT(ModelConfig(4, 32, 2, 2, 8, 1, num_classes=3)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    device = torch.device("cpu")
    together = sample.generate(net, sample.seeded_noise(3, [0, 1, 2], (8, 8), device), torch.tensor([0, 1, 2]), steps=3)
    alone = sample.generate(net, sample.seeded_noise(3, [2], (8, 8), device), torch.tensor([2]), steps=3)
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-5)


def test_pixels_and_grid(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0, 9.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    pixels = sample.to_uint8(images)
    assert pixels[:, 0, 0, 0].tolist() == [0, 255, 128, 255]
    sheet = sample.grid(pixels, columns=2, gap=1)
    assert sheet.shape == (7, 7, 3)
    assert [sheet[1, 1, 0], sheet[1, 4, 0], sheet[4, 1, 0], sheet[0, 0, 0]] == [0, 255, 128, 255]
    sample.write_png(tmp_path / "made" / "grid.png", sheet, zoom=2)
    with Image.open(tmp_path / "made" / "grid.png") as picture:
        assert picture.size == (14, 14)
        assert picture.getpixel((3, 3)) == (0, 0, 0)

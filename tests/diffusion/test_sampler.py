"""Samplers against flows with known solutions, the guidance interval, seeds, and the picture."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from megapix import sample
from megapix.config import ModelConfig
from megapix.diffusion.condition import classes
from megapix.diffusion.pictures import grid, to_uint8, write_png
from megapix.diffusion.sampler import SAMPLERS, generate, seeded_noise, time_grid
from megapix.model import PixelDiT, build


class Analytic:
    """A velocity given by a formula; counts its evaluations and records their inputs."""

    def __init__(self, formula: object) -> None:
        self.formula, self.calls = formula, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.append((t[0].item(), y.tolist()))
        return self.formula(x, t[:, None, None, None], y)  # type: ignore[operator]


LABELS = classes(torch.tensor([1, 2]), 5)


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_velocity_lands_on_the_image(sampler: sample.Sampler, steps: int, shift: float) -> None:
    image, start = torch.full((2, 3, 4, 4), 0.5), noise()
    net = Analytic(lambda x, t, y: image - start)
    out = generate(net, start, LABELS, sampler=sampler, steps=steps, shift=shift)
    torch.testing.assert_close(out, image, rtol=0, atol=2e-6)
    assert len(net.calls) == (2 * steps - 1 if sampler == "heun" else steps)


def test_time_grid() -> None:
    assert time_grid(4, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert time_grid(2, 3.0) == [0.0, 0.25, 1.0]  # shift(0.5) = 0.5 / (0.5 + 0.5·3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_order_of_convergence(sampler: sample.Sampler, order: int, shift: float) -> None:
    """On the rectified flow of images whose pixels are normal with mean m and deviation s.

    E[x - ε | x_t] and its solution are known: x_t has the variance var = t²s² + (1-t)² around t·m, the velocity is
    m + (t·s² - (1-t)) / var · (x_t - t·m), and noise ε becomes m + s·ε. All steps count, Euler's first and last too.
    """
    m, s, start = 0.3, 0.5, noise()

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return m + (t * s**2 - (1 - t)) / ((t * s) ** 2 + (1 - t) ** 2) * (x - t * m)

    errors = [
        (generate(Analytic(velocity), start, LABELS, sampler=sampler, steps=steps, shift=shift) - m - s * start)
        .square()
        .mean()
        .sqrt()
        .item()
        for steps in (40, 80, 160)
    ]
    assert errors[-1] < 0.01
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_jump_of_a_guidance_interval_leaves_first_order(sampler: sample.Sampler) -> None:
    # dx/dt = w·cos(3t)·x has x(1) = x(0)·exp(∫ w·cos 3t), with w = 2 where guidance acts, from 0.1 to 0.9.
    net = Analytic(lambda x, t, y: torch.where(y == 5, 0.0, 1.0)[:, None, None, None] * torch.cos(3 * t) * x)
    exact = math.exp((math.sin(3.0) + math.sin(2.7) - math.sin(0.3)) / 3)
    start, errors = torch.ones(2, 3, 1, 1), []
    for steps in (100, 200, 400):
        out = generate(net, start, LABELS, sampler, steps, guidance=2.0, interval=(0.1, 0.9))
        errors.append(abs(out[0, 0, 0, 0].item() - exact))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.25)


def test_heun_by_hand() -> None:
    # v = x + t from x = 1 on t = 0, 1/2, 1: v1 = 1, Euler's point 3/2, v2 = 3/2 + 1/2 = 2, so x = 1 + 1/2·3/2 = 7/4;
    # then the last step, Euler's: v = 7/4 + 1/2 = 9/4, x = 7/4 + 1/2·9/4 = 23/8
    net = Analytic(lambda x, t, y: x + t)
    out = generate(net, torch.ones(2, 3, 1, 1), LABELS, sampler="heun", steps=2)
    assert out[0, 0, 0, 0].item() == 23 / 8


def test_ab2_by_hand() -> None:
    # v = t on three equal steps: Euler with v0 = 0, then dt·(1.5·1/3 - 0), then dt·(1.5·2/3 - 0.5·1/3)
    net = Analytic(lambda x, t, y: t.expand_as(x))
    out = generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="ab2", steps=3)
    assert out[0, 0, 0, 0].item() == pytest.approx((0 + 0.5 + 5 / 6) / 3, rel=1e-6)


def test_guidance_acts_strictly_inside_its_interval_and_costs_nothing_outside() -> None:
    net = Analytic(lambda x, t, y: torch.where(y == 5, 1.0, 3.0)[:, None, None, None].expand_as(x))
    out = generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=4, guidance=2.0, interval=(0.25, 0.75))
    # conditional 3, unconditional 1, guided 1 + 2·(3 - 1) = 5, and only t = 0.5 lies strictly between the bounds
    assert out[0, 0, 0, 0].item() == pytest.approx((3 + 3 + 5 + 3) / 4)
    assert net.calls == [(0.0, [1, 2]), (0.25, [1, 2]), (0.5, [1, 2, 5, 5]), (0.75, [1, 2])]


def test_each_of_heuns_evaluations_looks_at_the_interval_itself() -> None:
    net, steps = Analytic(lambda x, t, y: torch.where(y == 5, 1.0, 3.0)[:, None, None, None].expand_as(x)), []
    out = generate(
        net,
        torch.zeros(2, 3, 1, 1),
        LABELS,
        sampler="heun",
        steps=4,
        guidance=2.0,
        interval=(0.25, 0.75),
        each_step=lambda: steps.append(len(net.calls)),
    )
    plain, guided = [1, 2], [1, 2, 5, 5]
    assert net.calls == [
        (0.0, plain), (0.25, plain), (0.25, plain), (0.5, guided), (0.5, guided), (0.75, plain), (0.75, plain),
    ]  # fmt: skip
    assert out[0, 0, 0, 0].item() == pytest.approx((3 + 4 + 4 + 3) / 4)
    assert steps == [0, 2, 4, 6], "once a step, so that ranks without an image can keep pace"


def test_guidance_of_one_is_the_conditional_velocity() -> None:
    net = Analytic(lambda x, t, y: torch.where(y == 5, 1.0, 3.0)[:, None, None, None].expand_as(x))
    out = generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=4, guidance=1.0)
    assert out[0, 0, 0, 0].item() == pytest.approx(3.0)
    assert all(labels == [1, 2] for _, labels in net.calls)


def test_interval_is_compared_in_fp32() -> None:
    # 0.1 in float64 lies below float32's 0.1, which is a point of this grid: it must count as the bound, not above it.
    net = Analytic(lambda x, t, y: x)
    generate(net, torch.zeros(2, 3, 1, 1), LABELS, sampler="euler", steps=10, guidance=2.0, interval=(0.1, 0.25))
    guided = [round(t, 2) for t, labels in net.calls if len(labels) == 4]
    assert guided == [0.2]


def test_refuses_unknown_samplers_and_no_steps() -> None:
    net = Analytic(lambda x, t, y: x)
    with pytest.raises(ValueError, match="expected one of euler, heun, ab2"):
        generate(net, noise(), LABELS, sampler="dpm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps = 0"):
        generate(net, noise(), LABELS, steps=0)


MODEL = ModelConfig(4, 32, 2, 2, 8, 1, num_classes=3)


def small_network(model: ModelConfig) -> PixelDiT:
    torch.manual_seed(0)
    net = build(model).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


def test_labels_are_taken_with_the_null_class_of_the_network() -> None:
    net, labels = small_network(MODEL), torch.tensor([2, 0, 1])
    start = seeded_noise(3, [0, 1, 2], (8, 8), torch.device("cpu"))
    images = [
        generate(net, start, of, steps=3, guidance=2.5) for of in (labels, classes(labels, 3), classes(labels, 2))
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2]), "the null class decides what guidance leads away from"


def test_labels_need_a_network_that_says_its_classes() -> None:
    start, labels = noise(), torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"need a network whose config\.num_classes is above 0"):
        generate(Analytic(lambda x, t, y: x), start, labels)
    text = replace(MODEL, num_classes=0, text_width=12, text_tokens=5)
    with pytest.raises(TypeError, match=r"expected a Condition \(megapix\.condition\) for a network that takes text"):
        generate(small_network(text), start, labels)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_or_rank(sampler: sample.Sampler) -> None:
    """Five images sampled at once, and as two ranks sample them."""
    net = small_network(MODEL)

    def images(numbers: list[int]) -> torch.Tensor:
        start = seeded_noise(3, numbers, (8, 8), torch.device("cpu"))
        labels = classes(torch.tensor([number % 3 for number in numbers]), 3)
        return generate(net, start, labels, sampler, steps=3, guidance=1.5, interval=(0.1, 0.9))

    together = images([0, 1, 2, 3, 4])
    for rank in (0, 1):
        mine = images(list(range(rank, 5, 2)))
        torch.testing.assert_close(together[rank::2], mine, rtol=1e-5, atol=1e-5)


def test_pixels_and_grid(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0, 9.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    pixels = to_uint8(images)
    assert pixels[:, 0, 0, 0].tolist() == [0, 255, 128, 255]
    sheet = grid(pixels, columns=2, gap=1)
    assert sheet.shape == (7, 7, 3)
    assert [sheet[1, 1, 0], sheet[1, 4, 0], sheet[4, 1, 0], sheet[0, 0, 0]] == [0, 255, 128, 255]
    write_png(tmp_path / "made" / "grid.png", sheet, zoom=2)
    with Image.open(tmp_path / "made" / "grid.png") as picture:
        assert picture.size == (14, 14)
        assert picture.getpixel((3, 3)) == (0, 0, 0)

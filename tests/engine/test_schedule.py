"""Learning rate in images seen, computed by hand; and what DeepSpeed may and may not hide."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megapix.config import OptimConfig, preset
from megapix.engine.schedule import ImagesSeenSchedule, learning_rate

EPOCH = 1_281_167
CONFIG = OptimConfig(global_batch=4, lr=0.5, lr_after=0.125, lr_step_at=12, end_at=24)


def test_constant_then_one_step_in_images() -> None:
    expected = {0: 0.5, 4: 0.5, 8: 0.5, 11: 0.5, 12: 0.125, 16: 0.125, 10**12: 0.125}
    assert {images: learning_rate(images, CONFIG) for images in expected} == expected


@pytest.mark.parametrize("size", ["b-256", "l-256", "xl-256"])
def test_imagenet_presets_step_after_epoch_160(size: str) -> None:
    o = preset(size).optim
    assert (o.lr_step_at, o.end_at) == (204_986_720, 409_973_440)
    assert learning_rate(0, o) == 1e-4
    assert learning_rate(160 * EPOCH - 1, o) == 1e-4
    assert learning_rate(160 * EPOCH, o) == 1e-5
    assert learning_rate(320 * EPOCH, o) == 1e-5


def test_512_presets_keep_the_rate() -> None:
    o = preset("xl-512").optim
    assert learning_rate(850 * EPOCH, o) == 1e-4


def test_warmup_is_linear_and_off_by_default() -> None:
    warm = dataclasses.replace(CONFIG, warmup=8)
    assert [learning_rate(images, warm) for images in (0, 2, 4, 8, 12)] == [0.0, 0.125, 0.25, 0.5, 0.125]
    assert OptimConfig().warmup == 0


def test_the_milestone_does_not_move_with_the_global_batch() -> None:
    rates = {}
    for batch in (4, 6, 12):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
        schedule = ImagesSeenSchedule(optimizer, dataclasses.replace(CONFIG, global_batch=batch))
        rates[batch] = []
        while schedule.images_seen < 24:
            rates[batch].append((schedule.images_seen, optimizer.param_groups[0]["lr"]))
            schedule.step()
    for series in rates.values():
        assert all(lr == (0.5 if images < 12 else 0.125) for images, lr in series)


def test_state_is_the_count_and_the_rate_follows_this_runs_configuration() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    schedule = ImagesSeenSchedule(optimizer, dataclasses.replace(CONFIG, lr_after=0.25))
    schedule.load_state_dict({"images_seen": 12})
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert schedule.state_dict() == {"images_seen": 12}
    with pytest.raises(TypeError):
        schedule.step(64)  # type: ignore[call-arg]

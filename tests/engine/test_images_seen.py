"""The learning rate where no span is a multiple of the batch."""

from __future__ import annotations

import torch

from megapix.config import OptimConfig
from megapix.engine.schedule import ImagesSeenSchedule

CONFIG = OptimConfig(global_batch=8, lr=0.5, lr_after=0.125, lr_step_at=33, warmup=20)


def test_the_rate_of_each_step() -> None:
    """A step has the rate of the images seen when it starts: of 8, warm-up until 20 and the milestone at 33."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    schedule, rates = ImagesSeenSchedule(optimizer, CONFIG), {}
    for _ in range(7):
        rates[schedule.images_seen] = optimizer.param_groups[0]["lr"]
        schedule.step()
    assert rates == {0: 0.0, 8: 0.2, 16: 0.4, 24: 0.5, 32: 0.5, 40: 0.125, 48: 0.125}


def test_the_milestone_within_a_step_and_at_its_edges() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    schedule, rates = ImagesSeenSchedule(optimizer, CONFIG), {}
    for seen in (31, 32, 33, 34, 40):
        schedule.load_state_dict({"images_seen": seen})
        rates[seen] = schedule.get_last_lr()
    assert rates == {31: [0.5], 32: [0.5], 33: [0.125], 34: [0.125], 40: [0.125]}

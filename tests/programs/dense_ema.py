"""One rank of the EMA test: trains with DeepSpeed and keeps a dense fp32 EMA of the gathered masters beside it.

usage: python -m tests.programs.dense_ema PRECISION SUBJECT SHARDS [DS_CONFIG]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megapix import config
from megapix.diffusion import flow
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from tests.support.small_run import STEP_BATCH
from tests.support.trained import Subject

STEPS, SKIPPED, LR_STEP = 8, (0, 4), 3


def main(precision: str, name: str, shards: str, ds_config: str = "zero2") -> None:
    world = from_environment()
    processes.start(world)
    subject = Subject(name, Path(shards))
    c = config.replace(config.replace(subject.config, "precision", precision), "optim.lr_step_at", LR_STEP * STEP_BATCH)
    c = config.replace(c, "machine.ds_config", ds_config)
    layout = config.batch_layout(c, world.size)
    net = build_network(c.model, seed=1)
    initial = {name: p.detach().clone() for name, p in net.named_parameters()}
    e = zero2.build(c, layout, net)
    read = subject.samples(seed=0)
    parameters = dict(net.named_parameters())

    def masters() -> dict[str, torch.Tensor]:
        return {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items()}

    dense, rates = masters(), []
    for name, value in initial.items():
        assert torch.equal(dense[name], value), f"{name}: the masters do not start from the fp32 weights"
    for step in range(STEPS):
        before = masters()
        positions = np.arange(step * STEP_BATCH, (step + 1) * STEP_BATCH)
        mine = positions.reshape(world.size, -1)[world.rank]
        loss, _ = flow.training_loss(e, *read(mine), mine, c.seed, c.flow)
        rates.append(e.schedule.get_last_lr()[0])
        e.backward(loss.mean() * (float("inf") if step in SKIPPED and world.rank == world.size - 1 else 1.0))
        e.step()
        after = masters()
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (step not in SKIPPED), f"step {step} moved the masters: {moved}"
        assert e.applied == (step not in SKIPPED)
        if moved:
            for name, master in after.items():
                dense[name] = torch.lerp(dense[name], master, 1.0 - c.optim.ema_decay)

    applied = STEPS - len(SKIPPED)
    assert e.schedule.images_seen == applied * STEP_BATCH
    expected = [0.0] * STEPS
    seen = 0
    for step in range(STEPS):  # the rate steps down after three *applied* steps
        expected[step] = c.optim.lr if seen < LR_STEP else c.optim.lr_after
        seen += step not in SKIPPED
    assert rates == expected, rates

    final = masters()
    for name, p in parameters.items():
        ema = safe_get_full_optimizer_state(p, "ema")
        assert ema.dtype == torch.float32
        assert torch.equal(ema, dense[name]), f"{name}: EMA differs by {(ema - dense[name]).abs().max()}"
    assert any(not torch.equal(final[name], dense[name]) for name in final), "the EMA lags behind the weights"

    training = {name: p.detach().clone() for name, p in parameters.items()}
    with e.ema_weights() as ema_net:
        assert not ema_net.training
        for name, p in ema_net.named_parameters():
            assert torch.equal(p, dense[name].to(p.dtype)), f"{name}: not the EMA"
    assert net.training
    for name, p in parameters.items():
        assert torch.equal(p, training[name]), f"{name}: the training weights did not come back"
    leave(world, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

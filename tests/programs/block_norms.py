"""One rank of the block norms' test: steps with DeepSpeed under a `Watch`, against torch's autograd on the whole batch.

usage: python -m tests.programs.block_norms PRECISION MODULATION CHECKPOINTING SHARDS
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

from megapix import config
from megapix.config import Config
from megapix.data.batch import Batch
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion import flow
from megapix.diffusion.condition import classes
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.model import PixelDiT
from megapix.monitoring import block_norms
from tests.support.small_run import SMALL, STEP_BATCH

WATCHED = (6, 8)
"""Steps. Before them, layers that start at zero keep gradients from others. Gradients are clipped in both."""
SKIPPED = 7
ACCUMULATION = 2


def main(precision: str, modulation: str, checkpointing: str, shards: str) -> None:
    world = from_environment()
    device = processes.start(world)
    c = config.replace(config.replace(SMALL, "precision", precision), "model.modulation", modulation)
    c = config.replace(c, "machine.pixel_checkpointing", checkpointing)
    c = config.replace(c, "machine.micro_batch", STEP_BATCH // world.size // ACCUMULATION)
    layout = config.batch_layout(c, world.size)
    e = zero2.build(c, layout, build_network(c.model, 1, c.machine))
    reading = config.replace(c.data, "path", shards)
    data = MicroBatches(locate(reading), reading, 0, STEP_BATCH)
    for step in range(max(WATCHED) + 1):
        positions = np.arange(step * STEP_BATCH, (step + 1) * STEP_BATCH)
        whole = data[positions]
        expected = reference(e.network, whole, c) if step in WATCHED else {}
        watch = block_norms.Watch(e) if step in (*WATCHED, SKIPPED) else None
        for mine in positions.reshape(ACCUMULATION, world.size, -1)[:, world.rank]:
            batch = data[mine]
            loss, _ = flow.training_loss(
                e, batch.images, classes(batch.labels, c.model.num_classes), batch.positions, c.seed, c.flow
            )
            e.backward(loss.mean() * (float("inf") if step == SKIPPED else 1.0))
            e.step()
        found = watch.read(world.size) if watch else {}
        if step in WATCHED:
            compare(found, expected, 1e-4 if precision == "fp32" else 0.02)
            total = sum(value**2 for tag, value in found.items() if "grad_norm" in tag) ** 0.5
            norm = float(e.grad_norm)
            assert norm > c.optim.grad_clip, "clipping was hit, so undoing it was tested"
            assert abs(total / norm - 1) < 1e-4, f"the blocks' norms make {total}, the whole gradient's is {norm}"
        assert step != SKIPPED or found == {}, "a skipped step has no norms"
    assert not any(
        block.adaLN_modulation._forward_hooks for block in (*e.network.patch_blocks, *e.network.pixel_blocks)
    )
    assert not e.optimizer._optimizer_step_pre_hooks, "hooks stayed in the optimizer"
    assert device.type == "cpu"
    leave(world, 0)


def reference(net: PixelDiT, batch: Batch, c: Config) -> dict[str, float]:
    """Norms of a plain process: the same weights in fp32, the whole batch at once, names and parts by hand."""
    plain = PixelDiT(c.model)
    plain.load_state_dict({name: tensor.float() for name, tensor in net.state_dict().items()})
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        module = plain.get_submodule(name).adaLN_modulation
        module.register_forward_hook(lambda _module, _inputs, out: outputs.update({name: out.detach()}))

    for i in range(c.model.depth):
        keep(f"patch_blocks.{i}")
    for i in range(c.model.pixel_depth):
        keep(f"pixel_blocks.{i}")
    loss, _ = flow.training_loss(
        plain, batch.images, classes(batch.labels, c.model.num_classes), batch.positions, c.seed, c.flow
    )
    loss.mean().backward()

    def norm(module: nn.Module) -> float:
        return sum(float(p.grad.double().square().sum()) for p in module.parameters()) ** 0.5

    def rms(tensor: torch.Tensor) -> float:
        return float(tensor.double().square().mean() ** 0.5)

    row = {}
    for name in ("s_embedder", "t_embedder", "y_embedder", "pixel_embedder", "final_layer"):
        row[f"blocks/grad_norm/{name}"] = norm(plain.get_submodule(name))
    for i in range(c.model.depth):
        row[f"blocks/grad_norm/patch_0{i}"] = norm(plain.patch_blocks[i])
        row[f"blocks/modulation_rms/patch_0{i}"] = rms(outputs[f"patch_blocks.{i}"])
    six, four = ["shift1", "scale1", "gate1", "shift2", "scale2", "gate2"], ["scale1", "shift1", "scale2", "shift2"]
    parts = six if c.model.modulation == "pre" else four
    for i in range(c.model.pixel_depth):
        row[f"blocks/grad_norm/pit_{i}"] = norm(plain.pixel_blocks[i])
        numbers = outputs[f"pixel_blocks.{i}"].unflatten(-1, (c.model.patch_size**2, len(parts), c.model.pixel_width))
        for k, part in enumerate(parts):
            row[f"blocks/modulation_rms/pit_{i}/{part}"] = rms(numbers[..., k, :])
    return row


def compare(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for tag, value in expected.items():
        assert value > 0, f"{tag} is zero, so nothing is compared"
        assert abs(found[tag] / value - 1) < tolerance, f"{tag}: {found[tag]} instead of {value}"


if __name__ == "__main__":
    main(*sys.argv[1:])

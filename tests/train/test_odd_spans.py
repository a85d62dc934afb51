"""A run of two ranks in which no span is a multiple of the batch, with accumulation and a skipped step, by hand."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.write import write
from megapix import load_model
from megapix.checkpoint.folder import complete
from megapix.checkpoint.manifest import Counters, read_state
from megapix.diffusion import flow
from megapix.diffusion.condition import classes
from megapix.diffusion.sampler import generate_as
from megapix.engine.network import build_network
from megapix.shards.index import read_index
from tests.support import random_numbers
from tests.support.launch import Rank, succeed
from tests.support.made_shards import OPTIONS
from tests.support.small_run import SMALL, STEP_BATCH, arguments, counters, flat_vectors, saved, scalars
from tests.support.stored import stored
from tests.support.trained import Subject

SKIPPED = 3
"""The step in which rank 1's gradients are not finite. Step 2 ends at 16 images seen, step 4 at 24, step 11 at 80."""
BETA1, BETA2, DECAY, LR, LR_AFTER = 0.8, 0.97, 0.3, 2e-3, 5e-4
SPANS = {
    "optim.end-at": 76,
    "optim.lr-step-at": 33,
    "checkpoint.every": 12,
    "log.every": 13,
    "log.samples-every": 29,
    "log.blocks-every": 43,
    "validation.every": 27,
}
OTHERS = {
    "machine.micro-batch": 2,
    "optim.beta1": BETA1,
    "optim.beta2": BETA2,
    "optim.weight-decay": DECAY,
    "checkpoint.keep": 0,
    "log.grid-columns": 3,
    "validation.samples": 0,
    "health.window": 4,
    "health.loss-z": 1e-6,
    "health.grad-norm-z": 1e-6,
    "health.patience": 3,
}
"""A step stands out if its loss or gradient norm is above the median of four: steps 6 and 7 do, and 9 to 11."""


@dataclass
class Odd:
    """The run, and how it is given again."""

    run: Path
    shards: Path
    held_out: Path

    def again(self, run: Path) -> list[Rank]:
        """The same command, in another folder."""
        options = [word for key, value in (SPANS | OTHERS).items() for word in (f"--{key}", str(value))]
        command = arguments(self.shards, run, *options, "--validation.path", str(self.held_out))
        positions = f"1:{(SKIPPED - 1) * STEP_BATCH}:{SKIPPED * STEP_BATCH}"
        return succeed(2, "tests.programs.bad_gradients", command, NAN=positions, NAN_IN="gradient")

    def at(self, images_seen: int) -> Path:
        """A checkpoint."""
        return self.run / "checkpoints" / f"images-{images_seen:012d}"


@pytest.fixture(scope="module")
def odd(shards: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Odd:
    root = tmp_path_factory.mktemp("odd")
    for path in sorted(image_folder.rglob("*.png"))[1:37:2]:
        copy = root / "images" / path.relative_to(image_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    write(ImageFolder.open(root / "images"), root / "held-out", OPTIONS, workers=1, progress=False)
    found = Odd(root / "run", shards, root / "held-out")
    found.again(found.run)
    return found


def steps(run: Path, tag: str) -> list[int]:
    """The steps at which something was logged."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def pictures(run: Path) -> dict[int, np.ndarray]:
    """The sample grids, uint8 [H, W, 3]."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    grids = events.Images("samples/ema") if "samples/ema" in events.Tags()["images"] else []
    return {grid.step: np.asarray(Image.open(BytesIO(grid.encoded_image_string))) for grid in grids}


def test_spans_that_the_batch_does_not_divide(odd: Odd) -> None:
    """What is due happens at the first step that reaches a multiple of its span, and at the end."""
    assert counters(odd.run) == Counters(position=88, images_seen=80)
    assert complete(odd.run) == [odd.at(images) for images in (16, 24, 40, 48, 64, 72, 80)]
    assert steps(odd.run, "loss/train") == [2, 5, 6, 8, 10, 11]
    rates = {2: LR, 5: LR, 6: LR, 8: LR_AFTER, 10: LR_AFTER, 11: LR_AFTER}
    assert scalars(odd.run, "schedule/lr") == {step: pytest.approx(rate) for step, rate in rates.items()}
    assert steps(odd.run, "validation/loss_ema") == [5, 8, 11]
    assert steps(odd.run, "blocks/grad_norm/patch_00") == [7, 11]
    assert list(pictures(odd.run)) == [5, 9, 11]


def test_accumulation_and_ranks_make_the_step_of_the_whole_batch(odd: Odd) -> None:
    """Loss and gradient norm of the first step, of 2 ranks with accumulation 2, against plain autograd."""
    net, positions = build_network(SMALL.model, SMALL.seed), np.arange(STEP_BATCH)
    read = Subject("classes", odd.shards).samples()
    loss, _ = flow.training_loss(net, *read(positions), positions, SMALL.seed, SMALL.flow)
    loss.mean().backward()
    squares = [float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None]
    state = read_state(odd.at(16))
    (first, norm), (second, _) = state.recent
    assert first == pytest.approx(loss.mean().item(), rel=1e-5)
    assert norm == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    assert norm > 2 * SMALL.optim.grad_clip, "the norm is the one before clipping"
    mean = pytest.approx((first + second) / 2, rel=1e-6)
    assert state.loss == mean
    assert scalars(odd.run, "loss/train")[2] == mean


@pytest.mark.parametrize(
    ("before", "after", "lr"), [(16, 24, LR), (40, 48, LR_AFTER), (72, 80, LR_AFTER)], ids=["skip", "rate", "end"]
)
def test_adamw_and_the_ema_from_checkpoint_to_checkpoint(before: int, after: int, lr: float, odd: Odd) -> None:
    """One applied step by hand: its gradient follows from the first moments, all else from the gradient. A step was
    skipped between the first two checkpoints, which neither moments nor EMA have seen."""
    old, new = ({k: v.double() for k, v in flat_vectors(odd.at(images)).items()} for images in (before, after))
    steps = read_state(odd.at(after)).adam_steps
    assert steps == after // STEP_BATCH
    gradient = (new["exp_avg"] - BETA1 * old["exp_avg"]) / (1 - BETA1)
    assert gradient.norm() == pytest.approx(SMALL.optim.grad_clip, rel=1e-4), "it was clipped"
    squares = BETA2 * old["exp_avg_sq"] + (1 - BETA2) * gradient.square()
    close(new["exp_avg_sq"], squares, 1e-6 * squares.max())
    mean, square = new["exp_avg"] / (1 - BETA1**steps), new["exp_avg_sq"] / (1 - BETA2**steps)
    weights = old["weights"] * (1 - lr * DECAY) - lr * mean / (square.sqrt() + 1e-8)
    close(new["weights"], weights, 1e-6)
    close(new["ema"], old["ema"] + (1 - SMALL.optim.ema_decay) * (new["weights"] - old["ema"]), 1e-6)
    assert (new["weights"] - old["weights"]).abs().max() > 100e-6
    assert (new["ema"] - old["ema"]).abs().max() > 100e-6


def close(found: Tensor, expected: Tensor, tolerance: float | Tensor) -> None:
    assert (found - expected).abs().max() < tolerance


def test_the_grid_is_drawn_from_the_ema(odd: Odd) -> None:
    """The last grid, a class a row, each image from noise of its own: drawn again from the checkpoint's weights."""
    found = pictures(odd.run)[11].astype(int)
    rows, columns, side = 3, OTHERS["log.grid-columns"], SMALL.data.image_size
    noise = [random_numbers.normal(SMALL.seed, "sample_noise", n, (3, side, side)) for n in range(rows * columns)]
    condition = classes(torch.arange(rows).repeat_interleave(columns), rows)
    differences = {}
    for ema in (True, False):
        net = load_model(odd.run, ema=ema)
        images = generate_as(net, torch.stack(noise), condition, saved(odd.run).state.config.sampling)
        expected = ((images + 1) * 127.5).round().clamp(0, 255).int().permute(0, 2, 3, 1).numpy()
        assert found.shape == (2 + rows * (side + 2), 2 + columns * (side + 2), 3)
        for number, image in enumerate(expected):
            top, left = (2 + place * (side + 2) for place in divmod(number, columns))
            tile = found[top : top + side, left : left + side]
            differences[ema] = max(differences.get(ema, 0), int(np.abs(tile - image).max()))
    assert differences[True] <= 1, "but for a rounding of the last bit"
    assert differences[False] > 3


def test_the_validation_loss_of_both_weights(odd: Odd) -> None:
    """An image at a time, with noise of its position, at t = 1/16, 3/16, …; the 18 images are groups of 16 and 2."""
    sizes, images = [entry.samples for entry in read_index(odd.held_out).shards], stored(odd.held_out)
    order = random_numbers.epoch(0, sizes, 0)
    assert len(order) == len(images) == 18
    for kind in ("raw", "ema"):
        net, sums = load_model(odd.run, ema=kind == "ema"), np.zeros(8)
        for position, (image, label) in enumerate(images[n] for n in order):
            x, eps = image / 127.5 - 1, random_numbers.normal(0, "validation_noise", position, (3, 16, 16))
            t = torch.arange(1, 16, 2) / 16
            with torch.no_grad():
                v = net(t.view(8, 1, 1, 1) * x + (1 - t.view(8, 1, 1, 1)) * eps, t, torch.full((8,), label))
            sums += (v - (x - eps)).square().mean((1, 2, 3)).double().numpy()
        found = [scalars(odd.run, f"validation/{kind}_t_{(2 * i + 1) / 16:.4f}")[11] for i in range(8)]
        assert found == pytest.approx(list(sums / 18), rel=1e-5)
        assert scalars(odd.run, f"validation/loss_{kind}")[11] == pytest.approx(sums.mean() / 18, rel=1e-5)


def test_going_back_leads_to_the_same_manifests(odd: Odd, tmp_path: Path) -> None:
    """`latest` is moved back by hand, to a checkpoint in mid-spike: what came after it is set aside, what a killed
    process has left is removed, and the run ends with the same bits, the sentinel's memory and spike included."""
    run = Path(shutil.copytree(odd.run, tmp_path / "run"))
    parent = run / "checkpoints"
    (parent / "latest").write_text(f"{odd.at(64).name}\n")
    (parent / "images-000000000999.tmp").mkdir()
    err = odd.again(run)[0].err
    for images in (72, 80):
        name = odd.at(images).name
        assert f"set aside, because the run resumes from before it: {parent / name}.aside" in err
        first, second = (read_state(folder) for folder in (odd.at(images), parent / name))
        assert replace(first, config=SMALL) == replace(second, config=SMALL), "the files' hashes among it"
    assert sorted(path.suffix for path in parent.iterdir() if path.suffix) == [".aside", ".aside"]
    middle, end = (read_state(odd.at(images)) for images in (64, 80))
    assert [step for _, step, _ in middle.standing_out] == [9], "so it matters that these are known again"
    assert (len(middle.recent), middle.spikes, end.spikes) == (4, 0, 1)
    for tag in ("health/grad_norm", "health/spikes", "validation/loss_ema"):
        assert scalars(run, tag) == scalars(odd.run, tag)

"""No silent step: gradients that are not finite, spikes by poisoned data, and what each policy does about them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.write import write
from megapix import config
from megapix.checkpoint.folder import complete
from megapix.checkpoint.layout import PARTS
from megapix.checkpoint.manifest import Counters
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.errors import RunError
from megapix.resilience.health import Sentinel, Skips, robust_z
from megapix.train.rollback import merged
from tests.support.launch import start, succeed
from tests.support.made_shards import OPTIONS
from tests.support.small_run import SMALL, STEP_BATCH, arguments, counters, flat_vectors, saved, scalars

# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


def test_robust_z_by_hand() -> None:
    window = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, deviations 2 1 0 1 97: their median is 1
    assert robust_z(3.0, window) == 0
    assert robust_z(3 + 1.4826 * 5, window) == pytest.approx(5)
    assert robust_z(1.0, window) < 0, "a loss that falls is no spike"
    assert robust_z(float("nan"), window) == robust_z(float("inf"), window) == float("inf")
    assert robust_z(2.1, [2.0] * 9) == pytest.approx(5), "an even window: 1 % of the median counts as one deviation"


def test_sentinel_by_hand() -> None:
    sentinel = Sentinel(config.HealthConfig(window=4, loss_z=10.0, grad_norm_z=10.0, patience=2))
    look = sentinel.look
    for step, loss in enumerate((50.0, 1.0, 1.1, 0.9, 1.0), 1):
        assert look(loss, 1.0, step * 8, step) is None, "silent while it learns, the wild first step included"
    sentinel = Sentinel(sentinel.config, list(sentinel.recent))  # as after a resume
    assert look is not sentinel.look
    assert sentinel.look(5.0, 1.0, 48, 6) is None
    assert sentinel.suspicious
    later = Sentinel(sentinel.config, list(sentinel.recent), list(sentinel.outliers))  # resumed within a spike
    spike = later.look(6.0, 1.0, 56, 7)
    assert spike
    assert (spike.start, spike.step) == (48, 6)
    assert sentinel.look(1.0, 1.0, 56, 7) is None, "one step alone is no spike with patience 2"
    assert not sentinel.suspicious
    before = list(sentinel.recent)
    assert sentinel.look(1.0, 9.0, 64, 8) is None
    assert list(sentinel.recent) == before, "outliers do not enter the window"
    spike = sentinel.look(6.0, 9.0, 72, 9)
    assert spike
    assert (spike.start, spike.step) == (64, 8), "it began with the first of the two"
    assert "gradient norm 9" in spike.reason
    assert "steps 8 to 9" in spike.reason
    assert not sentinel.recent, "the level is learnt anew"


def test_skips_in_a_row() -> None:
    skips = Skips(3)
    for applied in (False, False, True, False, False):
        skips.count(applied, 1, "why")
    skips = Skips(3, skips.in_a_row)  # as after a resume
    with pytest.raises(RunError, match="3 steps in a row were skipped, the last is step 7: why"):
        skips.count(False, 7, "why")


def test_merged_ranges_by_hand() -> None:
    assert merged(((8, 16), (0, 4), (12, 20), (20, 24), (30, 30))) == ((0, 4), (8, 24))
    assert merged(()) == ()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "precision"), [("gradient", "fp32"), ("loss", "bf16")])
def test_one_ranks_nan_skips_the_step_on_all(where: str, precision: str, shards: Path, tmp_path: Path) -> None:
    """Rank 1's NaN at steps 4 and 5 of 8, with accumulation: said, counted, and weights that never saw it."""
    run = tmp_path / "run"
    options = ["--optim.end-at", str(6 * STEP_BATCH), "--machine.micro-batch", "2", "--precision", precision]
    done = succeed(
        2, "tests.programs.bad_gradients", arguments(shards, run, *options), NAN=f"1:{3 * 8}:{5 * 8}", NAN_IN=where
    )
    lines = [line for line in done[0].out.splitlines() if "skipped" in line]
    reason = "the gradient is not finite" + (", nor is the loss of rank 1" if where == "loss" else "")
    assert lines == [
        f"megapix: step 4 skipped: {reason} (1 in a row)",
        f"megapix: step 5 skipped: {reason} (2 in a row)",
    ]
    assert counters(run) == Counters(8 * STEP_BATCH, 6 * STEP_BATCH), "two steps more were drawn"
    assert list(scalars(run, "health/skipped_steps").values()) == [0, 0, 0, 2, 2, 2]
    assert all(np.isfinite(value) for value in scalars(run, "loss/train").values())
    assert all(tensor.isfinite().all() for tensor in flat_vectors(saved(run).folder).values())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    noted = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("events/text_summary")]
    assert noted == [f"skipped: {reason}"] * 2


def test_a_run_that_only_skips_ends(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--health.max-skipped", "3", "--checkpoint.every", "16"]
    done = start(2, "tests.programs.bad_gradients", arguments(shards, run, *options), NAN="0:32:1000", NAN_IN="loss")
    assert [rank.code for rank in done] == [1, 1]
    (line,) = [line for line in done[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert "3 steps in a row were skipped, the last is step 7" in line
    assert "nor is the loss of rank 0" in line
    assert "Traceback" not in done[0].err + done[1].err
    assert counters(run).images_seen == 32, "the last checkpoint is from before"


# ---------------------------------------------------------------------------------------------------------------------
# Spikes
# ---------------------------------------------------------------------------------------------------------------------

POISON = (13 * STEP_BATCH, 15 * STEP_BATCH)
"""Positions of steps 14 and 15."""
SPIKES = ["--health.window", "8", "--health.loss-z", "4", "--health.grad-norm-z", "1000", "--health.patience", "2"]
SPIKES += ["--health.skip", "1", "--checkpoint.every", str(4 * STEP_BATCH), "--optim.end-at", str(24 * STEP_BATCH)]
SPIKES += ["--optim.lr-step-at", "never", "--optim.lr", "5e-4"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 400 dark images, but those of steps 14 and 15 are checkerboards in black and white."""
    root = tmp_path_factory.mktemp("poisoned")
    images = np.random.default_rng(0).integers(110, 146, (400, 16, 16, 3)).astype(np.uint8)

    def make(name: str) -> Path:
        for number, image in enumerate(images):
            path = root / f"{name}-images" / "abc"[number % 3] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        write(ImageFolder.open(root / f"{name}-images"), root / name, OPTIONS, workers=1, progress=False)
        return root / name

    reading = replace(SMALL.data, path=str(make("clean")), flip=False)
    drawn = MicroBatches(locate(reading), reading, SMALL.seed, STEP_BATCH)[np.arange(*POISON)].images
    victims = {image.transpose(1, 2, 0).tobytes() for image in drawn.numpy()}
    checkerboard = (255 * (np.indices((16, 16)).sum(0) % 2)[..., None].repeat(3, 2)).astype(np.uint8)
    chosen = [number for number, image in enumerate(images) if image.tobytes() in victims]
    assert len(chosen) == POISON[1] - POISON[0]
    images[chosen] = checkerboard
    return make("poisoned")


def drawn(record: Path) -> set[int]:
    """Every position that any rank has drawn."""
    lines = [line.split() for path in record.iterdir() for line in path.read_text().splitlines()]
    return {int(position) for line in lines for position in line[1:]}


@pytest.mark.long
def test_warn_says_it_and_goes_on(poisoned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = succeed(2, "megapix", arguments(poisoned, run, *SPIKES, "--checkpoint.keep", "1"))
    (line,) = [line for line in done[0].out.splitlines() if "spike: " in line]
    assert "steps 14 to 15: loss" in line
    healthy = run / "checkpoints" / f"images-{12 * STEP_BATCH:012d}"
    assert f"the last checkpoint before it is {healthy} and stays" in done[0].out
    assert complete(run) == [healthy, saved(run).folder], "the healthy one outlives the newest `keep`"
    assert saved(run).state.spikes == 1
    assert scalars(run, "health/spikes")[24] == 1
    assert counters(run) == Counters(24 * STEP_BATCH, 24 * STEP_BATCH)


@pytest.mark.long
def test_stop_ends_the_run(poisoned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = start(2, "megapix", arguments(poisoned, run, *SPIKES, "--health.on-spike", "stop"))
    assert [rank.code for rank in done] == [1, 1]
    (line,) = [line for line in done[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert "steps 14 to 15: loss" in line
    assert f"images-{12 * STEP_BATCH:012d} and stays" in line


def test_rollback_never_draws_the_window_again(poisoned: Path, tmp_path: Path) -> None:
    """The spike of steps 14 and 15 sends the run back to step 12; a later resume from there skips the window too."""
    run, record = tmp_path / "run", tmp_path / "record"
    record.mkdir()
    options = [*SPIKES, "--health.on-spike", "rollback", "--checkpoint.keep", "0"]
    done = succeed(2, "tests.programs.bad_gradients", arguments(poisoned, run, *options), RECORD=str(record))
    window = (12 * STEP_BATCH, POISON[1])  # one step before the spike is skipped with it
    assert done[0].out.count("rolled back to") == 1
    assert f"positions skipped: {window[0]} to {window[1]}" in done[0].out
    end = Counters(27 * STEP_BATCH, 24 * STEP_BATCH, (window,))
    assert counters(run) == end
    assert end.drawn == 24 * STEP_BATCH
    assert saved(run).state.rollbacks == 1
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (noted,) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("events/text_summary")]
    assert noted.startswith(f"rolled back to images-{12 * STEP_BATCH:012d}: steps 14 to 15: loss")
    speeds = scalars(run, "speed/images_per_s")
    assert speeds[13] < 3 * max(speed for step, speed in speeds.items() if step != 13), (
        "the 24 skipped samples do not count, beside 8"
    )
    lines = [line.split() for line in (record / "rank-0.txt").read_text().splitlines()]
    back = max(n for n in range(1, len(lines)) if int(lines[n][0]) < int(lines[n - 1][0]))
    assert int(lines[back][0]) == 12 * STEP_BATCH, "it went back to 96 images seen"
    after = {int(position) for line in lines[back:] for position in line[1:]}
    assert not after & set(range(*window))
    assert min(after) == window[1]
    losses = scalars(run, "loss/train")
    assert list(losses) == list(range(1, 25)), "one line: what was given up is purged"
    assert max(losses[step] for step in range(13, 25)) < 1.3 * losses[12]

    again, record = tmp_path / "again", tmp_path / "again-record"
    record.mkdir()
    shutil.copytree(run, again)
    for folder in complete(again):
        if folder.name > f"images-{12 * STEP_BATCH:012d}":
            shutil.rmtree(folder)
    (again / "checkpoints" / "latest").unlink()
    succeed(2, "tests.programs.bad_gradients", arguments(poisoned, again, *options), RECORD=str(record))
    assert not drawn(record) & set(range(*window))
    assert counters(again) == end
    first, second = flat_vectors(saved(run).folder), flat_vectors(saved(again).folder)
    assert all(torch.equal(first[part], second[part]) for part in PARTS)
    assert scalars(again, "loss/train") == losses


@pytest.mark.long
def test_rollback_before_the_first_checkpoint_and_too_often(poisoned: Path, tmp_path: Path) -> None:
    """A run that rolls back saves before its first step; no rollback allowed means the first spike ends it."""
    run = tmp_path / "run"
    options = [*SPIKES, "--health.on-spike", "rollback", "--checkpoint.every", "10000"]
    succeed(1, "megapix", arguments(poisoned, run, *options))
    assert counters(run).skipped == ((12 * STEP_BATCH, POISON[1]),)
    assert counters(run).position == 27 * STEP_BATCH
    (done,) = start(1, "megapix", arguments(poisoned, tmp_path / "none", *options, "--health.max-rollbacks", "0"))
    assert done.code == 1
    assert "rolled back 0 times (health.max_rollbacks)" in done.err

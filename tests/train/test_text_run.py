"""Runs on text: features on the fly and stored, the empty caption, stages, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.passes.text_features import embed_text
from megapix.cli import main as cli
from megapix.conditioning.conditioner import EMPTY_NAME
from megapix.data.arrays import Extras
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.shards.text_features import read_text_features
from megapix.shards.text_recipe import recipe_of
from megapix.weights.read import load_weights
from megapix.weights.write import export
from tests.support import text_encoders
from tests.support.launch import succeed
from tests.support.small_run import STEP_BATCH, refused, saved, scalars
from tests.support.trained import TEXT, Subject, text_shards

RELEASED = replace(TEXT, text=replace(TEXT.text, normalize="none", scale=1.0, padding="attended"))
SHORT = ("--optim.end-at", str(4 * STEP_BATCH), "--checkpoint.every", str(4 * STEP_BATCH))


@pytest.fixture(scope="module")
def text(text_shards: Path) -> Subject:
    return Subject("text", text_shards)


@pytest.fixture(scope="module")
def bare(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards without features."""
    folder = tmp_path_factory.mktemp("bare") / "shards"
    shutil.copytree(text_shards, folder, ignore=shutil.ignore_patterns("text-*"))
    index = json.loads((folder / "index.json").read_text())
    del index["text"]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def run(text: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on stored features, on two ranks, with a grid of prompts."""
    out = tmp_path_factory.mktemp("run") / "run"
    grid = ("--log.samples-every", str(4 * STEP_BATCH), "--log.grid-classes", "2", "--log.grid-columns", "2")
    first, _ = succeed(2, "megapix", text.arguments(out, *SHORT, *grid))
    note = "note: released code and its ports will not run this network as it is: model.convention = 'paper', not"
    assert first.out.count(note) == 1
    return out


def test_features_on_the_fly_give_the_losses_of_stored_ones(
    bare: Path, text_encoder: Path, run: Path, tmp_path: Path
) -> None:
    """But for the bf16 that stored ones are rounded to, 2^-9 of each number."""
    live = Subject("text", bare).arguments(tmp_path / "live", *SHORT, "--text.encoder", str(text_encoder))
    succeed(2, "megapix", live)
    stored, found = (scalars(folder, "loss/train") for folder in (run, tmp_path / "live"))
    assert list(found) == list(stored) == [1, 2, 3, 4]
    assert list(found.values()) == pytest.approx(list(stored.values()), rel=2e-3)
    digests = {saved(folder).state.config.text.digest for folder in (run, tmp_path / "live")}
    assert len(digests) == 1
    assert digests != {""}


@pytest.mark.long
def test_a_run_in_the_released_convention(bare: Path, text_encoder: Path, tmp_path: Path) -> None:
    """Stored and live captions with attended padding give one loss; nothing has a mask; features of masked ones, and
    another convention when it goes on, are refused."""
    subject, options = Subject("text", Path(shutil.copytree(bare, tmp_path / "shards"))), list(SHORT)
    options += ["--model.convention", "released", "--text.padding", "attended", "--text.scale", "1.0"]
    options += ["--text.normalize", "none", "--log.samples-every", str(4 * STEP_BATCH)]
    succeed(1, "megapix", subject.arguments(tmp_path / "live", *options, "--text.encoder", str(text_encoder)))
    embed_text(subject.shards, str(text_encoder), recipe_of(RELEASED.text), 16, False, progress=False)
    (rank,) = succeed(1, "megapix", subject.arguments(tmp_path / "run", *options))
    assert "note:" not in rank.out
    stored, found = (scalars(tmp_path / name, "loss/train") for name in ("run", "live"))
    assert list(found.values()) == pytest.approx(list(stored.values()), rel=2e-3)
    assert "mask" not in load_file(tmp_path / "run" / EMPTY_NAME)
    assert saved(tmp_path / "run").state.config.model.convention == "released"


def test_a_caption_is_drawn_by_seed_and_position(bare: Path) -> None:
    """By its weight, the same one for any number of ranks, and another one in another epoch."""
    located = locate(c := TEXT.data.__class__(path=str(bare), image_size=16, workers=0))
    data = MicroBatches(located, c, 3, 4, Extras(captions=True))
    positions = [np.arange(step * 4, step * 4 + 4) for step in range(270)]
    batches = [data[some] for some in positions]
    drawn = [caption for batch in batches for caption in batch.captions]  # type: ignore[union-attr]
    again = [caption for some in positions for place in some for caption in data[np.array([place])].captions]  # type: ignore[union-attr]
    assert again == drawn
    share = np.mean(["photo" in caption for caption in drawn])
    assert share == pytest.approx(0.75 * 0.5 / 1.5, abs=0.05), "three quarters of the samples have one of weight 0.5"
    assert [c for batch in batches[:9] for c in batch.captions] != [
        c for batch in batches[9:18] for c in batch.captions
    ]  # type: ignore[union-attr]


def test_stored_features_are_read_of_the_caption_that_is_drawn(text: Subject, text_encoder: Path) -> None:
    from megapix.conditioning.text_source import load

    located = locate(c := TEXT.data.__class__(path=str(text.shards), image_size=16, workers=0))
    features = read_text_features(located.folder, located.index)
    some = np.arange(4)
    stored = MicroBatches(located, c, 3, 4, Extras(text=features))[some].text  # type: ignore[union-attr]
    captions = MicroBatches(located, c, 3, 4, Extras(captions=True))[some].captions  # type: ignore[union-attr]
    expected, mask = load(TEXT.text, str(text_encoder))(captions)
    assert stored is not None
    assert torch.equal(stored[1], mask)
    assert torch.equal(stored[0], expected.bfloat16())


def test_the_empty_caption_is_kept_in_the_run(run: Path, text: Subject, text_encoder: Path) -> None:
    """What stands for no caption is read from the run when it goes on, not computed again."""
    from megapix.conditioning.text_source import load

    kept, (expected, _) = load_file(run / EMPTY_NAME), load(TEXT.text, str(text_encoder))([""])
    assert torch.equal(kept["features"], expected.bfloat16())
    assert kept["mask"].all()


def test_the_grid_shows_prompts_and_says_which(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    (picture,) = events.Images("samples/ema")
    assert (picture.width, picture.height) == (2 + 2 * 18, 2 + 2 * 18)
    (said,) = events.Tensors("samples/prompts/text_summary")
    assert said.tensor_proto.string_val[0].decode().count("1. a ") == 2


@pytest.mark.long
def test_a_run_on_text_measures_a_held_out_loss(text: Subject, text_encoder: Path, tmp_path: Path) -> None:
    held_out = text_shards_of(tmp_path, text_encoder)
    options = ("--validation.path", str(held_out), "--validation.every", str(4 * STEP_BATCH))
    succeed(1, "megapix", text.arguments(tmp_path / "run", *SHORT, *options))
    assert 0 < scalars(tmp_path / "run", "validation/loss_raw")[4] < 10


def text_shards_of(root: Path, encoder: Path) -> Path:
    """Other images, another set."""
    return text_shards(root / "held-out", encoder, count=18)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_a_stage_starts_from_anothers_weights(kind: str, run: Path, text: Subject, tmp_path: Path) -> None:
    """Fresh optimizer, position and EMA, other objective; the chain is recorded, through exports too."""
    second, third, file = tmp_path / "second", tmp_path / "third", tmp_path / "second.safetensors"
    other = ("--flow.time-shift", "4.0", "--optim.lr", "1e-12", "--optim.end-at", str(STEP_BATCH))
    out = succeed(1, "megapix", text.arguments(second, "--init", str(run), "--init-weights", kind, *other))[0].out
    source = saved(run).folder
    assert f"stage 2: starting from the {'EMA' if kind == 'ema' else 'raw weights'} of {source}" in out
    first = load_weights(run, kind == "ema").tensors
    for ema in (True, False):
        now = load_weights(second, ema).tensors
        assert all(torch.allclose(now[name], first[name], atol=1e-9) for name in first), "the EMA starts as a copy"
    state = saved(second).state
    assert (state.counters.images_seen, state.adam_steps) == (STEP_BATCH, 1)
    (stage,) = state.stages
    assert (stage.source, stage.kind, stage.images_seen) == (
        str(source.resolve()),
        f"{'EMA' if kind == 'ema' else 'raw weights'}",
        4 * STEP_BATCH,
    )
    export(second, file)
    succeed(1, "megapix", text.arguments(third, "--init", str(file), *other))
    chain = saved(third).state.stages
    assert [Path(stage.source) for stage in chain] == [source.resolve(), file.resolve()]
    out = succeed(
        1, "megapix", text.arguments(third, "--init", str(file), *other, "--optim.end-at", str(2 * STEP_BATCH))
    )[0].out
    assert "resuming from" in out
    assert saved(third).state.stages == chain


def test_what_may_not_differ_between_stages(
    run: Path, text: Subject, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*changes: str) -> str:
        dry = (*text.arguments(tmp_path / "out", "--init", str(run), *changes), "--dry-run")
        return refused(list(dry), capsys)

    shown = f"init = {str(run)!r} is another network: "
    assert f"{shown}model.depth is 2 there and 3 here" in said("--model.depth", "3")
    both = said("--model.pixel-depth", "1", "--model.modulation", "post")
    assert "model.pixel_depth is 2 there and 1 here; model.modulation is 'pre' there and 'post' here" in both
    live = said("--text.encoder", str(text_encoder), "--text.scale", "0.5")
    assert f"{shown}text.scale is 1.0 there and 0.5 here" in live
    other = text_encoders.make(tmp_path / "other", "bert", seed=9)
    assert "text.digest is '" in said("--text.encoder", str(other))
    capsys.readouterr()
    free = ("--flow.time-shift", "4", "--optim.lr", "1e-5", "--precision", "bf16", "--optim.grad-clip", "0.1")
    assert cli.main([*text.arguments(tmp_path / "out", "--init", str(run), *free), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(
    text: Subject, bare: Path, shards: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(subject: Subject, *changes: str) -> str:
        return refused([*subject.arguments(tmp_path / "out", *changes), "--dry-run"], capsys)

    without = Subject("text", bare)
    assert f"data.path = {str(bare)!r} holds no text features: give text.encoder" in said(without)
    wide = text_encoders.make(tmp_path / "wide", "bert", hidden_size=32)
    assert f"text.encoder = {str(wide)!r} has 32 channels, but model.text_width = 24" in said(
        without, "--text.encoder", str(wide)
    )
    assert "text.encoder = 'nowhere'" in said(without, "--text.encoder", "nowhere")
    assert "text.digest = '" in said(without, "--text.encoder", str(text_encoder), "--text.digest", "0" * 64)
    for option, value in (
        ("max-tokens", "5"),
        ("scale", "0.1"),
        ("normalize", "none"),
        ("prefix", "a photo"),
        ("dtype", "bf16"),
    ):
        line = said(text, f"--text.{option}", value)
        assert f"text.{option.replace('-', '_')} = " in line
        assert "were made with" in line
    assert "text.digest = " in said(text, "--text.digest", "0" * 64)
    assert "model.text_width = 32, but" in said(text, "--model.text-width", "32")
    assert "text.max_tokens = 13: expected 1 to model.text_tokens = 12" in said(text, "--text.max-tokens", "13")
    assert "not divisible by model.patch_size = 8" in said(text, "--model.patch-size", "8")
    assert "prompts of your own need text.encoder" in said(text, "--log.prompts", str(tmp_path / "prompts.txt"))
    assert "has no captions, and the network takes text" not in said(text, "--model.text-width", "32")
    assert "expected one of them above 0" in said(text, "--model.num-classes", "3")
    classes = Subject("classes", shards)
    assert "text.encoder = 'x' has no effect: the network takes classes" in said(classes, "--text.encoder", "x")


def test_shards_without_captions_are_refused(
    text: Subject, shards: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(shards, folder)
    from megapix.files import sha256_of
    from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME
    from megapix.shards.table import RECORD

    table = (folder / TABLE_NAME).read_bytes()
    rows = [RECORD.pack(*row[:5], 0, 0) for row in RECORD.iter_unpack(table)]
    (folder / TABLE_NAME).write_bytes(b"".join(rows))
    (folder / CAPTIONS_NAME).write_bytes(b"")
    index = json.loads((folder / "index.json").read_text())
    index["table_sha256"], index["captions_sha256"] = (sha256_of(folder / n) for n in (TABLE_NAME, CAPTIONS_NAME))
    (folder / "index.json").write_text(json.dumps(index))
    asked = Subject("text", folder).arguments(tmp_path / "out", "--text.encoder", str(text_encoder))
    line = refused([*asked, "--dry-run"], capsys)
    assert f"data.path = {str(folder)!r} has no captions, and the network takes text" in line


@pytest.mark.long
def test_a_long_caption_is_cut_and_said_once(bare: Path, text_encoder: Path, tmp_path: Path) -> None:
    live = Subject("text", bare).arguments(
        tmp_path / "run", *SHORT, "--text.encoder", str(text_encoder), "--text.max-tokens", "5"
    )
    out = succeed(1, "megapix", live)[0].out
    assert out.count("was cut to max_tokens = 5") == 1

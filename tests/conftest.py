"""Small real shards for the tests: images with a structure that a tiny network learns in a few steps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from data_prep.writing import pool
from tests.support import made_shards, programs

if TYPE_CHECKING:
    from tests.support.trained import Subject

# Preparation's and the loader's workers share one server process in a test run: what both need is loaded there.
pool.load_in_workers("megapix.data.loader", "data_prep.writing.shard", "webdataset")
torch.set_num_threads(1)  # the tests' matrices are small, and several processes share the cores

SLOWEST = (
    "launch/test_nodes.py",
    "parity/test_parity.py",
    "data_prep/test_kills_of_parts.py",
    "benchmarks/test_gpu_checks.py",
    "engine/test_checkpointing.py",
    "model/test_fused_block.py",
    "resilience/test_stopping.py",
    "evaluation/test_evaluate.py",
    "checkpoint/test_checkpoint.py",
    "engine/test_engine.py",
    "engine/test_compiled.py",
    "promises/test_kills.py",
    "promises/test_doc_commands.py",
    "train/test_small_evaluation.py",
    "resilience/test_first_error.py",
    "resilience/test_watchdog.py",
    "train/test_repa.py",
)
"""Files that the workers begin with, so that none of these is what all but one wait for at the end."""


def pytest_configure(config: pytest.Config) -> None:
    built = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    cache = tempfile.TemporaryDirectory(prefix="megapix-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    built.mkdir(parents=True, exist_ok=True)
    (Path(cache.name) / "torch_extensions").symlink_to(built.resolve())  # DeepSpeed's op takes a minute to build
    if hidden := os.environ.get(programs.HIDDEN):
        scratch = tempfile.TemporaryDirectory(prefix="megapix-path-")
        config.add_cleanup(scratch.cleanup)
        programs.hide(hidden.split(","), Path(scratch.name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"tests/{name}": number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))


@pytest.hookimpl(tryfirst=True)  # before fixtures, which would look for the program
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("optional_programs"):
        if reason := programs.lacking(mark.args):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A rank that was played in this process leaves no RANK or MASTER_PORT to the tests after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 PNG images of 16 pixels in three class folders: a gradient of the class's colour, with noise."""
    return made_shards.draw(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT with its tokenizer."""
    from tests.support import text_encoders  # late: transformers, which most tests do not need

    return text_encoders.make(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def text_shards(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of three shapes with one or two captions each, and these captions' features."""
    from tests.support import trained

    return trained.text_shards(tmp_path_factory.mktemp("text"), text_encoder)


@pytest.fixture(scope="module", params=["classes", "text"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """What a test trains: classes on square images, and text on images of several shapes."""
    from tests.support.trained import Subject

    name = {"classes": "shards", "text": "text_shards"}[request.param]
    return Subject(request.param, request.getfixturevalue(name))


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images as three shards."""
    return made_shards.pack(image_folder, tmp_path_factory.mktemp("shards") / "small")


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of `shards` that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))

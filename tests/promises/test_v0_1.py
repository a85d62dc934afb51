"""What version 0.1.0 wrote (`tests/data/make.py`) is read: runs resume with the same bits, sample and export; indexes,
features and statistics are used. And its reference runs are computed today as they were then.

The bits of a sum differ between CPUs and versions of torch. Where a probe says that this machine computes those of the
recording, everything is compared bit for bit; elsewhere within what other bits explain, which the tests' names and a
warning say.
"""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data_prep.cli
from megapix.cli import main as cli
from megapix.shards.index import read_index
from megapix.shards.statistics import read_reference
from tests.support import golden
from tests.support.launch import ROOT, succeed
from tests.support.small_run import flat_vectors, saved, scalars
from tests.support.version_2 import make_listed

DATA = ROOT / "tests" / "data"
GOLDEN: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in (DATA / "golden").glob("*.json")}
OTHER = golden.other_bits(GOLDEN["classes"]["machine"])
if OTHER:
    warnings.warn(f"compared with version 0.1.0 to {golden.TOLERANCE}, not bit for bit: here are {OTHER}", stacklevel=1)
FULL = "160"
"""Images seen at the end of the recorded runs; those that are kept stand at 80."""
ROWS = {"classes": ("--classes", "2", "0", "1"), "text": ("--prompts", "text", "--count", "3")}
INDEXES = {
    "index-crop": ("--size", "16"),
    "index-buckets": ("--size", "32", "--policy", "buckets", "--bucket-step", "8"),
}

compared = pytest.mark.parametrize(
    "exact", [pytest.param(not OTHER, id=f"to {golden.TOLERANCE} since here are {OTHER}" if OTHER else "bit for bit")]
)
kinds = pytest.mark.parametrize("kind", ["classes", "text"])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of everything; the indexes find their tar files in it, as their owner tells them after a move."""
    folder = Path(shutil.copytree(DATA / "v0_1", tmp_path / "v0_1"))
    for path in folder.glob("index-*/*.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"base": str(folder / "tars")} if "base" in about else about))
    return folder


def in_folder(old: Path, arguments: list[str]) -> list[str]:
    """Arguments whose paths are those of the copy."""
    return [str(old / word) if (old / word).exists() else word for word in arguments]


def trained(name: str, old: Path) -> Path:
    """The run that a trace was recorded of, done again, with the noise and the patches that the preset had then."""
    out = old / "again"
    presets = ["--flow.generator", "torch", "--model.patch-size", "4"]
    command = [*in_folder(old, shlex.split(GOLDEN[name]["command"])), *presets]
    succeed(GOLDEN[name]["ranks"], "megapix", [*command, "--out", out])
    return out


def check(run: Path, name: str, exact: bool) -> None:
    """A run is the recorded one."""
    assert not golden.differences(golden.trace(run), GOLDEN[name]["trace"], exact)


@compared
@pytest.mark.parametrize("name", ["classes", "text", "repa-fp32", "repa-bf16"])
def test_a_recorded_run_is_computed_as_it_was(name: str, exact: bool, old: Path) -> None:
    """Two reference runs on two ranks; two runs on both kinds of image features, the latter on an index of buckets."""
    check(trained(name, old), name, exact)


@compared
@kinds
def test_an_old_run_resumes_as_if_it_had_never_stopped(kind: str, exact: bool, old: Path) -> None:
    """By its own config.json, from the checkpoint of two ranks: one line of losses, and the end of the recorded run."""
    run = old / f"{kind}-run"
    paths = ["--data.path", str(old / kind), "--out", str(run), "--resume", "require"]
    shutil.copy(run / "config.json", old / "asked.json")
    succeed(2, "megapix", ["train", "--config", str(old / "asked.json"), *paths, "--optim.end-at", FULL])
    check(run, run.name, exact)


@kinds
def test_one_rank_resumes_what_two_have_saved(kind: str, old: Path) -> None:
    run, recorded = old / f"{kind}-run", GOLDEN[f"{kind}-run"]["trace"]["scalars"]
    paths = ["--data.path", str(old / kind), "--out", str(run), "--resume", "require"]
    shutil.copy(run / "config.json", old / "asked.json")
    succeed(1, "megapix", ["train", "--config", str(old / "asked.json"), *paths, "--optim.end-at", "104"])
    for tag in ("loss/train", "health/grad_norm", "schedule/lr"):
        first = [recorded[tag][str(step)] for step in range(1, 14)]
        assert list(scalars(run, tag).values()) == pytest.approx(first, rel=golden.TOLERANCE), tag


@compared
@kinds
def test_old_weights_are_sampled(kind: str, exact: bool, old: Path) -> None:
    """From the run and from its export, the picture that was drawn then."""
    with Image.open(old / f"{kind}.png") as picture:
        recorded = np.asarray(picture).astype(int)
    rows = in_folder(old, list(ROWS[kind]))
    for weights in (f"{kind}-run", f"{kind}.safetensors"):
        command = ["sample", str(old / weights), "--out", str(old / "again.png"), *rows]
        assert cli.main([*command, "--per-class", "3", "--seed", "5"]) == 0
        with Image.open(old / "again.png") as picture:
            found = np.asarray(picture).astype(int)
        assert found.shape == recorded.shape
        assert abs(found - recorded).max() <= (0 if exact else 1), weights


@kinds
def test_an_old_run_is_exported_as_it_was(kind: str, old: Path) -> None:
    run, kept, again = (old / name for name in (f"{kind}-run", f"{kind}.safetensors", "again.safetensors"))
    assert cli.main(["export", str(run), "--out", str(again)]) == 0
    found, expected = load_file(again), load_file(kept)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    in_order = torch.cat([expected[name].flatten() for name in saved(run).state.layout.shapes])
    assert torch.equal(in_order, flat_vectors(saved(run).folder)["ema"])
    then, now = _about(kept), _about(again)
    since = {"source": "", "generator": "torch", "initial_share": now["initial_share"]}
    since |= {"model": then["model"] | {"convention": "paper"}, "text": then["text"] | {"padding": "masked"}}
    assert now | {"source": ""} == then | since


def _about(exported: Path) -> dict[str, Any]:
    with safe_open(exported, framework="pt") as opened:
        return dict(json.loads(opened.metadata()["megapix"]))


@pytest.mark.parametrize("name", ["classes", "text", "untouched", *INDEXES])
def test_old_shards_are_whole(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep.cli.main(["verify", str(old / name), "--workers", "1"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", INDEXES)
def test_an_old_index_is_made_from_its_receipts(name: str, old: Path) -> None:
    """An interrupted command of that version is finished by this one: the same plan, receipts, table and index."""
    made = ("index.json", "samples.bin", "captions.bin")
    before = [(DATA / "v0_1" / name / file).read_bytes() for file in made]
    for file in made:
        (old / name / file).unlink()
    for tar in (old / "tars").iterdir():  # of the right size, but not to be read again
        tar.write_bytes(bytes(tar.stat().st_size))
    command = ["index", str(old / "tars"), "--out", str(old / name), *INDEXES[name], "--workers", "1"]
    assert data_prep.cli.main(command) == 0
    make_listed(old / name)
    after = [(old / name / file).read_bytes() for file in made]
    assert after[0].replace(str(old).encode(), b"/tmp/megapix-0.1.0") == before[0]
    assert after[1:] == before[1:]


def test_old_statistics_are_read(old: Path) -> None:
    reference, _ = read_reference(old / "stats.npz")
    with np.load(old / "stats.npz") as file:
        assert (reference.moments.mu == file["mu"]).all()
        assert (reference.moments.sigma == file["sigma"]).all()
        assert (reference.features == file["features"]).all()
    assert (reference.moments.count, reference.features.shape) == (21, (21, 17))
    np.testing.assert_allclose(reference.moments.sigma, np.cov(reference.features, rowvar=False), atol=1e-6)
    assert (reference.extractor, reference.data_digest) == ("effnet_lite0", read_index(old / "classes").digest)

"""To the Hugging Face hub and back, against a stand-in for it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import megapix
from tests.support.hub import Hub, serving
from tests.support.launch import ROOT

RUN = ROOT / "tests/data/v0_1/classes-run"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def python(hub: Hub, home: Path, *arguments: str, token: str = "hf_good") -> subprocess.CompletedProcess[str]:
    """A process that knows this hub alone: huggingface_hub reads its environment when it is imported."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.long
def test_a_run_goes_to_the_hub_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    """With the card of the run: data, counters, curves and samples; and not a path of this machine."""
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    push = [
        "-m",
        "megapix",
        "push",
        str(run),
        "me/tiny",
        "--license",
        "cc-by-4.0",
        "--private",
        "--shard-gib",
        "0.0001",
    ]
    done = python(hub, tmp_path / "home", *push)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"megapix: {run} is at {hub.url}/me/tiny; megapix.load('hf://me/tiny') loads it\n"
    assert hub.private["me/tiny"]
    files = hub.repos["me/tiny"]
    card = files["README.md"].decode()
    state = json.loads(
        next(iter(sorted(run.glob("checkpoints/images-*"), reverse=True))).joinpath("state.json").read_text()
    )
    for words in (
        "license: cc-by-4.0\n",
        f"EMA, {state['counters']['images_seen']:,} images seen",
        f"`{state['data_digest'][:16]}…`",
        "`loss/train`: ",
        "![loss](curves.png)",
    ):
        assert words in card
    assert str(tmp_path) not in card + files["model_index.json"].decode()
    with Image.open(io.BytesIO(files["curves.png"])) as curves:
        colours = curves.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert (30, 100, 200) in {colour for _, colour in colours}, "a line is drawn"

    program = (
        "import megapix, torch; p = megapix.load('hf://me/tiny', device='cpu');"
        f"torch.save(p(classes=[0, 1], seed=3, steps=2, output='tensor'), {str(tmp_path / 'a.pt')!r});"
        "assert megapix.load_model('hf://me/tiny@main').config == p.settings.model"
    )
    back = python(hub, tmp_path / "home", "-c", program)
    assert back.returncode == 0, back.stderr
    ours = megapix.load(run, device="cpu")(classes=[0, 1], seed=3, steps=2, output="tensor")
    assert torch.equal(torch.load(tmp_path / "a.pt"), ours)


@pytest.mark.long
def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    push = ["-m", "megapix", "push", str(RUN)]
    for more, token, words in (
        (["me/tiny"], "hf_good", "--license"),
        (["me", "--license", "mit"], "hf_good", "REPO = 'me': expected a repository's OWNER/NAME"),
        (["me/tiny", "--license", "My Licence"], "hf_good", "--license = 'My Licence': expected the hub's name of one"),
        (["me/tiny", "--license", "mit"], "hf_bad", "me/tiny: the hub says: "),
    ):
        done = python(hub, tmp_path / "home", *push, *more, token=token)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    program = "import megapix; megapix.load('hf://me/none')"
    done = python(hub, tmp_path / "home", "-c", program)
    assert "InputError: hf://me/none: the hub says: RepositoryNotFoundError" in done.stderr

"""The EMA whose decay rises, through a resume; and the share of initial weights that is left in one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from megapix import config
from megapix.checkpoint import vectors
from megapix.cli import main as cli
from megapix.config import OptimConfig
from megapix.engine.optim import EMA, AdamWWithEMA
from megapix.model import PixelDiT
from megapix.weights.about import About, metadata_of
from megapix.weights.read import about
from tests.support.launch import succeed
from tests.support.made_run import add_checkpoint
from tests.support.small_run import SMALL, STEP_BATCH, arguments, flat_vectors


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.995, 0.9999])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_share_is_what_is_left_of_ones_among_zeros(decay: float, warmup: bool) -> None:
    """Weights that are 1 at the start and 0 after each step: the EMA is the share."""
    o = OptimConfig(ema_decay=decay, ema_warmup=warmup)
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamWWithEMA([p], 1e-3, (0.9, 0.999), 0.0, o.ema_decay_at)
    optimizer.begin()
    p.data.zero_()
    p.grad = torch.ones_like(p)
    for step in range(1, 301):
        optimizer.update_ema()
        expected = optimizer.state[p][EMA].item()
        assert o.ema_share(step) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert o.ema_share(0) == 1
    assert OptimConfig(ema_decay=0.995).ema_share(200) == pytest.approx(0.367, abs=1e-3)


def test_a_resume_goes_on_with_the_decay_of_its_step(own_shards: Path, tmp_path: Path) -> None:
    """From checkpoint to checkpoint, with the formula of the docs; what is sampled says nothing then."""
    options = ["--optim.ema-warmup", "--optim.ema-decay", "0.4", "--checkpoint.every", "1", "--checkpoint.keep", "0"]
    folder = tmp_path / "run"
    for end in (4, 9):
        command = arguments(own_shards, folder, *options, "--optim.end-at", str(end * STEP_BATCH))
        (done,) = succeed(1, "megapix", command)
        assert "of the EMA" not in done.out + done.err
    found = [flat_vectors(folder / "checkpoints" / f"images-{n * STEP_BATCH:012d}") for n in range(1, 10)]
    for step, (old, new) in enumerate(itertools.pairwise(found), 2):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * old["ema"].double() + (1 - decay) * new["weights"].double()
        assert (new["ema"] - expected).abs().max() < 1e-7, step
        assert (new["ema"] - old["ema"]).abs().max() > 1e-4
    assert min(0.4, 9 / 18) == 0.4, "the last steps have the whole decay"


def test_a_grid_says_the_share(own_shards: Path, tmp_path: Path) -> None:
    command = arguments(own_shards, tmp_path / "run", "--log.samples-every", "16", "--optim.end-at", "24")
    (done,) = succeed(1, "megapix", command)
    said = [line for line in done.out.splitlines() if "of the EMA" in line]
    assert said == [
        "megapix: step 2: 81% of the EMA is still the weights that the run began with",
        "megapix: step 3: 73% of the EMA is still the weights that the run began with",
    ]


def test_weights_know_their_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a checkpoint, of 7 steps here, and of an exported file; a file of before has none."""
    folder = add_checkpoint(tmp_path / "run", 7)
    assert about(folder, True).initial_share == pytest.approx(0.9**7, rel=1e-12)
    assert about(folder, False).initial_share is None
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in PixelDiT(SMALL.model).named_parameters()}
    file = tmp_path / "net.safetensors"
    for share, words in (
        (0.367, "37% of the EMA is still the weights that the run began with"),
        (0.0099, ""),
        (None, ""),
    ):
        known = About(SMALL.model, SMALL.sampling, 16, SMALL.text, ("a", "b", "c"), True, "x", 0, initial_share=share)
        metadata = config.to_dict(known)
        if share is None:
            del metadata["initial_share"]
        pieces = {name: (tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()}
        vectors.write(file, pieces, metadata_of(known) if share else {"megapix": json.dumps(metadata)})
        assert about(file).initial_share == share
        assert (
            cli.main(["sample", str(file), "--out", str(tmp_path / "grid.png"), "--classes", "1", "--per-class", "1"])
            == 0
        )
        said = capsys.readouterr().err
        assert (
            said.startswith(f"megapix: warning: {words} ({file}); --raw takes the raw weights") if words else not said
        )

"""A run that starts from weights of other classes, and of another image size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megapix.checkpoint import vectors
from megapix.cli import main as cli
from megapix.engine.network import build_network
from megapix.model import PixelDiT
from megapix.weights import stages
from megapix.weights.about import About, Weights, metadata_of
from megapix.weights.read import load_weights
from tests.support.launch import succeed
from tests.support.small_run import SMALL, STEP_BATCH, arguments, refused

TABLE = "y_embedder.embedding_table.weight"


def written(path: Path, classes: tuple[str, ...], **changes: object) -> dict[str, torch.Tensor]:
    """An exported file of a network with these classes and 32 pixels; returns its tensors, all of them random."""
    model = replace(SMALL.model, num_classes=len(classes), **changes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(p.shape, generator=generator) / 9 for name, p in PixelDiT(model).named_parameters()}
    about = About(model, SMALL.sampling, 32, SMALL.text, classes, True, "there", 0)
    pieces = {name: (tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()}
    vectors.write(path, pieces, metadata_of(about))
    return tensors


def test_a_run_takes_the_rows_of_its_classes(own_shards: Path, tmp_path: Path) -> None:
    """Its classes are blue, green and red; one step of a vanishing learning rate changes nothing that is seen."""
    file, run = tmp_path / "five.safetensors", tmp_path / "run"
    theirs = written(file, ("cyan", "red", "white", "black", "blue"))
    options = ["--init", str(file), "--optim.lr", "1e-12", "--optim.end-at", str(STEP_BATCH)]
    (done,) = succeed(1, "megapix", arguments(own_shards, run, *options))
    assert "class table: 2 of 3 rows by name, the others start fresh, the null class stays" in done.out
    fresh = build_network(SMALL.model, SMALL.seed).get_parameter(TABLE).detach()
    expected = torch.stack([theirs[TABLE][4], fresh[1], theirs[TABLE][1], theirs[TABLE][5]])
    for ema in (True, False):
        found = load_weights(run, ema).tensors
        torch.testing.assert_close(found[TABLE], expected, rtol=0, atol=1e-9)
        for name in set(theirs) - {TABLE}:
            torch.testing.assert_close(found[name], theirs[name], rtol=0, atol=1e-9)


NUMBERED = tuple(str(number) for number in range(7))


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "line"),
    [
        (("a", "b"), ("a", "b"), [0, 1], ""),
        (("a", "b"), ("c", "d"), [0, 1], ""),  # as many, no name in common: by number
        (("a", "b"), ("b", "a"), [1, 0], "class table: 2 rows by name, of 2"),
        (("a", "b", "c"), ("c",), [2], "class table: 1 rows by name, of 3"),
        (NUMBERED, ("3", "5"), [None, None], "class table: all 2 rows start fresh, the null class stays"),
        (NUMBERED, tuple("abcdefg"), list(range(7)), ""),
        (("a", "b"), ("b", "x", "y"), [1, None, None], "class table: 1 of 3 rows by name, the others start fresh, the"),
    ],
)
def test_which_rows_are_taken(
    theirs: tuple[str, ...], ours: tuple[str, ...], rows: list[int | None], line: str
) -> None:
    before, own = torch.randn(len(theirs) + 1, 3), torch.randn(len(ours) + 1, 3)
    model = replace(SMALL.model, num_classes=len(theirs))
    initial = Weights({TABLE: before, "x": own}, About(model, SMALL.sampling, 16, SMALL.text, theirs, True, "", 0))
    found, said = stages.with_classes(initial, own, ours)
    assert said.startswith(line)
    assert bool(said) == bool(line)
    for row, there in enumerate(rows):
        assert torch.equal(found.tensors[TABLE][row], own[row] if there is None else before[there])
    assert torch.equal(found.tensors[TABLE][-1], before[-1])
    assert len(found.tensors[TABLE]) == len(ours) + 1
    assert found.tensors["x"] is own


def test_another_network_is_still_refused(own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wide.safetensors"
    written(file, ("a",) * 5, width=64)
    line = refused([*arguments(own_shards, tmp_path / "run", "--init", str(file)), "--dry-run"], capsys)
    assert "is another network: model.width is 64 there and 32 here" in line
    assert "num_classes" not in line
    tensors = written(file, ("a",) * 5)
    metadata = safe_open(file, framework="pt").metadata()
    vectors.write(file, {name: (tuple(t.shape), [t]) for name, t in tensors.items() if name != TABLE}, metadata)
    line = refused([*arguments(own_shards, tmp_path / "run", "--init", str(file)), "--dry-run"], capsys)
    assert f"misses {TABLE}" in line
    written(file, ("a",) * 5)
    assert cli.main([*arguments(own_shards, tmp_path / "run", "--init", str(file)), "--dry-run"]) == 0

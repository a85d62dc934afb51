"""Norms of each block under ZeRO-2 on real ranks, against plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import succeed
from tests.support.small_run import STEP_BATCH, arguments, scalars


@pytest.mark.parametrize(
    ("ranks", "precision", "modulation", "checkpointing"),
    [
        pytest.param(1, "fp32", "post", "none", marks=pytest.mark.long),
        (2, "fp32", "pre", "full"),
        (1, "fp32", "pre", "chunked"),
        pytest.param(2, "bf16", "post", "full", marks=pytest.mark.long),
    ],
)
def test_norms_are_those_of_a_plain_process(
    ranks: int, precision: str, modulation: str, checkpointing: str, shards: Path
) -> None:
    """Two steps with accumulation 2 and clipping hit, and a skipped one between them."""
    succeed(ranks, "tests.programs.block_norms", [precision, modulation, checkpointing, shards])


@pytest.mark.long
def test_a_run_writes_them_where_it_was_asked_to(shards: Path, tmp_path: Path) -> None:
    """Every third step and the last; the learning is the same with and without them."""
    options = ["--optim.end-at", str(7 * STEP_BATCH)]
    for name, every in (("with", str(3 * STEP_BATCH)), ("without", "never")):
        succeed(1, "megapix", arguments(shards, tmp_path / name, *options, "--log.blocks-every", every))
    assert list(scalars(tmp_path / "with", "blocks/grad_norm/patch_00")) == [3, 6, 7]
    assert list(scalars(tmp_path / "with", "blocks/modulation_rms/pit_1/gate2")) == [3, 6, 7]
    losses = [scalars(tmp_path / name, "loss/train") for name in ("with", "without")]
    assert losses[0] == losses[1]
    with pytest.raises(KeyError):
        scalars(tmp_path / "without", "blocks/grad_norm/patch_00")


@pytest.mark.long
def test_a_compiled_block_is_watched_too() -> None:
    succeed(1, "tests.programs.compiled_blocks", [])

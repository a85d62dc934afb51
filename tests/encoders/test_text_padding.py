"""Padding that is attended to: what the released text-to-image network was trained on, against transformers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapix.encoders import text as text_encoder
from megapix.shards.text_recipe import Recipe
from tests.encoders.test_text import KINDS, close, from_transformers
from tests.support import text_encoders
from tests.support.text_encoders import CAPTIONS, WIDTH

MOST, PREFIX = 11, "user prompt : "
RECIPE = Recipe(max_tokens=MOST, normalize="none", scale=1.0, prefix="", dtype="fp32", padding="attended")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {kind: text_encoders.make(root / kind, kind) for kind in KINDS}


def as_released(folder: Path, caption: str, prefix: str) -> Tensor:
    """[MOST, width]: padded by the tokenizer to the instruction's tokens and MOST - 2 more (without an instruction, and
    for the empty caption, to MOST), of which the first and the last MOST - 1 are kept."""
    model, tokenizer = from_transformers(folder, torch.float32)
    tokenizer.padding_side = "right"
    instructed = bool(prefix and caption)
    length = len(tokenizer.encode(prefix)) + MOST - 2 if instructed else MOST
    shown = tokenizer(
        prefix + caption if instructed else caption,
        max_length=length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(input_ids=shown["input_ids"], attention_mask=shown["attention_mask"]).last_hidden_state[0]
    return hidden[[0, *range(-MOST + 1, 0)]]


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_as_the_released_code_makes_them(kind: str, prefix: str, folders: dict[str, Path]) -> None:
    """Captions of all lengths, the empty one among them and one that is cut, in one batch and one by one."""
    encoder = text_encoder.load(str(folders[kind]), replace(RECIPE, prefix=prefix))
    captions = [*CAPTIONS, ""]
    (features,) = encoder(captions)
    assert features.shape == (len(captions), MOST, WIDTH)
    for caption, found in zip(captions, features, strict=True):
        expected = as_released(folders[kind], caption, prefix)
        assert close(found, expected), caption
        assert close(encoder([caption])[0][0], expected), caption
    assert encoder.cut == 2
    assert encoder(captions[:0])[0].shape == (0, MOST, WIDTH)


def test_padding_knows_the_caption(folders: dict[str, Path]) -> None:
    """So it cannot be left out and made again: of two captions it differs, and from place to place."""
    encoder = text_encoder.load(str(folders["gemma2"]), RECIPE)
    (features,) = encoder(["red cat", "two dog"])
    behind = features[:, -3:]
    assert (behind[0] - behind[1]).abs().amax(-1).min() > 1e-3
    assert (behind[0, 0] - behind[0, 1]).abs().max() > 1e-3

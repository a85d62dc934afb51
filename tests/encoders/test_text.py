"""Text encoders: against transformers itself, one caption at a time, and what the tokens of an instruction become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.masking_utils import sdpa_mask

from megapix.encoders import text as text_encoder
from megapix.encoders.text import TextEncoder
from megapix.errors import InputError
from megapix.shards.text_recipe import Recipe
from tests.support import image_encoders, text_encoders
from tests.support.text_encoders import CAPTIONS, WIDTH

KINDS = ("bert", "t5", "gemma2")
RECIPE = Recipe(max_tokens=30, normalize="none", scale=1.0, prefix="", dtype="fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {kind: text_encoders.make(root / kind, kind) for kind in KINDS}


def load(folder: Path, micro_batch: int = 0, **changes: Any) -> TextEncoder:
    return text_encoder.load(str(folder), replace(RECIPE, **changes), micro_batch)


def direct(folder: Path, caption: str, dtype: torch.dtype = torch.float32, **cut: Any) -> tuple[list[str], Tensor]:
    """(tokens, last hidden states [T, width]) of one caption by transformers."""
    model, tokenizer = from_transformers(folder, dtype)
    ids = tokenizer(caption, return_tensors="pt", **cut)["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0]
    return tokenizer.convert_ids_to_tokens(ids[0]), hidden.float()


@lru_cache
def from_transformers(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name = {"bert": "BertModel", "t5": "T5EncoderModel", "gemma2": "Gemma2Model"}[kind]
    model = getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_last_hidden_states_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    encoder = load(folders[kind])
    features, mask = encoder(CAPTIONS)
    lengths = [len(direct(folders[kind], caption)[0]) for caption in CAPTIONS]
    assert (features.dtype, mask.dtype) == (torch.float32, torch.bool)
    assert features.shape == (len(CAPTIONS), max(lengths), WIDTH)
    assert encoder.width == WIDTH
    assert mask.sum(1).tolist() == lengths
    assert len(set(lengths)) > 3
    for row, caption in enumerate(CAPTIONS):
        assert mask[row, : lengths[row]].all()
        assert close(features[row, : lengths[row]], direct(folders[kind], caption)[1])
        assert (features[row, lengths[row] :] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_they_are_those_of_transformers_in_bf16(kind: str, folders: dict[str, Path]) -> None:
    """In whose models rotary positions stay fp32's."""
    encoder = load(folders[kind], dtype="bf16")
    assert {weight.dtype for weight in encoder.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in {buffer.dtype for buffer in encoder._model.buffers()}
    for caption in CAPTIONS:
        features, _ = encoder([caption])
        _, expected = direct(folders[kind], caption, torch.bfloat16)
        assert (features[0] - expected).abs().max() <= 0.01 * expected.abs().max()
        assert torch.equal(features, features.bfloat16().float())


def test_each_token_is_divided_by_its_root_mean_square(folders: dict[str, Path]) -> None:
    _, expected = direct(folders["t5"], CAPTIONS[1])
    features, _ = load(folders["t5"], normalize="rms", scale=0.01)(CAPTIONS[1:2])
    assert close(features[0] * 100, torch.stack([token / (token**2).mean().add(1e-6).sqrt() for token in expected]))
    features, _ = load(folders["t5"], scale=0.5)(CAPTIONS[1:2])
    assert close(features[0], 0.5 * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_others_of_a_batch_change_nothing(kind: str, folders: dict[str, Path]) -> None:
    expected, mask = load(folders[kind])(CAPTIONS)
    for size in (1, 2, 4):
        features, same = load(folders[kind], size)(CAPTIONS)
        assert torch.equal(mask, same)
        assert close(features, expected)
    back, same = load(folders[kind])(CAPTIONS[::-1])
    assert torch.equal(back.flip(0), expected), "the order has no part in what is computed"
    assert torch.equal(same.flip(0), mask)


def test_a_caption_that_occurs_twice_is_encoded_once(folders: dict[str, Path]) -> None:
    encoder, shapes = load(folders["bert"], 2), list[tuple[int, ...]]()

    def note(_model: Any, _args: Any, shown: dict[str, Tensor]) -> None:
        shapes.append(tuple(shown["input_ids"].shape))

    encoder._model.register_forward_pre_hook(note, with_kwargs=True)
    features, mask = encoder(["zebra", "blue", "zebra", "", "blue", "a photo"])
    assert shapes == [(2, 3), (2, 7)], "by length: '' and 'blue', then 'a photo' and 'zebra'"
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[1], features[4])
    assert mask.sum(1).tolist() == [7, 3, 7, 2, 3, 4]


def test_no_captions(folders: dict[str, Path]) -> None:
    features, mask = load(folders["bert"])([])
    assert (features.shape, mask.shape) == ((0, 1, WIDTH), (0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The instruction, long captions, and the empty one
# ---------------------------------------------------------------------------------------------------------------------

PREFIXED = {
    "bert": (["[CLS]", "user", "prompt", ":", "red", "cat", "[SEP]"], [0, 4, 5, 6]),
    "t5": (["▁user", "▁prompt", "▁", ":", "▁red", "▁cat", "</s>"], [0, 4, 5, 6]),
    # The prefix alone would end in a token "▁", which in front of a word is that word's.
    "gemma2": (["<bos>", "u", "s", "e", "r", "▁prompt", "▁", ":", "▁red", "▁cat"], [0, 8, 9]),
}
"""Tokens of "user prompt : " and "red cat", and those whose features are kept, by hand."""


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_instruction_the_first_token_is_kept(kind: str, folders: dict[str, Path]) -> None:
    tokens, kept = PREFIXED[kind]
    found, expected = direct(folders[kind], "user prompt : red cat")
    assert found == tokens
    features, mask = load(folders[kind], prefix="user prompt : ")(["red cat", ""])
    assert mask.sum(1).tolist() == [len(kept), len(direct(folders[kind], "")[0])]
    assert close(features[0], expected[kept])
    _, empty = direct(folders[kind], "")
    assert close(features[1, : len(empty)], empty), "the empty caption has no instruction"


@pytest.mark.parametrize("prefix", ["", "user prompt : "])
@pytest.mark.parametrize("kind", KINDS)
def test_long_captions_are_cut_as_transformers_cuts_them(kind: str, prefix: str, folders: dict[str, Path]) -> None:
    """What closes a text stays; the tokens that are kept are counted, and not the instruction's."""
    encoder = load(folders[kind], prefix=prefix, max_tokens=6)
    longest = CAPTIONS[3]
    features, mask = encoder([longest, "red", longest])
    start = PREFIXED[kind][1][1] if prefix else 1
    tokens, expected = direct(folders[kind], prefix + longest, truncation=True, max_length=start + 5)
    assert len(tokens) == start + 5
    assert mask.sum(1).tolist()[0] == 6
    assert close(features[0], torch.cat([expected[:1], expected[start:]]))
    assert torch.equal(features[0], features[2])
    assert encoder.cut == 2
    whole = len(direct(folders[kind], prefix + longest)[0]) + 1 - start
    assert encoder.first_cut is not None
    assert encoder.first_cut.startswith(f"a caption of {whole} tokens was cut to max_tokens = 6, ")
    assert "\n" not in encoder.first_cut
    said = encoder.first_cut
    encoder([CAPTIONS[1]])
    assert (encoder.cut, encoder.first_cut) == (3, said), "one is named"


def test_nothing_is_cut_at_the_limit(folders: dict[str, Path]) -> None:
    encoder = load(folders["bert"], max_tokens=7)
    assert encoder(["zebra"])[1].sum() == 7
    assert (encoder.cut, encoder.first_cut) == (0, None)


def test_the_empty_caption_is_what_the_tokenizer_makes_of_it(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, tokens in {"bert": ["[CLS]", "[SEP]"], "t5": ["</s>"], "gemma2": ["<bos>"]}.items():
        found, expected = direct(folders[kind], "")
        assert found == tokens
        assert close(load(folders[kind])([""])[0][0], expected)
    bare = text_encoders.make(tmp_path / "bare", "gemma2", bos=False)
    features, mask = load(bare)(["", "cat"])
    assert mask.sum(1).tolist() == [1, 3], "one token at least; 'cat' is spelled where a text begins"
    assert close(features[0, :1], direct(bare, "<bos>")[1])
    assert close(features[1], direct(bare, "cat")[1])


def test_without_a_token_for_padding(folders: dict[str, Path]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["gemma2"])
    tokenizer.pad_token = None
    model = transformers.Gemma2Model.from_pretrained(folders["gemma2"])
    encoder = TextEncoder(model, tokenizer, RECIPE)
    assert encoder._pad == tokenizer.eos_token_id
    assert torch.equal(encoder(CAPTIONS)[0], load(folders["gemma2"])(CAPTIONS)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_and_their_encoders_are_one(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With a language model's head or T5's decoder, without BERT's pooler, and in bf16: same digest, same features."""
    import transformers

    whole = text_encoders.make(tmp_path / "whole", kind, whole=True)
    encoder = load(whole)
    part = getattr(transformers, {"bert": "BertModel", "t5": "T5EncoderModel", "gemma2": "Gemma2Model"}[kind])
    part.from_pretrained(whole).save_pretrained(tmp_path / "part")
    text_encoders.tokenizer(kind).save_pretrained(tmp_path / "part")
    other = load(tmp_path / "part", dtype="bf16")
    assert encoder.digest == other.digest
    assert encoder.recipe == replace(other.recipe, dtype="fp32") == replace(RECIPE, digest=encoder.digest, width=WIDTH)
    assert torch.equal(encoder(CAPTIONS)[0], load(tmp_path / "part")(CAPTIONS)[0])
    assert encoder.digest != load(folders[kind]).digest


def test_digests_tell_encoders_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    """By weights, by sizes that leave no trace in them, and by the tokenizer."""
    found = {load(folder).digest for folder in folders.values()}
    found.add(load(text_encoders.make(tmp_path / "seed", "bert", seed=1)).digest)
    for name, key, value in (("eps", "layer_norm_eps", 1e-3), ("act", "hidden_act", "relu")):
        changed = Path(shutil.copytree(folders["bert"], tmp_path / name))
        config = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps(config | {key: value}))
        found.add(load(changed).digest)
    swapped = Path(shutil.copytree(folders["bert"], tmp_path / "words"))
    text = (swapped / "tokenizer.json").read_text()
    assert '"cat":' in text
    assert '"dog":' in text
    text = text.replace('"cat":', '"CAT":').replace('"dog":', '"cat":').replace('"CAT":', '"dog":')
    (swapped / "tokenizer.json").write_text(text)
    found.add(load(swapped).digest)
    assert len(found) == 7
    assert load(Path(shutil.copytree(folders["bert"], tmp_path / "moved"))).digest in found


def one_tensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LAYER = "encoder.layer.1.output.dense.bias"


def reshaped(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER] = torch.zeros(7)


BAD: dict[str, tuple[Callable[[Path], object], dict[str, Any], tuple[str, ...]]] = {
    "a tensor less": (
        lambda folder: one_tensor(folder, lambda tensors: tensors.pop(LAYER)),
        {},
        (f"lacks 1 of the encoder's tensors: {LAYER}",),
    ),
    "another shape": (lambda folder: one_tensor(folder, reshaped), {}, ("lacks 1 of", LAYER)),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), {}, ("model.safetensors",)),
    "no config": (lambda folder: (folder / "config.json").write_text("{"), {}, ("config.json",)),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        {},
        ("has no tokenizer: expected tokenizer.json",),
    ),
    "another's tokenizer": (
        lambda folder: text_encoders.tokenizer("gemma2").save_pretrained(folder),
        {},
        ("but its tokenizer numbers them up to",),
    ),
    "too many tokens": (
        lambda folder: None,
        {"max_tokens": 62, "prefix": "user prompt : "},
        ("takes 64 tokens at most: max_tokens = 62 and a prefix of 3 tokens are more",),
    ),
    "too few tokens": (lambda folder: None, {"max_tokens": 2}, ("max_tokens = 2: the caption '' has 2 tokens",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    damage, changes, words = BAD[name]
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    damage(folder)
    with pytest.raises(InputError) as error:
        load(folder, **changes)
    assert "\n" not in str(error.value)
    for part in words:
        assert part in str(error.value), error.value


def test_a_pooler_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    one_tensor(folder, lambda tensors: [tensors.pop(f"pooler.dense.{part}") for part in ("weight", "bias")])
    assert load(folder).digest == load(folders["bert"]).digest
    assert torch.equal(load(folder)(CAPTIONS)[0], load(folders["bert"])(CAPTIONS)[0])


def test_names_and_kinds_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--encoder = './nowhere': no such folder, nor a name on the hub such as"):
        text_encoder.load("./nowhere", RECIPE, option="--encoder")
    images = image_encoders.make(tmp_path / "dinov2")
    with pytest.raises(InputError, match=r"text.encoder = .*is of kind 'dinov2': expected an encoder of text"):
        load(images)


class Reads(TorchDispatchMode):
    """Counts the numbers that a program asks for: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_from_a_gpu(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks whether there is padding, but for the mask that encoders on GPUs have; features stay alike."""
    encoder, found = load(folders[kind]), dict[str, list[Tensor]]()
    for name, mask in (("theirs", sdpa_mask), ("ours", text_encoder.unread_mask)):
        monkeypatch.setitem(masks._global_mapping, "sdpa", mask)  # an encoder on a GPU leaves ours to the whole process
        with Reads() as reads:
            found[name] = [encoder(some)[0] for some in (CAPTIONS, CAPTIONS[:1])]
        if encoder._model.config._attn_implementation == "sdpa" or name == "ours":
            assert bool(reads.count) == (name == "theirs")
    assert all(close(*pair) for pair in zip(found["ours"], found["theirs"], strict=True))

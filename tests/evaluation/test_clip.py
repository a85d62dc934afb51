"""How well images fit their prompts, by a small CLIP and a small SigLIP that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megapix.cli import main as cli
from megapix.encoders.clip import load
from megapix.errors import InputError
from megapix.evaluation.manifest import read_scores
from megapix.evaluation.scores import fit
from tests.support.launch import succeed
from tests.support.small_run import refused
from tests.support.text_encoders import LETTERS, WORDS, tokenizer
from tests.support.trained import text_model

PROMPTS = ("a red mat", "two small dog", "the cat on the mat with the dog and a blue cat on a red mat", "zebra", "blue")
COUNT, BATCH, MOST = 13, 4, 16
"""More images than twice the prompts; a last block of one; and a prompt that has more tokens than the encoder takes."""


def make(folder: Path, kind: str) -> Path:
    """Save a CLIP or SigLIP of random weights, with its tokenizer and its image processor."""
    import transformers

    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"image_size": 20, "patch_size": 5}
    sides = {"height": 20, "width": 20}
    words: Any
    if kind == "clip":
        ends = [*LETTERS, *WORDS]
        tokens = dict.fromkeys([*LETTERS, *(word + "</w>" for word in ends), "<|startoftext|>", "<|endoftext|>"])
        pairs = [(word[:n], word[n] + "</w>" * (n == len(word) - 1)) for word in WORDS for n in range(1, len(word))]
        tokens |= dict.fromkeys(a + b for a, b in pairs)
        vocabulary = {token: n for n, token in enumerate(tokens)}
        words = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(pairs)))
        end = {"eos_token_id": vocabulary["<|endoftext|>"], "bos_token_id": vocabulary["<|startoftext|>"]}
        text = tower | {"vocab_size": len(words), "max_position_embeddings": MOST} | end
        model = transformers.CLIPModel
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=sides)
    else:
        words = tokenizer("t5")
        text = tower | {"vocab_size": len(words), "max_position_embeddings": MOST}
        model = transformers.SiglipModel
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        images = transformers.SiglipImageProcessorPil(size=sides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = model(config)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape) * 0.1)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "t2i", text_encoder)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("encoder") / request.param, request.param)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def cosines(folder: Path, images: list[Path]) -> np.ndarray:
    """[images, prompts], by the whole model of transformers, one image and one prompt at a time."""
    import transformers

    net = transformers.AutoModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = np.zeros((len(images), len(PROMPTS)))
    for row, path in enumerate(images):
        pixels = processor(images=Image.open(path), return_tensors="pt")
        for column, prompt in enumerate(PROMPTS):
            padding = {"padding": "max_length"} if net.config.model_type == "siglip" else {}
            tokens = words(prompt, truncation=True, max_length=MOST, return_tensors="pt", **padding)
            with torch.no_grad():
                out = net(input_ids=tokens["input_ids"], **pixels)
            found[row, column] = (out.image_embeds[0] @ out.text_embeds[0]).item()
            assert out.image_embeds[0].norm().item() == pytest.approx(1, abs=1e-5)
    return found


def test_scores_are_those_of_transformers(
    encoder: Path, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the images that were written, without a reference; on two ranks and repeated, the same."""
    asked = ["evaluate", model, "--prompts", prompts, "--clip", encoder, "--count", COUNT, "--batch", BATCH]
    command = [str(part) for part in asked]
    first = tmp_path / "score.json"
    assert cli.main([*command, "--out", str(first), "--images", str(tmp_path / "png")]) == 0
    said = capsys.readouterr().err
    assert "1 of 5 prompts have more than --clip's 16 tokens" in said
    kind, scored = encoder.name, read_scores(first, "--out")
    expected = cosines(encoder, sorted((tmp_path / "png").iterdir()))
    own = [max(0.0, expected[n, n % len(PROMPTS)]) for n in range(COUNT)]
    best = [int(expected[n].argmax() == n % len(PROMPTS)) for n in range(COUNT)]
    assert scored.scores == {
        f"{kind}_score": pytest.approx(100 * sum(own) / COUNT, abs=1e-3),
        f"{kind}_adherence": pytest.approx(sum(best) / COUNT),
    }
    assert expected.std() > 1e-4
    m = scored.manifest
    assert (m.clip.path, m.reference.sha256, m.extractor) == (str(encoder), "", "")
    assert m.clip.sha256 == load(str(encoder), "--clip").sha256
    assert cli.main(["evaluate", "--repeat", str(first)]) == 0
    assert read_scores(tmp_path / "score-repeated.json", "--out") == scored
    if kind == "clip":
        succeed(2, "megapix", [*command, "--out", str(tmp_path / "two.json")])
        assert read_scores(tmp_path / "two.json", "--out") == scored


def test_what_is_refused(
    encoder: Path, model: Path, prompts: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "x.json"), "--count", "2"]
    assert "--reference is missing" in refused(asked, capsys)
    assert "--clip = 'nowhere': no such folder, nor a name on the hub such as" in refused(
        [*asked, "--clip", "nowhere"], capsys
    )
    line = refused([*asked, "--clip", str(text_encoder)], capsys)
    assert "expected one of clip, siglip, siglip2" in line
    assert cli.main([*asked, "--clip", str(encoder)]) == 0
    written = json.loads((encoder / "preprocessor_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in encoder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "preprocessor_config.json").write_text(json.dumps(written | {"image_mean": [0.4, 0.5, 0.6]}))
    line = refused(["evaluate", "--repeat", str(tmp_path / "x.json"), "--clip", str(other)], capsys)
    assert f"clip {str(other)!r} with sha256" in line
    (other / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"--clip = .*other"):
        load(str(other), "--clip")


def test_fit_by_hand() -> None:
    """Four images, three prompts, of which two are the same text."""
    texts = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    images = np.array([[0.8, 0.6], [0.6, 0.8], [0.8, 0.6], [-1, 0]], np.float32)
    found = fit(images, texts, [0, 2, 1, 0], "clip")
    assert found["clip_score"] == pytest.approx(100 * (0.8 + 0.8 + 0.6 + 0) / 4, abs=1e-5)
    assert found["clip_adherence"] == 0.5, "the first two: a text that is there twice is its own equal"
    assert fit(images, texts[:1], [0, 0, 0, 0], "x")["x_adherence"] is None

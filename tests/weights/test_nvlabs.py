"""Released weights in and out: files made here in the authors' naming, from the shapes of the formulas alone."""

from __future__ import annotations

import json
import math
import os
import resource
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from megapix import config
from megapix.checkpoint import vectors
from megapix.cli import main as cli
from megapix.config import ModelConfig, TextConfig
from megapix.errors import InputError
from megapix.model import build
from megapix.weights import nvlabs
from megapix.weights import read as weights
from megapix.weights.about import About
from tests.support import second_network
from tests.support.launch import succeed
from tests.support.small_run import SMALL, arguments

Shapes = dict[str, tuple[int, ...]]
CHOICES = [("swiglu", 6), ("swiglu", 4), ("gelu", 6)]
KINDS = ["classes", "text"]


def shapes_of(
    width: int, depth: int, heads: int, pixel_depth: int, mlp: str, ways: int,
    patch: int = 16, pixel_width: int = 16, classes: int = 1000,
    text: tuple[int, int] | None = None, inner: tuple[int, int] | None = None,
) -> Shapes:  # fmt: skip
    """Every name of a released state dict without its prefix, and its shape.

    Args:
        text: width of the text features and the most tokens, in place of classes.
        inner: width and heads of attention in the pixel blocks, if they are its own.
    """
    found: Shapes = {}
    channels = patch * patch * pixel_width
    attention_width, attention_heads = inner or (width, heads)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def attention(name: str, width: int, heads: int, stream: str = "") -> None:
        linear(f"{name}.qkv{stream}", width, 3 * width, bias=False)
        found[f"{name}.q_norm{stream}.weight"] = found[f"{name}.k_norm{stream}.weight"] = (width // heads,)
        linear(f"{name}.proj{stream}", width, width)

    def patch_mlp(name: str) -> None:
        if mlp == "swiglu":
            hidden = int(2 / 3 * 4 * width)
            linear(f"{name}.w1", width, hidden, bias=False)
            linear(f"{name}.w3", width, hidden, bias=False)
            linear(f"{name}.w2", hidden, width, bias=False)
        else:
            linear(f"{name}.fc1", width, 4 * width)
            linear(f"{name}.fc2", 4 * width, width)

    linear("s_embedder.proj", 3 * patch * patch, width)
    linear("t_embedder.mlp.0", 256, width)
    linear("t_embedder.mlp.2", width, width)
    if text:
        linear("y_embedder.proj", text[0], width)
        found["y_embedder.norm.weight"] = (width,)
        found["y_pos_embedding"] = (1, text[1], width)
    else:
        found["y_embedder.embedding_table.weight"] = (classes + 1, width)
    linear("pixel_embedder.proj", 3, pixel_width)
    for name in (f"patch_blocks.{n}" for n in range(depth)):
        if text:
            for stream in ("x", "y"):
                found[f"{name}.norm_{stream}1.weight"] = found[f"{name}.norm_{stream}2.weight"] = (width,)
                attention(f"{name}.attn", width, heads, f"_{stream}")
                patch_mlp(f"{name}.mlp_{stream}")
            linear(f"{name}.adaLN_modulation_img.0", width, 6 * width)
            linear(f"{name}.adaLN_modulation_txt.0", width, 6 * width)
        else:
            found[f"{name}.norm1.weight"] = found[f"{name}.norm2.weight"] = (width,)
            attention(f"{name}.attn", width, heads)
            patch_mlp(f"{name}.mlp")
            linear(f"{name}.adaLN_modulation.0", width, 6 * width)
    for name in (f"pixel_blocks.{n}" for n in range(pixel_depth)):
        found[f"{name}.norm1.weight"] = found[f"{name}.norm2.weight"] = (pixel_width,)
        linear(f"{name}.compress_to_attn", channels, attention_width)
        attention(f"{name}.attn", attention_width, attention_heads)
        linear(f"{name}.expand_from_attn", attention_width, channels)
        linear(f"{name}.mlp.fc1", pixel_width, 4 * pixel_width)
        linear(f"{name}.mlp.fc2", 4 * pixel_width, pixel_width)
        linear(f"{name}.adaLN_modulation.0", width, ways * channels)
    found["final_layer.norm.weight"] = (pixel_width,)
    linear("final_layer.linear", pixel_width, 3)
    return found


def small(mlp: str = "swiglu", ways: int = 6, kind: str = "classes") -> Shapes:
    """The shapes of the tests' small run, or of a network of its size that takes text."""
    text: dict[str, Any] = {"text": (12, 6), "inner": (24, 3)} if kind == "text" else {}
    return shapes_of(32, 2, 2, 2, mlp, ways, patch=4, pixel_width=8, classes=3, **text)


def tensors(shapes: Shapes, prefix: str, seed: int, dtypes: Sequence[torch.dtype]) -> dict[str, torch.Tensor]:
    """Random weights in these dtypes by turns."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: (torch.randn(shape, generator=generator) * 0.1).to(dtypes[n % len(dtypes)])
        for n, (name, shape) in enumerate(shapes.items())
    }


def released(path: Path, state: dict[str, Any], **others: Any) -> Path:
    torch.save({"state_dict": state, "epoch": 79, **others}, path)
    return path


def both(shapes: Shapes, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> dict[str, torch.Tensor]:
    return tensors(shapes, "denoiser.", 1, dtypes) | tensors(shapes, "ema_denoiser.", 2, dtypes)


def only(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def run(*command: str | Path) -> int:
    return cli.main([str(word) for word in command])


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("mlp", "ways"), CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_imported_and_exported_back_bit_for_bit(
    kind: str, mlp: str, ways: int, dtypes: Sequence[torch.dtype], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = both(small(mlp, ways, kind), dtypes)
    file, folder, back = released(tmp_path / "theirs.pth", state), tmp_path / "model", tmp_path / "ours.pth"
    assert run("import", file, "--out", folder, "--image-size", "16") == 0
    said = capsys.readouterr().out
    attention, about = {
        "classes": ("", "3 classes"),
        "text": (" (attention 24 wide, 3 heads)", "text 12 wide, at most 6 tokens"),
    }[kind]
    assert (
        f"{folder}: the EMA of {file}: PixelDiT, 2 + 2 blocks, width 32, 2 heads, patch 4, pixel width 8{attention}, "
        f"{mlp} FFN, {'pre' if ways == 6 else 'post'}-modulation, {about}\n"
    ) in said
    assert "taken from state_dict, behind 'ema_denoiser.'\n" in said

    assert run("export", folder, "--format", "nvlabs", "--out", back) == 0
    found = torch.load(back, weights_only=True)
    assert list(found) == ["state_dict"]
    assert_identical(found["state_dict"], only(state, "ema_denoiser."))
    numbers = sum(tensor.nbytes for tensor in only(state, "ema_denoiser.").values())
    assert back.stat().st_size < numbers + 400 * len(state) // 2, "the tensors, and not the file they came from"

    assert run("import", file, "--out", tmp_path / "raw", "--raw") == 0
    assert run("export", tmp_path / "raw" / "model.safetensors", "--format", "nvlabs", "--out", back) == 0
    assert "the raw weights of" in capsys.readouterr().out
    assert_identical(torch.load(back, weights_only=True)["state_dict"], only(state, "denoiser."))

    assert run("import", back, "--out", tmp_path / "again") == 0
    first, again = (weights.stored_weights(tmp_path / name) for name in ("raw", "again"))
    assert_identical(again.tensors, first.tensors)
    assert replace(again.about, source="") == replace(first.about, source="")


def test_an_imported_network_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = released(tmp_path / "theirs.ckpt", both(small(), (torch.bfloat16,))), tmp_path / "model"
    assert run("import", file, "--out", folder, "--image-size", "16") == 0
    assert run("sample", folder, "--out", tmp_path / "a.png", "--per-class", "1", "--steps", "2", "--zoom", "2") == 0
    assert f"from the EMA of {folder}" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * (2 + 18), 2 * (2 + 3 * 18))


PLACES: dict[str, tuple[Callable[[Shapes], dict[str, Any]], bool, str]] = {
    "a state dict alone": (lambda shapes: stored(shapes), False, "the file itself, without a prefix"),
    "no prefix": (lambda shapes: {"state_dict": stored(shapes)}, False, "state_dict, without a prefix"),
    "DataParallel's": (
        lambda shapes: {"state_dict": stored(shapes, "module.")}, False, "state_dict, behind 'module.'"
    ),
    "the text-to-image trainer's": (
        lambda shapes: {"state_dict": stored(shapes, "core.") | {"_repa_projector.0.bias": torch.zeros(4)}},
        False, "state_dict, behind 'core.'",
    ),
    "a compiled EMA and raw weights": (
        lambda shapes: {"state_dict": stored(shapes, "ema_denoiser._orig_mod.") | stored(shapes, "denoiser.", 1)},
        True, "state_dict, behind 'ema_denoiser._orig_mod.'",
    ),
    "the EMA apart": (
        lambda shapes: {"state_dict": stored(shapes, "", 1), "state_dict_ema": stored(shapes), "epoch": 3},
        True, "state_dict_ema, without a prefix",
    ),
    "the EMA alone": (lambda shapes: {"ema": stored(shapes, "model.")}, True, "ema, behind 'model.'"),
    "options of the EMA": (
        lambda shapes: {"state_dict": stored(shapes), "ema": {"decay": 0.9999}}, False, "state_dict, without a prefix"
    ),
    "one inside another": (
        lambda shapes: {"state_dict": stored(shapes, "", 1) | stored(shapes, "ema.")}, True, "state_dict, behind 'ema.'"
    ),
    "ours among others": (
        lambda shapes: {"state_dict": stored(shapes, "teacher.", 1) | stored(shapes, "denoiser.")},
        False, "state_dict, behind 'denoiser.'",
    ),
}  # fmt: skip
"""Name -> (what a file of these shapes holds, whether it is the EMA, and where in the file it is)."""


def stored(shapes: Shapes, prefix: str = "", seed: int = 7) -> dict[str, torch.Tensor]:
    return tensors(shapes, prefix, seed, [torch.bfloat16, torch.float32])


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_is_found(kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, ema, place = PLACES[name]
    content, file, folder = make(small(kind=kind)), tmp_path / "theirs.pth", tmp_path / "model"
    torch.save(content, file)
    assert run("import", file, "--out", folder) == 0
    said = capsys.readouterr().out
    assert f"the {'EMA' if ema else 'raw weights'} of {file}" in said
    assert f"megapix: taken from {place}\n" in said
    assert ("not taken" in said) == (name in ("the text-to-image trainer's", "ours among others"))
    found = weights.stored_weights(folder)
    assert found.about.ema == ema
    assert_identical(found.tensors, stored(small(kind=kind)))
    assert run("export", folder, "--format", "nvlabs", "--out", tmp_path / "back.ckpt") == 0
    written = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert_identical(written, stored(small(kind=kind), "ema_denoiser." if ema else "denoiser."))


def test_raw_weights_beside_the_ema(tmp_path: Path) -> None:
    torch.save({"state_dict": stored(small(), "", 1), "state_dict_ema": stored(small())}, tmp_path / "theirs.pth")
    assert_identical(nvlabs.read(tmp_path / "theirs.pth", ema=False).tensors, stored(small(), "", 1))


def test_what_is_not_clear_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, file = small(), tmp_path / "theirs.pth"
    broken = stored(shapes)
    del broken["s_embedder.proj.weight"]
    for content, words in (
        (
            {"state_dict": stored(shapes, "student.") | stored(shapes, "teacher.")},
            "holds raw weights of several networks: state_dict, behind 'student.'; state_dict, behind 'teacher.'",
        ),
        (
            {"ema": stored(shapes), "state_dict_ema": stored(shapes)},
            "holds EMA weights of several networks: ema, without a prefix; state_dict_ema, without a prefix",
        ),
        (
            {"state_dict": stored(shapes), "state_dict_ema": broken},
            "no name in state_dict_ema ends in 's_embedder.proj.weight'",
        ),
        (
            stored(shapes) | {"_repa_projector.0.bias": torch.zeros(1)},
            "holds the unknown _repa_projector.0.bias",
        ),
    ):
        torch.save(content, file)
        assert run("import", file, "--out", tmp_path / "model") == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["theirs.pth"]


@pytest.mark.parametrize(("mlp", "ways"), CHOICES)
def test_an_imported_network_computes_what_the_formulas_say(mlp: str, ways: int, tmp_path: Path) -> None:
    state = both(small(mlp, ways))
    file, folder = released(tmp_path / "theirs.ckpt", state), tmp_path / "model"
    assert run("import", file, "--out", folder, "--image-size", "8") == 0
    x, t, y = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)), torch.rand(2), torch.tensor([0, 3])
    plain = {name.removeprefix("ema_denoiser."): tensor for name, tensor in only(state, "ema_denoiser.").items()}
    expected = second_network.pixeldit(plain, 4, x, t, y).float()
    torch.testing.assert_close(weights.load_model(folder)(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_an_imported_network_takes_text(tmp_path: Path) -> None:
    state = both(small(kind="text"))
    file, folder = released(tmp_path / "theirs.pth", state), tmp_path / "model"
    net = build(ModelConfig(4, 32, 2, 2, 8, 2, 24, 3, "swiglu", "pre", 0, 12, 6))
    net.load_state_dict({name.removeprefix("ema_denoiser."): t for name, t in only(state, "ema_denoiser.").items()})
    x, t, y = torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 5, 12)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    net.eval()
    assert run("import", file, "--out", folder, "--convention", "paper") == 0
    assert torch.equal(weights.load_model(folder)(x, t, y, mask), net(x, t, y, mask))
    assert weights.about(folder).text == TextConfig(max_tokens=6)

    assert run("import", file, "--out", tmp_path / "theirs") == 0
    theirs = weights.about(tmp_path / "theirs")
    assert (theirs.text, theirs.model.convention) == (config.released_text(6), "released")
    torch.testing.assert_close(weights.load_model(tmp_path / "theirs")(x, t, y), -net(x, 1000 * (1 - t), y))


def test_classes_have_one_convention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = released(tmp_path / "theirs.pth", both(small()))
    assert run("import", file, "--out", tmp_path / "model", "--convention", "released") == 2
    assert "model.convention = 'released': expected 'paper' for a network that takes" in capsys.readouterr().err


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("ways", [6, 4])
@pytest.mark.parametrize("name", ["PixelDiT-B", "PixelDiT-L", "PixelDiT-XL"])
def test_sizes_are_recognised_from_shapes_alone(name: str, mlp: str, ways: int) -> None:
    sizes = {"PixelDiT-B": (768, 12, 12, 2), "PixelDiT-L": (1024, 22, 16, 4), "PixelDiT-XL": (1152, 26, 16, 4)}[name]
    shapes = shapes_of(*sizes, mlp, ways)
    found = nvlabs.recognise(shapes, "here")
    modulation = "pre" if ways == 6 else "post"
    expected = ModelConfig(16, *sizes[:3], 16, sizes[3], mlp="swiglu", modulation="pre", num_classes=1000)
    assert found == replace(expected, mlp=mlp, modulation=modulation)
    assert nvlabs.describe(found).startswith(f"{name}, ")
    # The published numbers of parameters, in millions.
    published = {
        ("PixelDiT-B", "swiglu", 6): 184.7, ("PixelDiT-B", "gelu", 6): 184.8,
        ("PixelDiT-L", "swiglu", 6): 569.6, ("PixelDiT-L", "gelu", 6): 569.8,
        ("PixelDiT-XL", "swiglu", 6): 797.4, ("PixelDiT-XL", "gelu", 6): 797.5,
        ("PixelDiT-XL", "swiglu", 4): 759.6, ("PixelDiT-XL", "gelu", 4): 759.8,
    }  # fmt: skip
    if (name, mlp, ways) in published:
        total = sum(math.prod(shape) for shape in shapes.values())
        assert round(total / 1e6, 1) == published[name, mlp, ways]


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("ways", [6, 4])
def test_the_text_network_is_recognised_from_shapes_alone(mlp: str, ways: int) -> None:
    shapes = shapes_of(1536, 14, 24, 2, mlp, ways, text=(2304, 300), inner=(1152, 16))
    found = nvlabs.recognise(shapes, "here")
    expected = replace(config.pixeldit_t2i(), convention="paper")  # neither names nor shapes tell
    assert found == replace(expected, mlp=mlp, modulation="pre" if ways == 6 else "post")
    assert nvlabs.describe(found) == (
        "PixelDiT-T2I, 14 + 2 blocks, width 1536, 24 heads, patch 16, pixel width 16 (attention 1152 wide, 16 heads), "
        f"{mlp} FFN, {'pre' if ways == 6 else 'post'}-modulation, text 2304 wide, at most 300 tokens"
    )
    if (mlp, ways) == ("swiglu", 6):
        assert sum(math.prod(shape) for shape in shapes.values()) == 1_302_470_787


@pytest.mark.parametrize("name", config.PRESETS)
def test_each_preset_is_recognised(name: str) -> None:
    model = config.preset(name).model
    with torch.device("meta"):
        shapes = weights.shapes_of(build(model).state_dict())
    assert nvlabs.recognise(shapes, "here") == replace(model, convention="paper")  # which no shape tells


ODD = {
    "classes": (
        shapes_of(96, 3, 6, 1, "swiglu", 4, patch=8, pixel_width=12, classes=17),
        ModelConfig(8, 96, 3, 6, 12, 1, mlp="swiglu", modulation="post", num_classes=17),
    ),
    "classes, own pixel attention": (
        shapes_of(96, 3, 6, 1, "gelu", 6, patch=8, pixel_width=12, classes=1, inner=(96, 3)),
        ModelConfig(8, 96, 3, 6, 12, 1, 96, 3, num_classes=1),
    ),
    "text": (
        shapes_of(96, 3, 6, 1, "swiglu", 4, patch=8, pixel_width=12, text=(20, 1)),
        ModelConfig(8, 96, 3, 6, 12, 1, 0, 0, "swiglu", "post", 0, 20, 1),
    ),
    "text, own pixel attention": (
        shapes_of(96, 3, 6, 1, "gelu", 6, patch=8, pixel_width=12, text=(96, 77), inner=(160, 10)),
        ModelConfig(8, 96, 3, 6, 12, 1, 160, 10, "gelu", "pre", 0, 96, 77),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_any_other_size_is_recognised(name: str) -> None:
    shapes, expected = ODD[name]
    found = nvlabs.recognise(shapes, "here")
    assert found == expected
    assert nvlabs.describe(found).startswith("PixelDiT, 3 + 1 blocks")


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    state = both(small(), (torch.bfloat16, torch.float32))
    file = released(tmp_path / "theirs.ckpt", state)
    for size, guidance, to, shift in (("256", 2.75, 0.9, 1.0), ("512", 3.5, 1.0, 2.0)):
        folder = tmp_path / size
        assert run("import", file, "--out", folder, "--image-size", size) == 0
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            about = json.loads(opened.metadata()["megapix"])
            assert opened.get_tensor("t_embedder.mlp.0.bias").dtype in (torch.bfloat16, torch.float32)
        assert about["sampling"] == {
            "sampler": "ab2", "steps": 100, "guidance": guidance, "guidance_from": 0.1, "guidance_to": to,
            "shift": shift,
        }  # fmt: skip
        assert (about["image_size"], about["classes"], about["ema"]) == (int(size), ["0", "1", "2"], True)
        assert config.from_dict(config.Config, json.loads((folder / "config.json").read_text()), "x") == config.Config(
            model=ModelConfig(4, 32, 2, 2, 8, 2, mlp="swiglu", modulation="pre", num_classes=3),
            flow=config.FlowConfig(generator="philox"),
            data=config.DataConfig(image_size=int(size)),
            sampling=config.SamplingConfig(guidance=guidance, guidance_to=to, shift=shift),
        )
    folder = tmp_path / "own"
    options = ["--guidance", "3.25", "--interval", "0.1", "1", "--shift", "1.5", "--ema"]
    assert run("import", file, "--out", folder, *options) == 0
    assert weights.load_weights(folder).about.sampling == config.SamplingConfig(
        guidance=3.25, guidance_from=0.1, guidance_to=1.0, shift=1.5
    )


def test_the_folder_of_a_text_network_says_what_it_holds(tmp_path: Path) -> None:
    file = released(tmp_path / "theirs.pth", both(small(kind="text")))
    model = ModelConfig(4, 32, 2, 2, 8, 2, 24, 3, "swiglu", "pre", 0, 12, 6, "released")
    text = config.released_text(6)
    for size, options, shift in (
        (1024, [], 4.0), (1280, ["--image-size", "1280"], 4.0), (512, ["--image-size", "512"], 3.0),
    ):  # fmt: skip
        folder = tmp_path / str(size)
        assert run("import", file, "--out", folder, *options) == 0
        sampling = config.SamplingConfig("ab2", 50, 2.75, 0.0, 1.0, shift)
        about = weights.load_weights(folder).about
        assert replace(about, source="") == About(model, sampling, size, text, (), True, "", 0, generator="philox")
        written = config.from_dict(config.Config, json.loads((folder / "config.json").read_text()), "x")
        assert written == config.Config(
            model=model,
            flow=config.FlowConfig(generator="philox"),
            data=config.DataConfig(image_size=size),
            sampling=sampling,
            text=text,
        )
        config.validate(replace(written, out="run", data=replace(written.data, path="shards")))


def test_raw_weights_where_there_is_no_ema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tensors(small(), "denoiser.", 1, [torch.float32])
    others = {"diffusion_trainer.proj.weight": torch.zeros(2), "vae.scale": torch.zeros(1)}
    file, folder = released(tmp_path / "theirs.ckpt", state | others), tmp_path / "model"
    assert run("import", file, "--out", folder) == 0
    said = capsys.readouterr().out
    assert "the raw weights of" in said
    assert "not taken" in said
    assert "diffusion_trainer.proj.weight, vae.scale" in said
    assert not weights.load_weights(folder).about.ema
    assert weights.load_model(folder, ema=False).config.mlp == "swiglu"
    assert run("sample", folder, "--out", tmp_path / "a.png", "--size", "8", "8", "--steps", "1") == 0
    with pytest.raises(InputError, match="holds raw weights, but the EMA ones were asked for"):
        weights.load_model(folder, ema=True)
    capsys.readouterr()
    assert run("import", file, "--out", tmp_path / "ema", "--ema") == 2
    words = "holds raw weights (state_dict, behind 'denoiser.'), but the EMA ones were asked for"
    assert words in capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(f"ema_denoiser.{name}")


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({f"ema_denoiser.{name}": value})


QKV = "patch_blocks.1.attn.qkv.weight"
QKV_Y = "patch_blocks.1.attn.qkv_y.weight"
WRONG = {
    "missing": (without(QKV), f"misses {QKV}"),
    "missing one that is needed": (without("s_embedder.proj.weight"), "s_embedder.proj.weight is missing"),
    "missing the condition": (
        without("y_embedder.embedding_table.weight"), "y_embedder.embedding_table.weight is missing"
    ),
    "extra": (put("patch_blocks.0.mlp.w4.weight", torch.zeros(1)), "holds the unknown patch_blocks.0.mlp.w4.weight"),
    "misshapen": (put(QKV, torch.zeros(96, 31)), f"{QKV} has shape (96, 31), but the network needs (96, 32)"),
    "a scalar": (put("s_embedder.proj.weight", torch.zeros(())), "s_embedder.proj.weight has shape ()"),
    "modulation": (
        put("pixel_blocks.0.adaLN_modulation.0.weight", torch.zeros(5 * 128, 32)),
        "has 640 rows, expected 6 or 4 for each of the 128 channels",
    ),
    "heads": (
        put("patch_blocks.0.attn.q_norm.weight", torch.zeros(12)),
        "patch_blocks.0.attn.q_norm.weight is of heads of 12 channels: expected a multiple of 4 that divides the "
        "width, 32",
    ),
    "classes": (put("y_embedder.embedding_table.weight", torch.zeros(1, 32)), "has 1 row"),
    "integers": (put(QKV, torch.zeros(96, 32, dtype=torch.int64)), f"ema_denoiser.{QKV} is torch.int64; expected"),
    "no tensor": (put(QKV, 7), f"ema_denoiser.{QKV} is int; expected"),
    "a block's number": (put("patch_blocks.9.norm1.weight", torch.zeros(32)), "misses patch_blocks.2.norm1.weight"),
}  # fmt: skip
WRONG_TEXT = {
    "missing": (without(QKV_Y), f"misses {QKV_Y}"),
    "missing the condition": (without("y_embedder.proj.weight"), "y_embedder.proj.weight is missing"),
    "missing the positions": (without("y_pos_embedding"), "y_pos_embedding is missing"),
    "extra": (put("y_embedder.embedding_table.weight", torch.zeros(4, 32)), "holds the unknown y_embedder.embedding_"),
    "misshapen": (put(QKV_Y, torch.zeros(96, 31)), f"{QKV_Y} has shape (96, 31), but the network needs (96, 32)"),
    "positions of another width": (
        put("y_pos_embedding", torch.zeros(1, 6, 24)),
        "y_pos_embedding has shape (1, 6, 24), but the network needs (1, 6, 32)",
    ),
    "positions of two tables": (
        put("y_pos_embedding", torch.zeros(2, 6, 32)),
        "y_pos_embedding has shape (2, 6, 32), but the network needs (1, 6, 32)",
    ),
    "positions without their first axis": (
        put("y_pos_embedding", torch.zeros(6, 32)),
        "y_pos_embedding has shape (6, 32), but the network needs (1, 6, 32)",
    ),
    "no positions": (put("y_pos_embedding", torch.zeros(1, 0, 32)), "y_pos_embedding has shape (1, 0, 32): these"),
    "heads": (
        put("patch_blocks.0.attn.q_norm_x.weight", torch.zeros(12)),
        "patch_blocks.0.attn.q_norm_x.weight is of heads of 12 channels: expected a multiple of 4 that divides the "
        "width, 32",
    ),
    "the pixel blocks' heads": (
        put("pixel_blocks.0.attn.q_norm.weight", torch.zeros(16)),
        "pixel_blocks.0.attn.q_norm.weight is of heads of 16 channels: expected a multiple of 4 that divides the "
        "width, 24",
    ),
    "heads of the text": (
        put("patch_blocks.0.attn.k_norm_y.weight", torch.zeros(8)),
        "patch_blocks.0.attn.k_norm_y.weight has shape (8,), but the network needs (16,)",
    ),
    "a pixel block of another width": (
        put("pixel_blocks.1.compress_to_attn.weight", torch.zeros(32, 128)),
        "pixel_blocks.1.compress_to_attn.weight has shape (32, 128), but the network needs (24, 128)",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [("classes", n) for n in WRONG] + [("text", n) for n in WRONG_TEXT])
def test_a_wrong_file_is_one_line_and_code_2(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = both(small(kind=kind))
    change, words = {"classes": WRONG, "text": WRONG_TEXT}[kind][name]
    change(state)
    file = released(tmp_path / "theirs.ckpt", state)
    assert run("import", file, "--out", tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert f"megapix: error: {file}: " in error
    assert words in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["theirs.ckpt"], "nothing is left behind"


def test_the_first_of_many_faults_are_named(tmp_path: Path) -> None:
    state = tensors(small(), "ema_denoiser.", 1, [torch.float32])
    gone = [name for name in state if "patch_blocks.1.mlp" in name or "patch_blocks.1.norm" in name]
    for name in gone:
        del state[name]
    with pytest.raises(InputError) as error:
        nvlabs.read(released(tmp_path / "theirs.ckpt", state))
    first = ", ".join(f"patch_blocks.1.{name}.weight" for name in ("norm1", "norm2", "mlp.w1"))
    assert f"misses {first} and 2 more" in str(error.value)


def test_what_is_no_released_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("text", "cut", "bare", "other", "single")
    text, cut, bare, other, single = (tmp_path / f"{name}.ckpt" for name in names)
    text.write_text("hello")
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, bare)
    torch.save({"state_dict": {"module.a": torch.zeros(1)}}, other)
    torch.save(torch.zeros(1), single)
    cut.write_bytes(other.read_bytes()[:-200])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file = released(tmp_path / "theirs.ckpt", both(small()))
    for command, words in (
        ([tmp_path / "none"], "is no file; expected a released checkpoint"),
        ([text], "text.ckpt is no torch file, or not a whole one; expected a released"),
        ([cut], "cut.ckpt is no torch file, or not a whole one"),
        ([bare], "bare.ckpt has no state_dict with tensors: its keys are model, step"),
        ([other], "no name in state_dict ends in 's_embedder.proj.weight', so there is no PixelDiT in it; it holds "),
        ([single], "single.ckpt has no state_dict: Tensor; expected a released checkpoint"),
        ([file, "--image-size", "18"], "--image-size = 18: expected a multiple of the patch size 4"),
        ([file, "--ema", "--raw"], "--ema and --raw: expected one of them"),
        ([file, "--shift", "0"], "--shift = 0.0: expected above 0"),
        ([file, "--out", taken], "exists already; expected a new or empty folder"),
        ([file, "--out", file], "exists already; expected a new or empty folder"),
        ([file, "--out", file / "below"], "cannot be written: Not a directory"),
    ):
        assert run("import", "--out", tmp_path / "model", *command) == 2, command
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "model").exists()


class Code:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_runs_only_with_trust(zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder, mark = tmp_path / "theirs.ckpt", tmp_path / "model", tmp_path / "was-here"
    content = {"state_dict": both(small()), "callbacks": Code(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert run("import", file, "--out", folder) == 2
    error = capsys.readouterr().err
    assert f"{file} holds more than tensors (it needs posix.mkdir)" in error
    assert "add --trust" in error
    assert error.count("\n") == 1
    assert not mark.exists()
    assert not folder.exists()
    assert run("import", file, "--out", folder, "--trust") == 0
    assert mark.exists()
    assert weights.load_weights(folder).about.ema


def test_a_compressed_archive_is_read_too_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    """torch writes archives without compression; who packs one again may not, and what is mapped must not be that."""
    state = both(small())
    file = released(tmp_path / "theirs.ckpt", state)
    packed, flipped = tmp_path / "packed.ckpt", tmp_path / "flipped.ckpt"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as again:
        for part in archive.namelist():
            again.writestr(part, archive.read(part))
    assert_identical(nvlabs.read(packed).tensors, nvlabs.read(file).tensors)
    data = bytearray(file.read_bytes())
    data[data.index(next(iter(state.values())).numpy().tobytes()) + 5] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(InputError, match=r"is damaged: its part '.*' has another CRC"):
        nvlabs.read(flipped)


def test_images_that_are_not_finite_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = both(small())
    state["ema_denoiser.final_layer.linear.bias"] = torch.full((3,), torch.nan)
    assert run("import", released(tmp_path / "theirs.ckpt", state), "--out", tmp_path / "model") == 0
    capsys.readouterr()
    options = ["--per-class", "1", "--classes", "0", "--steps", "1", "--out", tmp_path / "x.png"]
    assert run("sample", tmp_path / "model", *options) == 2
    assert "model.safetensors: its images are not finite" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_file_of_an_old_torch_is_read_too(tmp_path: Path) -> None:
    state = tensors(small(), "ema_denoiser.", 1, [torch.float32])
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_identical(
        nvlabs.read(tmp_path / "old.ckpt").tensors,
        {name.removeprefix("ema_denoiser."): tensor for name, tensor in state.items()},
    )


def test_what_a_killed_import_left_is_cleared(tmp_path: Path) -> None:
    file, left = released(tmp_path / "theirs.ckpt", both(small())), tmp_path / ".model.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "model").mkdir()
    assert run("import", file, "--out", tmp_path / "model") == 0
    assert weights.load_weights(tmp_path / "model").about.ema
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "theirs.ckpt"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for a full disk."""
    file, folder, out = released(tmp_path / "theirs.ckpt", both(small())), tmp_path / "model", tmp_path / "out.ckpt"
    assert run("import", file, "--out", folder) == 0
    out.write_text("what was there")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        codes = [
            run("export", folder, "--format", "nvlabs", "--out", out),
            run("import", file, "--out", tmp_path / "again"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("cannot be written: File too large\n") == 2
    assert out.read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.ckpt", "theirs.ckpt"]


def test_an_exported_model_is_not_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = released(tmp_path / "theirs.ckpt", both(small())), tmp_path / "model"
    assert run("import", file, "--out", folder) == 0
    assert run("export", folder, "--out", tmp_path / "a.safetensors") == 2
    assert "model.safetensors is an exported model already" in capsys.readouterr().err
    assert run("export", folder, "--format", "nvlabs", "--raw", "--out", tmp_path / "a.ckpt") == 2
    assert "holds EMA weights, but the raw ones were asked for" in capsys.readouterr().err


def test_wide_numbers_come_first_in_a_file(tmp_path: Path) -> None:
    """An odd number of bf16 numbers before fp32 ones would leave them where no view of the file can begin."""
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2, 5), "c": torch.randn(1).half(), "d": torch.zeros(0)}
    pieces = {name: (tuple(tensor.shape), [tensor.flatten()]) for name, tensor in tensors.items()}
    vectors.write(tmp_path / "x", pieces, dtypes={name: tensor.dtype for name, tensor in tensors.items()})
    with safe_open(tmp_path / "x", framework="pt") as opened:
        assert_identical({name: opened.get_tensor(name) for name in tensors}, tensors)


@pytest.mark.long
def test_training_starts_from_imported_weights_and_goes_back(shards: Path, tmp_path: Path) -> None:
    """import → `train --init FOLDER` → export of both kinds from the run → import of each, bit for bit."""
    state = tensors(small("gelu"), "denoiser.", 1, [torch.bfloat16])
    file, folder, trained = released(tmp_path / "theirs.ckpt", state), tmp_path / "model", tmp_path / "run"
    assert run("import", file, "--out", folder, "--image-size", "16") == 0
    command = arguments(shards, trained, "--init", str(folder), "--optim.end-at", "8", "--optim.lr", "1e-12")
    assert cli.main([*command, "--dry-run"]) == 0
    as_imported = ["--config", str(folder / "config.json"), "--init", str(folder), "--data.path", str(shards)]
    assert cli.main(["train", *as_imported, "--out", str(tmp_path / "other"), "--dry-run"]) == 0
    (rank,) = succeed(1, "megapix", command)
    assert f"starting from the raw weights of {folder}" in rank.out
    own = {kind: weights.load_weights(trained, kind).tensors for kind in (True, False)}
    for tensors_ in own.values():  # one step of a vanishing learning rate
        for name, tensor in tensors_.items():
            torch.testing.assert_close(tensor, state[f"denoiser.{name}"].float(), rtol=1e-6, atol=1e-7)

    back = tmp_path / "back.ckpt"
    assert run("export", trained, "--format", "nvlabs", "--ema", "--raw", "--out", back) == 0
    both_ = torch.load(back, weights_only=True)["state_dict"]
    assert_identical(both_, {nvlabs.PREFIXES[kind] + name: t for kind in own for name, t in own[kind].items()})
    for kind in (True, False):
        assert_identical(nvlabs.read(back, kind).tensors, own[kind])
    (checkpoint,) = (trained / "checkpoints").glob("images-*")
    assert run("export", checkpoint, "--format", "nvlabs", "--out", back) == 0
    assert_identical(nvlabs.read(back).tensors, own[True])


def test_training_from_another_network_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    from megapix.model import PixelDiT

    file, folder = released(tmp_path / "theirs.ckpt", both(small("swiglu"))), tmp_path / "model"
    assert run("import", file, "--out", folder) == 0
    with pytest.raises(InputError) as error:
        weights.assign(PixelDiT(SMALL.model), weights.load_weights(folder))
    assert (
        "misses patch_blocks.0.mlp.fc1.weight, patch_blocks.0.mlp.fc1.bias, patch_blocks.0.mlp.fc2.weight and 5 more"
        in str(error.value)
    )
    assert "holds the unknown patch_blocks.0.mlp.w1.weight" in str(error.value)

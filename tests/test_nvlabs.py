"""Released weights in and out: files made here in the authors' naming, from the shapes of the formulas alone."""

from __future__ import annotations

import json
import math
import os
import resource
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from megapix import cli, config, flat, nvlabs, weights
from megapix.config import ModelConfig
from megapix.errors import InputError
from tests import reference
from tests.launch import succeed
from tests.runs import SMALL, arguments

Shapes = dict[str, tuple[int, ...]]
CHOICES = [("swiglu", 6), ("swiglu", 4), ("gelu", 6)]


def shapes_of(
    width: int, depth: int, heads: int, pixel_depth: int, mlp: str, ways: int,
    patch: int = 16, pixel_width: int = 16, classes: int = 1000,
) -> Shapes:  # fmt: skip
    """Every name of a released state dict without its prefix, and its shape."""
    found: Shapes = {}
    channels = patch * patch * pixel_width

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def attention(name: str) -> None:
        linear(f"{name}.qkv", width, 3 * width, bias=False)
        found[f"{name}.q_norm.weight"] = found[f"{name}.k_norm.weight"] = (width // heads,)
        linear(f"{name}.proj", width, width)

    linear("s_embedder.proj", 3 * patch * patch, width)
    linear("t_embedder.mlp.0", 256, width)
    linear("t_embedder.mlp.2", width, width)
    found["y_embedder.embedding_table.weight"] = (classes + 1, width)
    linear("pixel_embedder.proj", 3, pixel_width)
    for name in (f"patch_blocks.{n}" for n in range(depth)):
        found[f"{name}.norm1.weight"] = found[f"{name}.norm2.weight"] = (width,)
        attention(f"{name}.attn")
        if mlp == "swiglu":
            hidden = int(2 / 3 * 4 * width)
            linear(f"{name}.mlp.w1", width, hidden, bias=False)
            linear(f"{name}.mlp.w3", width, hidden, bias=False)
            linear(f"{name}.mlp.w2", hidden, width, bias=False)
        else:
            linear(f"{name}.mlp.fc1", width, 4 * width)
            linear(f"{name}.mlp.fc2", 4 * width, width)
        linear(f"{name}.adaLN_modulation.0", width, 6 * width)
    for name in (f"pixel_blocks.{n}" for n in range(pixel_depth)):
        found[f"{name}.norm1.weight"] = found[f"{name}.norm2.weight"] = (pixel_width,)
        linear(f"{name}.compress_to_attn", channels, width)
        attention(f"{name}.attn")
        linear(f"{name}.expand_from_attn", width, channels)
        linear(f"{name}.mlp.fc1", pixel_width, 4 * pixel_width)
        linear(f"{name}.mlp.fc2", 4 * pixel_width, pixel_width)
        linear(f"{name}.adaLN_modulation.0", width, ways * channels)
    found["final_layer.norm.weight"] = (pixel_width,)
    linear("final_layer.linear", pixel_width, 3)
    return found


def small(mlp: str = "swiglu", ways: int = 6) -> Shapes:
    """The shapes of the tests' small run."""
    return shapes_of(32, 2, 2, 2, mlp, ways, patch=4, pixel_width=8, classes=3)


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
def test_imported_sampled_and_exported_back_bit_for_bit(
    mlp: str, ways: int, dtypes: Sequence[torch.dtype], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = both(small(mlp, ways), dtypes)
    file, folder, back = released(tmp_path / "theirs.ckpt", state), tmp_path / "model", tmp_path / "ours.ckpt"
    assert run("import", file, "--out", folder, "--image-size", "16") == 0
    said = capsys.readouterr().out
    assert f"{folder}: the EMA of {file}: PixelDiT, 2 + 2 blocks, width 32, 2 heads, patch 4, pixel width 8" in said
    assert f"{mlp} FFN, {'pre' if ways == 6 else 'post'}-modulation, 3 classes" in said

    assert run("sample", folder, "--out", tmp_path / "a.png", "--per-class", "1", "--steps", "2", "--zoom", "2") == 0
    assert f"from the EMA of {folder}" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * (2 + 18), 2 * (2 + 3 * 18))

    assert run("export", folder, "--format", "nvlabs", "--out", back) == 0
    found = torch.load(back, weights_only=True)
    assert list(found) == ["state_dict"]
    assert_identical(found["state_dict"], only(state, "ema_denoiser."))
    numbers = sum(tensor.nbytes for tensor in only(state, "ema_denoiser.").values())
    assert back.stat().st_size < numbers + 400 * len(small(mlp, ways)), "the tensors, and not the file they came from"

    assert run("import", file, "--out", tmp_path / "raw", "--raw") == 0
    assert run("export", tmp_path / "raw" / "model.safetensors", "--format", "nvlabs", "--out", back) == 0
    assert "the raw weights of" in capsys.readouterr().out
    assert_identical(torch.load(back, weights_only=True)["state_dict"], only(state, "denoiser."))


@pytest.mark.parametrize(("mlp", "ways"), CHOICES)
def test_an_imported_network_computes_what_the_formulas_say(mlp: str, ways: int, tmp_path: Path) -> None:
    state = both(small(mlp, ways))
    file, folder = released(tmp_path / "theirs.ckpt", state), tmp_path / "model"
    assert run("import", file, "--out", folder, "--image-size", "8") == 0
    x, t, y = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)), torch.rand(2), torch.tensor([0, 3])
    plain = {name.removeprefix("ema_denoiser."): tensor for name, tensor in only(state, "ema_denoiser.").items()}
    expected = reference.pixeldit(plain, 4, x, t, y).float()
    torch.testing.assert_close(weights.load_model(folder)(x, t, y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("ways", [6, 4])
@pytest.mark.parametrize("name", ["PixelDiT-B", "PixelDiT-L", "PixelDiT-XL"])
def test_sizes_are_recognised_from_shapes_alone(name: str, mlp: str, ways: int) -> None:
    sizes = {"PixelDiT-B": (768, 12, 12, 2), "PixelDiT-L": (1024, 22, 16, 4), "PixelDiT-XL": (1152, 26, 16, 4)}[name]
    shapes = shapes_of(*sizes, mlp, ways)
    found = nvlabs.recognise(shapes, "here")
    modulation = "pre" if ways == 6 else "post"
    assert found == ModelConfig(16, sizes[0], sizes[1], sizes[2], 16, sizes[3], mlp, modulation, 1000)
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


def test_any_other_size_is_recognised() -> None:
    found = nvlabs.recognise(shapes_of(96, 3, 6, 1, "swiglu", 4, patch=8, pixel_width=12, classes=17), "here")
    assert found == ModelConfig(8, 96, 3, 6, 12, 1, "swiglu", "post", 17)
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
            model=ModelConfig(4, 32, 2, 2, 8, 2, "swiglu", "pre", 3),
            data=config.DataConfig(image_size=int(size)),
            sampling=config.SamplingConfig(guidance=guidance, guidance_to=to, shift=shift),
        )
    folder = tmp_path / "own"
    options = ["--guidance", "3.25", "--interval", "0.1", "1", "--shift", "1.5", "--ema"]
    assert run("import", file, "--out", folder, *options) == 0
    assert weights.load_weights(folder).about.sampling == config.SamplingConfig(
        guidance=3.25, guidance_from=0.1, guidance_to=1.0, shift=1.5
    )


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
    assert "no tensor begins with 'ema_denoiser.', only with 'denoiser.'" in capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(f"ema_denoiser.{name}")


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({f"ema_denoiser.{name}": value})


QKV = "patch_blocks.1.attn.qkv.weight"
WRONG = {
    "missing": (without(QKV), f"misses {QKV}"),
    "missing one that is needed": (without("s_embedder.proj.weight"), "s_embedder.proj.weight is missing"),
    "extra": (put("patch_blocks.0.mlp.w4.weight", torch.zeros(1)), "holds the unknown patch_blocks.0.mlp.w4.weight"),
    "misshapen": (put(QKV, torch.zeros(96, 31)), f"{QKV} has shape (96, 31), but the network needs (96, 32)"),
    "a scalar": (put("s_embedder.proj.weight", torch.zeros(())), "s_embedder.proj.weight has shape ()"),
    "modulation": (
        put("pixel_blocks.0.adaLN_modulation.0.weight", torch.zeros(5 * 128, 32)),
        "has 640 rows, expected 6 or 4 for each of the 128 channels",
    ),
    "heads": (put("patch_blocks.0.attn.q_norm.weight", torch.zeros(12)), "heads of 12 channels: expected a multiple"),
    "classes": (put("y_embedder.embedding_table.weight", torch.zeros(1, 32)), "has 1 row"),
    "integers": (put(QKV, torch.zeros(96, 32, dtype=torch.int64)), f"ema_denoiser.{QKV} is torch.int64; expected"),
    "no tensor": (put(QKV, 7), f"ema_denoiser.{QKV} is int; expected"),
    "a block's number": (put("patch_blocks.9.norm1.weight", torch.zeros(32)), "misses patch_blocks.2.norm1.weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_and_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state: dict[str, Any] = both(small())
    change, words = WRONG[name]
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
    text, cut, bare, other = (tmp_path / f"{name}.ckpt" for name in ("text", "cut", "bare", "other"))
    text.write_text("hello")
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, bare)
    torch.save({"state_dict": {"module.a": torch.zeros(1)}}, other)
    cut.write_bytes(other.read_bytes()[:-200])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file = released(tmp_path / "theirs.ckpt", both(small()))
    for command, words in (
        ([tmp_path / "none"], "is no file; expected a released checkpoint"),
        ([text], "text.ckpt is no torch file, or not a whole one; expected a released"),
        ([cut], "cut.ckpt is no torch file, or not a whole one"),
        ([bare], "bare.ckpt has no state_dict: its keys are model, step"),
        ([other], "begins with 'ema_denoiser.' or 'denoiser.'; it holds module.a"),
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
    flat.write(tmp_path / "x", pieces, dtypes={name: tensor.dtype for name, tensor in tensors.items()})
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

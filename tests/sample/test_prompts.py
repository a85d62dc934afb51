"""`megapix sample` from prompts: files in and out, seeds, negative prompts, what GenEval and DPG-Bench read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megapix.cli import main as cli
from megapix.conditioning import text_source
from megapix.diffusion.condition import Condition
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate, seeded_noise
from megapix.engine.network import build_network
from megapix.sample.outputs import metadata_of
from megapix.weights.about import About, Weights
from megapix.weights.read import load_model
from megapix.weights.write import write_model
from tests.support import text_encoders
from tests.support.small_run import SMALL, refused
from tests.support.trained import TEXT, text_model

PROMPTS = ("a red mat", "two small dog", "the cat")


@pytest.fixture(scope="module")
def model(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported folder of a text network with random weights."""
    return text_model(tmp_path_factory.mktemp("model") / "t2i", text_encoder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_rows_are_prompts_and_images_say_what_they_are(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, singles = tmp_path / "grid.png", tmp_path / "singles"
    command = ["sample", str(model), "--prompts", str(prompts), "--out", str(out), "--singles", str(singles)]
    assert cli.main([*command, "--per-prompt", "2", "--size", "8", "20", "--batch", "4"]) == 0
    assert pixels(out).shape == (2 + 3 * 10, 2 + 2 * 22, 3)
    names = sorted(path.name for path in singles.iterdir())
    assert names == [f"{n // 2:04d}-{n:06d}.png" for n in range(6)]
    said = metadata_of(singles / names[3])
    assert said is not None
    assert (said["prompt"], said["seed"], said["number"], said["size"]) == (PROMPTS[1], 0, 3, [8, 20])
    assert (said["weights"], said["kind"], said["images_seen"]) == (str(model / "model.safetensors"), "EMA", 7)
    assert (said["steps"], said["guidance"], said["sampler"]) == (2, 2.0, "ab2")
    grid = metadata_of(out)
    assert grid is not None
    assert [row["prompt"] for row in grid["rows"]] == list(PROMPTS)


def test_an_image_is_what_a_plain_call_draws(model: Path, prompts: Path, text_encoder: Path, tmp_path: Path) -> None:
    singles = tmp_path / "singles"
    command = ["sample", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "g.png")]
    bad = ["--negative-prompt", "a blue dog"]
    assert cli.main([*command, *bad, "--singles", str(singles), "--per-prompt", "1", "--seeds", "11"]) == 0
    net, encode = load_model(model), text_source.load(TEXT.text, str(text_encoder))
    noise = seeded_noise(11, [0], (16, 16), torch.device("cpu"))
    for n, prompt in enumerate(PROMPTS):
        condition = Condition(encode([prompt]), encode(["a blue dog"]))
        drawn = generate(net, noise, condition, "ab2", 2, 2.0, (0.0, 1.0))
        expected = to_uint8(drawn)[0].astype(int)
        found = pixels(singles / f"{n:04d}-{n:06d}.png").astype(int)
        assert np.abs(found - expected).max() <= 1, "batches and padding round"
        assert found.std() > 1


def test_captions_of_a_shard_folder_are_prompts(
    model: Path, text_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(model), "--prompts", str(text_shards), "--count", "3", "--per-prompt", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "grid.png")]) == 0
    assert "rows: a " in capsys.readouterr().out
    assert pixels(tmp_path / "grid.png").shape[0] == 2 + 3 * 18


def test_geneval_gets_the_folders_that_its_evaluator_reads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": p} for p in PROMPTS]
    asked, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "geneval"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["sample", str(model), "--layout", "geneval", "--prompts", str(asked), "--out", str(out)]
    command += ["--per-prompt", "2", "--batch", "3"]
    assert cli.main(command) == 0
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == sorted(
        f"{n:05d}/{name}" for n in range(3) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    )
    assert [json.loads((out / f"{n:05d}" / "metadata.jsonl").read_text()) for n in range(3)] == lines
    # An interrupted command goes on: what is there and drawn the same way stays.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    lost = out / "00001" / "samples" / "00001.png"
    before = pixels(lost)
    lost.unlink()
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "(2 of 3 rows were there)" in capsys.readouterr().out
    assert np.abs(pixels(lost).astype(int) - before.astype(int)).max() <= 1
    assert all(path.stat().st_mtime_ns == times[path] for path in out.rglob("*.png") if "00001" not in path.parts)
    assert cli.main([*command, "--steps", "1"]) == 0
    assert all(path.stat().st_mtime_ns != times[path] for path in out.rglob("*.png")), "other options, other images"


def test_dpg_gets_a_picture_of_four_for_each_prompt(model: Path, tmp_path: Path) -> None:
    asked, out, singles = tmp_path / "prompts", tmp_path / "dpg", tmp_path / "singles"
    asked.mkdir()
    for name, prompt in (("partiprompts1", PROMPTS[0]), ("vrd2", PROMPTS[1])):
        (asked / f"{name}.txt").write_text(prompt + "\n")
    command = ["sample", str(model), "--layout", "dpg", "--prompts", str(asked), "--out", str(out)]
    assert cli.main([*command, "--per-prompt", "4"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["partiprompts1.png", "vrd2.png"]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(PROMPTS[:2]))
    command = ["sample", str(model), "--prompts", str(lines), "--out", str(tmp_path / "g.png"), "--per-prompt", "4"]
    assert cli.main([*command, "--singles", str(singles)]) == 0
    sheet = pixels(out / "vrd2.png")
    assert sheet.shape == (32, 32, 3)
    for n, (top, left) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        single = pixels(singles / f"0001-{4 + n:06d}.png").astype(int)
        assert np.abs(sheet[top : top + 16, left : left + 16] - single).max() <= 1


def test_bad_input_is_one_line(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: object) -> str:
        out = ["--out", str(tmp_path / "x.png")]
        return refused(["sample", str(model), *out, *map(str, options)], capsys)

    assert "takes text: expected --prompts" in said()
    assert "takes text, not classes" in said("--classes", 1)
    assert "cannot be read" in said("--prompts", tmp_path / "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "holds no prompt" in said("--prompts", empty)
    assert "expected multiples of the patch size 4" in said("--prompts", prompts, "--size", 10, 16)
    assert "--seeds are 1, but --per-class = 8" in said("--prompts", prompts, "--seeds", 3)
    assert "DPG-Bench expects 4" in said("--prompts", prompts, "--layout", "dpg")
    assert "line 1: expected JSON" in said("--prompts", prompts, "--layout", "geneval", "--out", tmp_path / "folder")
    wide = text_encoders.make(tmp_path / "wide", "bert", hidden_size=32)
    assert "text.digest" in said("--prompts", prompts, "--encoder", wide)
    assert "--encoder = 'nowhere'" in said("--prompts", prompts, "--encoder", "nowhere")
    assert "--count = -1" in said("--prompts", prompts, "--count", -1)


def test_networks_with_classes_take_no_prompts(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = build_network(SMALL.model, 0)
    about = About(SMALL.model, SMALL.sampling, 16, SMALL.text, ("a", "b", "c"), True, "random", 7)
    write_model(tmp_path / "classes", Weights({n: p.detach() for n, p in net.named_parameters()}, about))
    command = ["sample", str(tmp_path / "classes"), "--out", str(tmp_path / "x.png")]
    assert "takes classes, not text" in refused([*command, "--prompts", str(prompts)], capsys)
    assert "is for networks that take text" in refused(
        [*command, "--layout", "geneval", "--out", str(tmp_path)], capsys
    )
    assert cli.main([*command, "--per-class", "1"]) == 0
    said = metadata_of(tmp_path / "x.png")
    assert said is not None
    assert [row["class"] for row in said["rows"]] == ["a", "b", "c"]

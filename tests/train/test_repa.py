"""REPA: the encoder's features, the loss and the projector against independent computations, and whole runs."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix import config
from megapix.checkpoint.folder import latest
from megapix.checkpoint.layout import PARTS
from megapix.cli import main as cli
from megapix.config import MachineConfig, ModelConfig
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion import flow, repa
from megapix.diffusion.condition import classes
from megapix.encoders.image import grid_of, load
from megapix.engine.network import build_network
from megapix.model import AlignedPixelDiT, Alignment, PixelDiT
from megapix.model.projector import regrid
from megapix.shards.image_policy import Policy
from megapix.weights.read import load_model, load_weights
from tests.programs.repa import LAYER, STEPS, WEIGHT, network
from tests.support import image_encoders
from tests.support.launch import start, succeed
from tests.support.small_run import SMALL, STEP_BATCH, arguments, refused, saved, scalars, shard_tensors

MODEL = ModelConfig(patch_size=4, width=32, depth=3, heads=2, pixel_width=8, pixel_depth=1, num_classes=3)


def images(height: int, width: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "model", "skip", "patch"),
    [
        ("dinov2", "Dinov2Model", 1, 14),
        ("registers", "Dinov2WithRegistersModel", 1 + 3, 14),
        ("dinov3", "DINOv3ViTModel", 1 + 2, 16),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_features_are_those_of_transformers(
    kind: str, model: str, skip: int, patch: int, size: tuple[int, int], tmp_path: Path
) -> None:
    import transformers

    folder = image_encoders.make(tmp_path / "encoder", kind)
    shown = images(*size)
    found = load(str(folder), "fp32", micro_batch=2)(shown)

    plain = getattr(transformers, model).from_pretrained(folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (shown / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    rows, columns = size[0] // 16, size[1] // 16
    if patch == 14:
        pixels = F.interpolate(pixels, scale_factor=14 / 16, mode="bicubic")
    with torch.no_grad():
        output = plain(pixels).last_hidden_state
    assert output.shape == (3, skip + rows * columns, image_encoders.WIDTH)
    assert found.shape == (3, rows, columns, image_encoders.WIDTH)
    assert torch.allclose(found, output[:, skip:].view_as(found), atol=1e-5)
    assert found.std(dim=(1, 2)).mean() > 0.1, "features differ from cell to cell, so agreement means something"
    assert not found.requires_grad


def test_in_bf16_the_features_are_rounded_and_no_more(tmp_path: Path) -> None:
    folder = str(image_encoders.make(tmp_path / "encoder"))
    exact, rounded = (load(folder, dtype, 0)(images(32, 32)) for dtype in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("size", "grid"), [((16, 16), (1, 1)), ((256, 256), (16, 16)), ((24, 40), (2, 3)), ((4, 20), (1, 1))]
)
def test_an_encoders_patch_covers_16_pixels(size: tuple[int, int], grid: tuple[int, int], tmp_path: Path) -> None:
    assert grid_of(*size) == grid
    if max(size) < 64:
        features = load(str(image_encoders.make(tmp_path / "encoder")), "fp32", 0)(images(*size))
        assert features.shape == (3, *grid, image_encoders.WIDTH)


def test_the_digest_tells_encoders_apart(tmp_path: Path) -> None:
    found = [
        load(str(image_encoders.make(tmp_path / name, seed=seed, **sizes)), dtype, 0).digest
        for name, seed, sizes, dtype in [
            ("a", 0, {}, "fp32"),
            ("elsewhere", 0, {}, "bf16"),
            ("b", 1, {}, "fp32"),
            ("heads", 0, {"num_attention_heads": 4}, "fp32"),
        ]
    ]
    assert found[0] == found[1], "neither the place nor the number format makes another encoder"
    assert len(set(found)) == 3


def test_the_distance_by_hand() -> None:
    # Two images of two cells: angles of 0 and 90 degrees, then of 180 and 60.
    projected = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.5, math.sqrt(0.75)]]])
    features = torch.tensor([[[5.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [7.0, 0.0]]])
    expected = [(0 + 1) / 2, (2 + 0.5) / 2]
    assert repa.alignment_loss(projected, features).tolist() == pytest.approx(expected)
    assert repa.alignment_loss(projected.bfloat16(), features.bfloat16()).dtype == torch.float32


def test_a_larger_grid_is_averaged() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)  # 4 x 4, row-major
    assert regrid(tokens, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert regrid(tokens, (4, 4), (1, 1)).flatten().tolist() == [7.5]
    assert regrid(tokens, (4, 4), (4, 4)) is tokens


def test_a_smaller_grid_is_interpolated() -> None:
    tokens = torch.tensor([[[0.0, 8.0], [4.0, 0.0]]])  # 1 x 2 cells, two channels
    found = regrid(tokens, (1, 2), (2, 4))
    assert found.shape == (1, 8, 2)
    # Cell centres at 0.25, 0.75, 1.25, 1.75 of the old grid's 0.5 and 1.5: the outer ones lie beyond.
    assert found[0, :, 0].tolist() == [0.0, 1.0, 3.0, 4.0] * 2
    assert found[0, :, 1].tolist() == [8.0, 6.0, 2.0, 0.0] * 2


def test_the_projector_reads_the_tokens_of_its_block() -> None:
    """Blocks as they are in the network, one after another by hand, and the projector of three layers."""
    net = AlignedPixelDiT(MODEL, Alignment(layer=2, features=5)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    seen: list[Tensor] = []
    net.patch_blocks[1].register_forward_hook(lambda block, inputs, out: seen.append(out))
    velocity, projected = net(x, t, y, grid=(4, 4))
    p = dict(net.projector.named_parameters())
    assert [tuple(p[f"{i}.weight"].shape) for i in (0, 2, 4)] == [(32, 32), (32, 32), (5, 32)]
    h = F.silu(seen[0] @ p["0.weight"].T + p["0.bias"])
    h = F.silu(h @ p["2.weight"].T + p["2.bias"])
    assert torch.allclose(projected, h @ p["4.weight"].T + p["4.bias"], atol=1e-5)
    assert torch.equal(velocity, net(x, t, y)), "the velocity is the same with and without"
    pooled = net(x, t, y, grid=(2, 2))[1]
    means = seen[0].view(2, 2, 2, 2, 2, 32).mean((2, 4)).view(2, 4, 32)
    assert torch.allclose(pooled, net.projector(means), atol=1e-5)


def test_the_network_without_the_projector_is_the_plain_one() -> None:
    plain = build_network(MODEL, seed=7).state_dict()
    aligned = build_network(MODEL, seed=7, alignment=Alignment(1, 5)).state_dict()
    assert list(aligned)[: len(plain)] == list(plain)
    assert all(name.startswith("projector.") for name in list(aligned)[len(plain) :])
    assert all(torch.equal(aligned[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_reach_the_blocks_up_to_the_layer(policy: str) -> None:
    """Of the distance alone, and with activation checkpointing the same ones."""
    machine = MachineConfig(pixel_checkpointing=policy, patch_checkpointing=policy)
    net = build_network(MODEL, 0, machine, Alignment(2, 5))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    _, projected = net(x, t, y, grid=(2, 2))
    repa.alignment_loss(projected, torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))).mean().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "s_embedder.proj.weight" in reached
    assert {f"projector.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")} <= reached
    assert any(name.startswith("patch_blocks.1.") for name in reached)
    assert not any(name.startswith(("patch_blocks.2.", "pixel_blocks.")) for name in reached)


# ---------------------------------------------------------------------------------------------------------------------
# Against plain PyTorch
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards_32(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small images at 32 pixels: 8 x 8 patches of the network, 2 x 2 of the encoder."""
    out = tmp_path_factory.mktemp("shards") / "small-32"
    write(ImageFolder.open(image_folder), out, Options(Policy.make("crop", 32), samples_per_shard=16), 1, False)
    return out


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoders.make(tmp_path_factory.mktemp("teacher") / "dinov2")


@pytest.fixture(scope="module")
def plain(shards_32: Path, teacher_folder: Path) -> dict[str, Any]:
    """The run in one process: transformers' own model, torch's AdamW and clipping, all of REPA written out."""
    import transformers

    reading = config.replace(config.replace(SMALL.data, "path", str(shards_32)), "image_size", 32)
    data = MicroBatches(locate(reading), reading, SMALL.seed, STEP_BATCH)
    teacher = transformers.Dinov2Model.from_pretrained(teacher_folder).eval()
    net = network(SMALL, image_encoders.WIDTH)
    tokens: list[Tensor] = []
    net.patch_blocks[LAYER - 1].register_forward_hook(lambda block, inputs, out: tokens.append(out))
    o = SMALL.optim
    optimizer = torch.optim.AdamW(net.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    for step in range(STEPS):
        batch = data[np.arange(step * STEP_BATCH, (step + 1) * STEP_BATCH)]
        tokens.clear()
        error, _ = flow.training_loss(
            net, batch.images, classes(batch.labels, SMALL.model.num_classes), batch.positions, SMALL.seed, SMALL.flow
        )
        pixels = F.interpolate(batch.images / 255, 28, mode="bicubic")
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        with torch.no_grad():
            features = F.normalize(teacher(pixels).last_hidden_state[:, 1:], dim=-1)  # [B, 4, 24]
        (found,) = tokens
        pooled = F.avg_pool2d(found.transpose(1, 2).reshape(STEP_BATCH, -1, 8, 8), 4).flatten(2).transpose(1, 2)
        projected = F.normalize(net.projector(pooled), dim=-1)
        distance = (1 - (projected * features).sum(-1)).mean()
        optimizer.zero_grad()
        (error.mean() + WEIGHT * distance).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), o.grad_clip)
        optimizer.step()
        for name, p in net.named_parameters():
            ema[name].mul_(o.ema_decay).add_(p.detach(), alpha=1 - o.ema_decay)
        losses.append((error.mean().item(), distance.item()))
    return {"losses": losses, "weights": {n: p.detach() for n, p in net.named_parameters()}, "ema": ema}


@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        ("1", []),
        pytest.param("2", ["machine.patch_checkpointing", "full"], marks=pytest.mark.long),
        pytest.param("1", ["machine.ds_config", "zero2_offload"], marks=pytest.mark.long),
    ],
)
def test_zero2_gives_what_plain_training_gives(
    accumulation: str, options: list[str], plain: dict[str, Any], shards_32: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.pt"
    succeed(2, "tests.programs.repa", [shards_32, teacher_folder, out, accumulation, *options])
    found = torch.load(out)
    assert np.array(found["losses"]) == pytest.approx(np.array(plain["losses"]), rel=1e-5)
    assert plain["losses"][-1][1] < 0.95 * plain["losses"][0][1], "the tokens draw nearer"
    for what in ("weights", "ema"):
        assert found[what].keys() == plain[what].keys()
        for name, tensor in plain[what].items():
            difference = (found[what][name] - tensor).abs().max() / tensor.abs().max()
            assert difference < 1e-5, f"{what} {name}: {difference:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------

END, STOP_AT = 8, 6
"""Steps of a run, and those of them with REPA."""


def command(shards: Path, teacher: Path, out: Path, *more: str) -> list[str]:
    images = {"optim.end-at": END, "repa.stop-at": STOP_AT, "checkpoint.every": 4, "log.blocks-every": 1}
    spans = [word for name, steps in images.items() for word in (f"--{name}", str(steps * STEP_BATCH))]
    chosen = ["--data.image-size", "32", "--repa.encoder", str(teacher), "--repa.layer", "1", "--repa.dtype", "fp32"]
    return arguments(shards, out, *chosen, *spans, *more)


@pytest.fixture(scope="module")
def trained(shards_32: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 2 ranks, aligned for six of its eight steps, with a grid of EMA samples at its end."""
    out = tmp_path_factory.mktemp("repa") / "run"
    grid = ["--log.samples-every", str(END * STEP_BATCH), "--log.grid-columns", "1"]
    succeed(2, "megapix", command(shards_32, teacher_folder, out, *grid))
    return out


def test_the_distance_is_logged_until_repa_stops(trained: Path) -> None:
    distances = scalars(trained, "loss/repa")
    assert list(distances) == list(range(1, STOP_AT + 1))
    assert all(0 < distance < 2 for distance in distances.values())
    assert distances[STOP_AT] < distances[1]
    assert list(scalars(trained, "loss/train")) == list(range(1, END + 1))
    norms = scalars(trained, "blocks/grad_norm/projector")
    assert all(norms[step] > 0 for step in range(1, STOP_AT + 1))
    assert all(norms[step] == 0 for step in range(STOP_AT + 1, END + 1)), "no loss, no gradient"


def test_a_checkpoint_holds_the_projector_and_no_encoder(trained: Path, teacher_folder: Path) -> None:
    layout = saved(trained).state.layout
    assert layout.shapes.keys() == dict(network(SMALL, image_encoders.WIDTH).named_parameters()).keys()
    assert saved(trained).state.config.repa.digest == load(str(teacher_folder), "fp32", 0).digest
    assert {name.split("/")[1] for name in shard_tensors(saved(trained).folder)} == set(PARTS)


@pytest.mark.long
def test_resume_is_exact(shards_32: Path, teacher_folder: Path, trained: Path, tmp_path: Path) -> None:
    """Stopped with REPA on, and again after it has ended; the encoder has moved, which makes no other run."""
    run, moved = tmp_path / "run", Path(shutil.copytree(teacher_folder, tmp_path / "moved"))
    for end, teacher in ((3, teacher_folder), (STOP_AT + 1, moved), (END, teacher_folder)):
        succeed(2, "megapix", command(shards_32, teacher, run, "--optim.end-at", str(end * STEP_BATCH)))
    whole, parts = (shard_tensors(latest(r)) for r in (trained, run))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    for tag in ("loss/train", "loss/repa", "health/grad_norm"):
        assert scalars(run, tag) == scalars(trained, tag)


def test_what_a_run_gives_away_is_the_plain_network(trained: Path, tmp_path: Path) -> None:
    names = dict(PixelDiT(SMALL.model).named_parameters()).keys()
    file = tmp_path / "exported.safetensors"
    assert cli.main(["export", str(trained), "--out", str(file)]) == 0
    from_run, from_file = (load_weights(path).tensors for path in (trained, file))
    assert from_run.keys() == from_file.keys() == names
    assert all(torch.equal(from_run[name], from_file[name]) for name in names)
    net = load_model(file)
    assert type(net) is PixelDiT
    assert net(torch.randn(1, 3, 32, 32), torch.tensor([0.5]), torch.tensor([0])).shape == (1, 3, 32, 32)
    assert cli.main(["sample", str(trained), "--out", str(tmp_path / "grid.png"), "--per-class", "1"]) == 0


@pytest.mark.long
def test_init_from_a_run_with_repa_and_to_one(
    shards_32: Path, teacher_folder: Path, trained: Path, tmp_path: Path
) -> None:
    """A later stage without REPA, and then one with it, whose projector starts anew."""
    one_step = ["--optim.end-at", str(STEP_BATCH), "--optim.lr", "1e-30", "--data.image-size", "32"]
    plain = tmp_path / "plain"
    succeed(1, "megapix", arguments(shards_32, plain, *one_step, "--init", str(trained)))
    again = tmp_path / "again"
    succeed(1, "megapix", command(shards_32, teacher_folder, again, *one_step, "--init", str(plain)))
    expected = load_weights(trained).tensors
    for run in (plain, again):
        found = load_weights(run).tensors
        assert all(torch.allclose(found[name], tensor) for name, tensor in expected.items())
    assert any(name.startswith("projector.") for name in saved(again).state.layout.shapes)
    assert not any(name.startswith("projector.") for name in saved(plain).state.layout.shapes)


def test_without_repa_transformers_is_not_imported(shards_32: Path, tmp_path: Path) -> None:
    """Nor by DeepSpeed, which would import it if it wanted to."""
    more = ["--data.image-size", "32", "--optim.end-at", str(STEP_BATCH)]
    succeed(1, "tests.programs.no_transformers", arguments(shards_32, tmp_path / "run", *more))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1000])


def one_tensor_less(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another_kind(folder: Path) -> None:
    import transformers

    transformers.ViTModel(transformers.ViTConfig(**image_encoders.SIZES, intermediate_size=48)).save_pretrained(folder)


def without_patches(folder: Path) -> None:
    config_file = folder / "config.json"
    config_file.write_text(re.sub('"patch_size": 14', '"patch_size": 0', config_file.read_text()))


BAD: dict[str, tuple[list[str], Any, tuple[str, ...]]] = {
    "no such folder": (["--repa.encoder", "./nowhere"], None, ("repa.encoder = './nowhere': no such folder",)),
    "empty folder": ([], lambda folder: (folder / "config.json").unlink(), ("repa.encoder = ", "config.json")),
    "no weights": ([], lambda folder: (folder / "model.safetensors").unlink(), ("repa.encoder = ", "safetensors")),
    "not JSON": ([], lambda folder: (folder / "config.json").write_text("{"), ("repa.encoder = ", "valid JSON")),
    "cut weights": ([], truncated, ("repa.encoder = ", "file not fully covered")),
    "a tensor less": ([], one_tensor_less, ("lacks 1 of the encoder's tensors: layernorm.bias",)),
    "no patches": ([], without_patches, ("repa.encoder = ", "ZeroDivisionError")),
    "another kind": ([], another_kind, ("is of kind 'vit'", "dinov2_with_registers")),
    "layer": (["--repa.layer", "3"], None, ("repa.layer = 3: expected 1 to model.depth = 2",)),
    "layer zero": (["--repa.layer", "0"], None, ("repa.layer = 8: expected 1 to model.depth = 2",)),
    "weight": (["--repa.weight", "-1"], None, ("repa.weight = -1.0: expected above 0",)),
    "micro batch": (["--repa.micro-batch", "-1"], None, ("repa.micro_batch = -1",)),
    "span": (["--repa.stop-at", "soon"], None, ("repa.stop_at = 'soon'",)),
    "digest": (["--repa.digest", "abc"], None, ("has the digest", "repa.digest = 'abc'")),
    "no encoder": (["--repa.encoder", ""], None, ("repa.layer = 1 has no effect without repa.encoder",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, shards_32: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, damage, words = BAD[name]
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    if damage:
        damage(folder)
    error = refused([*command(shards_32, folder, tmp_path / "run", *options), "--dry-run"], capsys)
    assert error.startswith("megapix: error: ")
    for part in words:
        assert part in error, error


def test_another_encoder_makes_another_run(
    shards_32: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = image_encoders.make(tmp_path / "other", seed=1)
    assert cli.main([*command(shards_32, other, trained), "--dry-run"]) == 2
    assert "repa.digest is '" in capsys.readouterr().err
    plain = arguments(shards_32, trained, "--data.image-size", "32")
    assert cli.main([*plain, "--dry-run"]) == 2
    assert "repa.digest is '" in capsys.readouterr().err


def test_a_hub_name_without_the_hub_is_one_line_on_every_rank(shards_32: Path, tmp_path: Path) -> None:
    asked = command(shards_32, Path("facebook/dinov2-base"), tmp_path / "run")
    ranks = start(2, "megapix", asked, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert [rank.code for rank in ranks] == [2, 2]
    (line,) = [line for line in ranks[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert "repa.encoder = 'facebook/dinov2-base'" in line
    assert all("Traceback" not in rank.err for rank in ranks)

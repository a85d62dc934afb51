"""DeepSpeed's engine on real ranks: parity with plain PyTorch, the sharded EMA, world sizes, exact resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megapix import config
from megapix.checkpoint.folder import latest
from megapix.config import BatchLayout
from megapix.diffusion import flow
from megapix.dist import stop
from megapix.engine import processes, schedule, zero2
from megapix.engine.network import build_network
from megapix.weights.read import load_model, load_weights
from megapix.weights.write import export
from tests.support.launch import succeed
from tests.support.small_run import SMALL, STEP_BATCH, arguments, counters, scalars, shard_tensors
from tests.support.trained import Subject

STEPS = 20


@dataclass
class Plain:
    """What one plain PyTorch process makes of the run."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(subject: Subject) -> Plain:
    """The run in one process without DeepSpeed: torch's AdamW, clipping, a dense EMA, the rate set by hand."""
    read, net = subject.samples(), build_network(subject.config.model, SMALL.seed)
    o = SMALL.optim
    optimizer = torch.optim.AdamW(net.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = o.lr if step < 12 else o.lr_after
        positions = np.arange(step * STEP_BATCH, (step + 1) * STEP_BATCH)
        loss, _ = flow.training_loss(net, *read(positions), positions, SMALL.seed, SMALL.flow)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), o.grad_clip)
        optimizer.step()
        for name, p in net.named_parameters():
            ema[name].mul_(o.ema_decay).add_(p.detach(), alpha=1 - o.ema_decay)
        losses.append(loss.mean().item())
    return Plain(losses, {name: p.detach() for name, p in net.named_parameters()}, ema)


@pytest.fixture(scope="module")
def trained(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on 1 and on 2 ranks, started like a launcher does."""
    folder = tmp_path_factory.mktemp("trained")
    for ranks in (1, 2):
        succeed(ranks, "megapix", subject.arguments(folder / str(ranks)))
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        difference = (found[name] - tensor).abs().max().item()
        assert difference <= tolerance * largest, f"{name}: {difference:.2e} of {largest:.2e}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero2_gives_what_plain_training_gives(ranks: int, trained: dict[int, Path], plain: Plain) -> None:
    losses = list(scalars(trained[ranks], "loss/train").values())
    assert losses == pytest.approx(plain.losses, rel=1e-5)
    assert min(plain.losses[-3:]) < 0.9 * plain.losses[0], "the run learns, so agreement means something"
    assert_close(load_weights(trained[ranks], ema=False).tensors, plain.weights, 1e-4)
    assert_close(load_weights(trained[ranks], ema=True).tensors, plain.ema, 1e-4)


def test_losses_do_not_depend_on_the_number_of_ranks(trained: dict[int, Path]) -> None:
    one, two = (scalars(trained[ranks], "loss/train") for ranks in (1, 2))
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_sharded_ema_equals_a_dense_one_bit_for_bit(ranks: int, precision: str, subject: Subject) -> None:
    succeed(ranks, "tests.programs.dense_ema", [precision, subject.name, subject.shards])


def test_resume_is_exact(subject: Subject, trained: dict[int, Path], tmp_path: Path) -> None:
    """20 steps, against 10 steps, a new process, and 10 more (workers on, to cross that boundary too)."""
    run = tmp_path / "run"
    succeed(2, "megapix", subject.arguments(run, "--optim.end-at", str(10 * STEP_BATCH)))
    assert counters(run).position == 10 * STEP_BATCH
    out = succeed(2, "megapix", subject.arguments(run, "--data.workers", "1"))[0].out
    assert "resuming from" in out
    assert f"changed since the checkpoint: optim.end_at: {10 * STEP_BATCH} -> {20 * STEP_BATCH}" in out
    whole, parts = (shard_tensors(latest(r)) for r in (trained[2], run))
    assert whole.keys() == parts.keys()
    assert sum("ema" in name for name in whole) == 2, "one EMA shard a rank, and no second one"
    different = [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert different == []
    for tag in ("loss/train", "health/grad_norm", "schedule/lr"):
        assert scalars(run, tag) == scalars(trained[2], tag)


def test_a_finished_run_says_so(subject: Subject, trained: dict[int, Path]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained[2].rglob("*") if path.name != "lock")
    out = succeed(2, "megapix", subject.arguments(trained[2]))[0].out
    assert "is finished: 160 images seen" in out
    assert sorted((path, path.stat().st_mtime_ns) for path in trained[2].rglob("*") if path.name != "lock") == before


def test_tensorboard_holds_what_happened(trained: dict[int, Path], plain: Plain) -> None:
    rates = scalars(trained[2], "schedule/lr")
    assert rates == {step: pytest.approx(2e-3 if step <= 12 else 5e-4) for step in range(1, STEPS + 1)}
    assert scalars(trained[2], "schedule/images_seen") == {s: s * STEP_BATCH for s in range(1, STEPS + 1)}
    assert set(scalars(trained[2], "health/skipped_steps").values()) == {0.0}
    norms = list(scalars(trained[2], "health/grad_norm").values())
    assert max(norms) > SMALL.optim.grad_clip, "the norm is the one before clipping"
    assert min(scalars(trained[2], "speed/images_per_s").values()) > 0
    assert all(0 <= share <= 1 for share in scalars(trained[2], "speed/data_wait_share").values())
    assert min(scalars(trained[2], "memory/host_peak_GiB").values()) > 0.1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[2] / "tensorboard"))
    events.Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr_step_at": 96' in text


def test_loss_by_quarter_of_t_by_hand() -> None:
    from megapix.monitoring.meters import LossMeter

    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.3, 0.999]))
    meter.add(torch.tensor([3.0]), torch.tensor([0.0]))
    assert meter.read(1) == {"loss/train": 3.0, "loss/t_1_of_4": 2.0, "loss/t_2_of_4": 2.0, "loss/t_4_of_4": 6.0}
    meter.add(torch.tensor([5.0, float("nan"), float("inf")]), torch.tensor([1.0, 0.1, 0.9]))
    assert meter.read(1) == {"loss/train": 5.0, "loss/t_4_of_4": 5.0}, "a skipped step does not spoil its window"


@pytest.fixture
def one_rank() -> object:
    """A process group of one rank in this process."""
    from megapix.dist import World

    processes.start(World())
    yield
    stop()


def test_an_error_inside_the_schedule_surfaces(one_rank: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed answers a TypeError in step() by calling step(train_batch_size): it must not hide the first error."""
    net = build_network(SMALL.model, 0)
    e = zero2.build(SMALL, BatchLayout(2, 1, 1), net)

    def broken(*_: object) -> float:
        raise TypeError("a fault in the schedule")

    monkeypatch.setattr(schedule, "learning_rate", broken)
    loss = e(torch.zeros(2, 3, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.long)).square().mean()
    e.backward(loss)
    with pytest.raises(TypeError) as error:
        e.step()
    chain = [str(error.value), str(error.value.__context__)]
    assert "a fault in the schedule" in chain


@pytest.mark.long
def test_bf16_with_pixel_checkpointing_and_accumulation(shards: Path, tmp_path: Path) -> None:
    """XL's mode on two ranks: bf16, checkpointed PiT blocks, two accumulation steps; then a resume, then weights."""
    run = tmp_path / "run"
    common = ["--precision", "bf16", "--machine.pixel-checkpointing", "full", "--machine.micro-batch", "2"]
    common += ["--log.samples-every", "40", "--log.grid-columns", "2"]
    succeed(2, "megapix", arguments(shards, run, *common, "--optim.end-at", "80"))
    succeed(2, "megapix", arguments(shards, run, *common, "--optim.end-at", "120"))
    losses = scalars(run, "loss/train")
    assert list(losses) == list(range(1, 16))
    assert losses[15] < losses[1]
    net = load_model(run)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    raw = load_weights(run, ema=False).tensors
    assert any(not torch.equal(t, t.bfloat16().float()) for t in raw.values()), "masters, not rounded weights"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("samples/ema")
    assert [picture.step for picture in pictures] == [5, 10, 15]
    assert (pictures[0].width, pictures[0].height) == (2 + 2 * 18, 2 + 3 * 18)


@pytest.mark.long
def test_grid_does_not_depend_on_the_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pictures = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        options = ["--optim.end-at", "8", "--log.samples-every", "8", "--log.grid-columns", "3"]
        succeed(ranks, "megapix", arguments(shards, run, *options))
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        pictures.append(_decoded(events.Images("samples/ema")[0].encoded_image_string))
    # Samples may differ by a rounding of the weights' last bit: at most one grey level of 255.
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1


@pytest.mark.long
def test_more_ranks_than_images_in_the_grid(shards: Path, tmp_path: Path) -> None:
    options = ["--optim.end-at", "8", "--log.samples-every", "8", "--log.grid-columns", "1", "--log.grid-classes", "1"]
    options += ["--sampling.sampler", "heun"]  # twice the evaluations, but as many meetings of the ranks
    succeed(2, "megapix", arguments(shards, tmp_path / "run", *options))


def _decoded(png: bytes) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def test_init_takes_weights_only(subject: Subject, trained: dict[int, Path], tmp_path: Path) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported.safetensors"
    export(trained[2], exported)
    options = ["--init", str(exported), "--optim.end-at", "8", "--seed", "5", "--optim.lr", "1e-9"]
    succeed(1, "megapix", subject.arguments(run, *options))
    assert counters(run).images_seen == 8
    start, now = (load_weights(path).tensors for path in (exported, run))
    assert_close(now, start, 1e-5)


def test_export_and_load_agree(subject: Subject, trained: dict[int, Path], tmp_path: Path) -> None:
    cond = subject.samples()(np.arange(2))[1].cond
    for ema in (True, False):
        file = tmp_path / f"{ema}.safetensors"
        export(trained[2], file, ema)
        direct, exported = load_model(trained[2], ema), load_model(file, ema)
        x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
        assert torch.equal(direct(x, t, *cond), exported(x, t, *cond))
        assert not exported.training
    by_checkpoint = load_weights(latest(trained[2])).tensors
    assert all(torch.equal(t, by_checkpoint[n]) for n, t in load_weights(trained[2]).tensors.items())
    assert config.replace(subject.config, "model.depth", 3).model != load_weights(trained[2]).about.model

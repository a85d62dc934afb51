"""Checkpoints: damage is found, named and survived; any number of ranks goes on; nothing whole is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megapix import config
from megapix.checkpoint import retention, vectors
from megapix.checkpoint.find import Choice, choose, find
from megapix.checkpoint.folder import complete, point_to, protect, reading
from megapix.checkpoint.layout import PARTS, FileRecord, Layout
from megapix.checkpoint.manifest import Counters, State, write_state
from megapix.checkpoint.reshard import reshard
from megapix.checkpoint.saver import Saver
from megapix.cli import main as cli
from megapix.dist import World
from megapix.errors import InputError, RunError
from megapix.resilience.run_lock import run_lock
from megapix.weights.read import load_model, load_weights
from tests.support.launch import start, succeed
from tests.support.programs import needs
from tests.support.small_run import SMALL, STEP_BATCH, arguments, counters, flat_vectors, saved, scalars
from tests.support.trained import Subject

FIRST, SECOND = f"images-{10 * STEP_BATCH:012d}", f"images-{20 * STEP_BATCH:012d}"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on 2 ranks, with a checkpoint at step 10 and one at 20."""
    run = tmp_path_factory.mktemp("trained") / "run"
    succeed(2, "megapix", arguments(shards, run))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def rank_file(folder: Path) -> Path:
    return folder / "rank-00001-of-00002.safetensors"


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "byte in a rank's file": (lambda f: flip(rank_file(f)), ("rank-00001-of-00002.safetensors has sha256", "damaged")),
    "byte in its header": (lambda f: flip(rank_file(f), 20), ("rank-00001-of-00002.safetensors has sha256",)),
    "byte in a counter": (
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('_steps": 20', '_steps": 21')),
        ("state.json has sha256", "it is damaged"),
    ),
    "byte in state.json": (lambda f: flip(f / "state.json", 2), ("state.json: cannot be read",)),
    "state.json cut": (lambda f: os.truncate(f / "state.json", 100), ("state.json: cannot be read",)),
    "state.json gone": (lambda f: (f / "state.json").unlink(), ("latest names", "state.json is missing")),
    "rank's file gone": (lambda f: rank_file(f).unlink(), ("rank-00001-of-00002.safetensors is missing",)),
    "rank's file cut": (lambda f: os.truncate(rank_file(f), 1000), ("has 1000 bytes, but", "were saved")),
    "folder gone": (shutil.rmtree, (f"latest names '{SECOND}'", "is missing")),
    "byte in latest": (lambda f: flip(f.parent / "latest", -2), ("latest names 'images-000000000161'", "is missing")),
    "latest empty": (lambda f: (f.parent / "latest").write_text(""), ("latest names '(nothing)'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_survived(name: str, run: Path) -> None:
    damage, words = DAMAGE[name]
    folder = run / "checkpoints" / SECOND
    damage(folder)
    choice = choose(run, "auto", World())
    assert len(choice.refused) == 1
    assert all(word in choice.refused[0] for word in words), choice.refused
    assert choice.saved
    whole_anyway = "latest" in name  # there the newest checkpoint itself is whole
    assert choice.saved.folder.name == (SECOND if whole_anyway else FIRST)
    with pytest.raises(InputError, match="resume = 'require', but the newest checkpoint is not whole"):
        choose(run, "require", World())


def test_latest_gone_takes_the_newest(run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    choice = choose(run, "require", World())
    assert choice.saved
    assert choice.saved.folder.name == SECOND
    shutil.rmtree(run / "checkpoints")
    assert choose(run, "auto", World()) == Choice()
    with pytest.raises(InputError, match="holds no checkpoint"):
        choose(run, "require", World())


def test_no_whole_checkpoint_is_an_error(run: Path) -> None:
    """A run never starts anew over the remains of weeks."""
    for folder in (run / "checkpoints").glob("images-*"):
        flip(rank_file(folder))
    with pytest.raises(InputError) as error:
        choose(run, "auto", World())
    assert "no checkpoint in" in str(error.value)
    assert all(name in str(error.value) for name in (FIRST, SECOND, "give another --out"))


def test_a_run_falls_back_and_ends_as_if_nothing_had_happened(shards: Path, run: Path, trained: Path) -> None:
    """A flipped byte in the newest: said once, with the reason, and the older one leads to the same bits."""
    damaged = run / "checkpoints" / SECOND
    flip(rank_file(damaged))
    done = start(2, "megapix", arguments(shards, run, "--resume", "require"))
    assert [rank.code for rank in done] == [2, 2]
    assert done[0].err.count("megapix: error: resume = 'require', but the newest checkpoint is not whole") == 1
    done = succeed(2, "megapix", arguments(shards, run))
    assert done[0].err.count("checkpoint refused: ") == 1
    assert f"{rank_file(damaged)} has sha256" in done[0].err
    assert f"resuming from {run / 'checkpoints' / FIRST} at 80 images seen" in done[0].out
    expected, found = flat_vectors(trained / "checkpoints" / SECOND), flat_vectors(damaged)
    assert all(torch.equal(found[part], expected[part]) for part in PARTS)
    assert scalars(run, "loss/train") == scalars(trained, "loss/train"), "one line, without overlaps"


def test_reading_weights_falls_back_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(rank_file(run / "checkpoints" / SECOND))
    assert cli.main(["export", str(run), "--out", str(tmp_path / "x.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert f"reading {run / 'checkpoints' / FIRST}" in err
    assert FIRST in out
    with pytest.raises(InputError, match="it is damaged"):
        load_weights(run / "checkpoints" / SECOND)


# ---------------------------------------------------------------------------------------------------------------------
# Layout, export, reshard
# ---------------------------------------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    layout = Layout({"a": (3, 2), "b": (5,)}, 3)
    assert (layout.total, layout.share) == (11, 4)
    assert [layout.range_of(rank) for rank in range(3)] == [(0, 4), (4, 8), (8, 11)]
    assert layout.spans == {"a": (0, 6), "b": (6, 11)}
    many = Layout({"a": (3,)}, 4)
    assert [many.range_of(rank) for rank in range(4)] == [(0, 2), (2, 3), (3, 3), (3, 3)], "more ranks than numbers"


@pytest.mark.parametrize(("kind", "part"), [("--ema", "ema"), ("--raw", "weights")])
def test_export_equals_the_gathered_vectors_bit_for_bit(kind: str, part: str, trained: Path, tmp_path: Path) -> None:
    """One file that the safetensors library reads, the parameters in the network's order, configuration in metadata."""
    file = tmp_path / "out.safetensors"
    assert cli.main(["export", str(trained), kind, "--out", str(file)]) == 0
    flat_vector, start = flat_vectors(trained / "checkpoints" / SECOND)[part], 0
    exported = load_file(file)
    for name, parameter in load_model(trained).named_parameters():
        count = parameter.numel()
        assert torch.equal(exported[name].flatten(), flat_vector[start : start + count]), name
        start += count
    assert start == len(flat_vector)
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["megapix"])
    assert about["ema"] == (kind == "--ema")
    assert about["model"] == config.to_dict(SMALL.model)
    assert (about["image_size"], about["images_seen"]) == (16, 160)


@pytest.mark.long
def test_export_is_streamed(tmp_path: Path) -> None:
    """256 MiB of weights in 64 tensors: the peak stays far below one copy of them."""
    shapes = {f"layer{i:02d}": (1024, 1024) for i in range(64)}
    run = _synthetic(tmp_path / "run", shapes, ranks=2)
    code = (
        "import resource, sys; from pathlib import Path; from megapix.weights.write import export\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", code, str(run), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    grown = int(done.stdout) / 1024
    # Two tensors are 8 MiB and a shard 512 MiB; mapped pages of the shard count as resident, a copy would come on top.
    assert grown < 512 + 64, f"{grown} MiB"
    exported = load_file(out)
    assert list(exported) == list(shapes)
    assert torch.equal(exported["layer63"].flatten(), torch.arange(63 * 2**20, 2**26, dtype=torch.float32) % 8191)


def _synthetic(run: Path, shapes: dict[str, tuple[int, ...]], ranks: int) -> Path:
    """A run with one checkpoint whose vectors count modulo 8191."""
    layout, files = Layout(shapes, ranks), {}
    folder = run / "checkpoints" / FIRST
    folder.mkdir(parents=True)
    for rank in range(ranks):
        start, stop = layout.range_of(rank)
        numbers = torch.arange(start, stop, dtype=torch.float32) % 8191
        parts = {part: ((stop - start,), vectors.chunks(numbers)) for part in PARTS}
        files[layout.file_of(rank)] = vectors.write(folder / layout.file_of(rank), parts)
    write_state(folder, State(Counters(80, 80), SMALL, "digest", ("a",) * 3, layout, 10, files=files))
    point_to(folder)
    return run


def test_reshard_and_back_is_the_same_file(trained: Path, tmp_path: Path) -> None:
    source = trained / "checkpoints" / SECOND
    assert cli.main(["reshard", str(trained), "--ranks", "3", "--out", str(tmp_path / "three")]) == 0
    three = tmp_path / "three" / "checkpoints" / SECOND
    assert len(list(three.glob("rank-*-of-00003.safetensors"))) == 3
    before, after = flat_vectors(source), flat_vectors(three)
    assert all(torch.equal(before[part], after[part]) for part in PARTS)
    again = reshard(saved(tmp_path / "three"), 2, tmp_path / "two")
    for path in source.glob("rank-*"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_reshard_and_export_refuse_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    new = str(tmp_path / "new")
    for command, words in (
        (["reshard", str(trained), "--ranks", "0", "--out", new], "--ranks = 0: expected at least 1"),
        (["reshard", str(trained), "--ranks", "2", "--out", str(trained)], "has checkpoints already"),
        (["reshard", str(trained), "--ranks", "2", "--out", str(taken / "x")], "cannot be written"),
        (["reshard", new, "--ranks", "2", "--out", new], "holds no weights: expected a run, a checkpoint"),
        (["export", str(trained), "--raw", "--ema", "--out", new], "--ema and --raw: expected one of them"),
        (["export", str(trained), "--out", str(tmp_path)], "is a folder; expected a file"),
        (["export", new, "--out", str(tmp_path / "x")], "holds no weights"),
    ):
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            vectors.write(Path("/dev/full"), {"x": ((2**20,), [torch.zeros(2**20)])})


# ---------------------------------------------------------------------------------------------------------------------
# Another number of ranks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "precision"), [(1, "fp32"), *(pytest.param(n, "bf16", marks=pytest.mark.long) for n in (1, 4))]
)
def test_every_number_of_ranks_loads_the_same_bits(
    ranks: int, precision: str, subject: Subject, tmp_path: Path
) -> None:
    """Two ranks save; others load, and gather masters, both moments and the EMA of every parameter."""
    run = tmp_path / "run"
    succeed(2, "megapix", subject.arguments(run, "--precision", precision, "--optim.end-at", "24"))
    succeed(ranks, "tests.programs.other_ranks", [run])


def test_loading_another_ranks_files_takes_little_memory(tmp_path: Path) -> None:
    """Rank 1 of 3 fills its four vectors (85 MiB) from the files of 2 ranks: no more than such a share on top."""
    shapes = {f"layer{i:02d}": (1024, 1024) for i in range(16)}
    run = _synthetic(tmp_path / "run", shapes, ranks=2)
    code = """
import resource, sys, torch
from pathlib import Path
from megapix.checkpoint import vectors as flat
from megapix.checkpoint.find import find
from megapix.checkpoint.layout import PARTS, Layout
from megapix.dist import World
saved = find(Path(sys.argv[1]), World())
start, stop = Layout(saved.state.layout.shapes, 3).range_of(1)
vectors = {part: torch.zeros(stop - start) for part in PARTS}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for part, vector in vectors.items():
    flat.fill(vector, saved.folder, saved.state.layout, part, start)
    assert torch.equal(vector, torch.arange(start, stop, dtype=torch.float32) % 8191), part
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True, text=True)
    grown = int(done.stdout) / 1024
    assert grown < 86 + 16, f"{grown} MiB"


@pytest.mark.long
def test_ranks_change_in_mid_run(subject: Subject, tmp_path: Path) -> None:
    """2 -> 4 -> 1 -> 3 ranks by the same command: one line of losses, within 1e-5 of the run that never changed."""
    batch = 12
    common = ["--optim.global-batch", str(batch), "--optim.lr-step-at", "never", "--log.every", str(batch)]
    common += ["--checkpoint.every", str(8 * batch)]
    still = ["--optim.end-at", str(16 * batch)]
    succeed(2, "megapix", subject.arguments(tmp_path / "still", *common, *still))
    changed = tmp_path / "changed"
    micro = {2: "3", 4: "1", 1: "6", 3: "4"}
    for number, ranks in enumerate((2, 4, 1, 3)):
        end = (number + 1) * 4 * batch
        if number:  # masters, moments and EMA as the new ranks hold them are what the old ones saved
            succeed(ranks, "tests.programs.other_ranks", [changed])
        options = ["--optim.end-at", str(end), "--machine.micro-batch", micro[ranks]]
        out = succeed(ranks, "megapix", subject.arguments(changed, *common, *options))[0].out
        assert f"x ranks {ranks}" in out
        if number:
            assert f"changed since the checkpoint: ranks: {(2, 4, 1)[number - 1]} -> {ranks}" in out
        assert saved(changed).state.layout.ranks == ranks
        assert counters(changed) == Counters(end, end)
    expected, found = (scalars(tmp_path / name, "loss/train") for name in ("still", "changed"))
    assert list(found) == list(expected) == list(range(1, 17)), "one line without overlaps"
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.long
def test_a_row_of_losses_goes_on_after_a_resume(shards: Path, tmp_path: Path) -> None:
    """Rows of five steps, and an end after seven and after eight: on the same ranks the same bits, on others nearly."""
    common = ["--log.every", str(5 * STEP_BATCH), "--optim.lr-step-at", "never"]
    for name, ends in (("whole", [(2, 10)]), ("parts", [(2, 7), (2, 8), (2, 10)]), ("others", [(2, 7), (1, 10)])):
        for ranks, steps in ends:
            options = ["--optim.end-at", str(steps * STEP_BATCH)]
            succeed(ranks, "megapix", arguments(shards, tmp_path / name, *common, *options))
    for tag in ("loss/train", "loss/t_2_of_4"):
        whole, parts, others = (scalars(tmp_path / name, tag) for name in ("whole", "parts", "others"))
        assert list(whole) == [5, 10]
        assert {step: parts[step] for step in whole} == whole
        assert [others[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-5)


def test_the_global_batch_may_not_change(shards: Path, run: Path) -> None:
    done = start(1, "megapix", arguments(shards, run, "--optim.global-batch", "16", "--machine.micro-batch", "4"))
    assert done[0].code == 2
    line = done[0].err.splitlines()[-1]
    assert "was trained with optim.global_batch = 8" in line
    assert "this run has 16 = micro batch 4 x accumulation 4 x ranks 1" in line
    assert "give --optim.global-batch 8" in line


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("tmpfs", marks=needs("mount", "umount"))])
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: room for some checkpoints of the small run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_full_disk_in_mid_save_leaves_the_previous_one(background: bool, shards: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    command = arguments(shards, run, "--checkpoint.every", str(4 * STEP_BATCH), "--log.every", "160")
    command += [] if background else ["--checkpoint.no-background"]
    succeed(2, "megapix", [*command, "--optim.end-at", "32"])
    first = saved(run)
    size = sum(path.stat().st_size for path in first.folder.iterdir())
    filler = small_disk / "filler"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(bytes(free - size // 2))
    done = start(2, "megapix", [*command, "--checkpoint.max-failed", "1"])
    assert [rank.code for rank in done] == [74, 74]
    (line,) = [line for line in done[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert "the checkpoint images-000000000064 could not be saved" in line
    assert "No space left on device" in line
    assert f"{first.folder} is still whole" in line
    assert saved(run).folder == first.folder, "'require' and hashes"
    assert not list((run / "checkpoints").glob("*.tmp")), "the half-written one has made room"
    filler.unlink()
    succeed(2, "megapix", [*command, "--optim.end-at", "64", "--checkpoint.keep", "1"])
    assert counters(run).images_seen == 64


def test_a_background_save_that_fails_is_an_error_at_the_next_step(shards: Path, tmp_path: Path) -> None:
    """Where the checkpoint of step 4 is to be written lies a file: step 5 is not logged any more."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    options = ["--checkpoint.every", str(4 * STEP_BATCH), "--checkpoint.max-failed", "1"]
    done = start(2, "tests.programs.failing_save", arguments(shards, run, *options))
    assert [rank.code for rank in done] == [74, 74], done[0].err
    assert "could not be saved" in done[0].err
    assert "there is none before it" in done[0].err
    assert max(scalars(run, "loss/train")) < 20, "long before the end"


def folders(run: Path) -> list[int]:
    return [int(path.name.removeprefix("images-")) // STEP_BATCH for path in complete(run)]


def test_retention_of_a_run(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--checkpoint.every", str(STEP_BATCH), "--checkpoint.keep", "2", "--optim.end-at", str(5 * STEP_BATCH)]
    succeed(1, "megapix", arguments(shards, run, *options))
    assert folders(run) == [4, 5]
    assert saved(run).folder == run / "checkpoints" / f"images-{5 * STEP_BATCH:012d}"


def test_retention_rules(tmp_path: Path) -> None:
    """Ten checkpoints, eight images apart; what each rule keeps, by hand."""

    def fresh(name: str) -> Path:
        run = tmp_path / name
        for step in range(1, 11):
            folder = run / "checkpoints" / f"images-{step * 8:012d}"
            folder.mkdir(parents=True)
            layout = Layout({"a": (1,)}, 1)
            loss = {3: 0.1, 7: 0.2}.get(step, 1.0)
            state = State(Counters(step * 8, step * 8), SMALL, "", (), layout, step, 8 * step - 8, loss)
            write_state(folder, replace(state, files={layout.file_of(0): FileRecord(1, "")}))
            (folder / layout.file_of(0)).touch()
        return run

    def pruned(name: str, newest: int = 10, **rules: object) -> list[int]:
        run = fresh(name)
        retention.prune(run, run / "checkpoints" / f"images-{newest * 8:012d}", config.CheckpointConfig(**rules))  # type: ignore[arg-type]
        return folders(run)

    assert pruned("all", keep=0) == list(range(1, 11))
    assert pruned("two", keep=2) == [9, 10]
    assert pruned("every", keep=1, keep_every=20) == [3, 5, 8, 10], "the first at or after 20, 40, 60 and 80 images"
    assert pruned("best", keep=1, keep_best=2) == [3, 7, 10]
    assert pruned("fallen back", newest=6, keep=2) == [5, 6, 7, 8, 9, 10], "later ones are not this run's to remove"
    run = fresh("marks")
    four, five, six = (run / "checkpoints" / f"images-{step * 8:012d}" for step in (4, 5, 6))
    (four / "KEEP").touch()
    protect(run, five)
    protect(run, six)
    newest = run / "checkpoints" / f"images-{80:012d}"
    with reading(run / "checkpoints" / f"images-{8:012d}"):
        retention.prune(run, newest, config.CheckpointConfig(keep=1))
        assert folders(run) == [1, 4, 6, 10], "being read, KEEP, the healthy mark that has moved, the newest"
    retention.prune(run, newest, config.CheckpointConfig(keep=1))
    assert folders(run) == [4, 6, 10]


def test_leftovers_of_a_killed_process(run: Path) -> None:
    """Killed between the two renames of a second save at the same images seen, and at other moments."""
    parent = run / "checkpoints"
    os.replace(parent / SECOND, parent / f"{SECOND}.old")
    left = choose(run, "require", World()).saved
    assert left
    assert left.folder.name == f"{SECOND}.old", (
        "before anything is put right: the dry run of a launcher changes nothing"
    )
    shutil.copytree(parent / FIRST, parent / f"{FIRST}.gone")
    (parent / "images-000000000999.tmp").mkdir()
    (parent / ".latest.4711.tmp").touch()
    mine = parent / f"{FIRST}.bak", parent / "images-1.tar"
    shutil.copytree(parent / FIRST, mine[0])
    mine[1].touch()
    assert retention.settle(run, left) == []
    assert sorted(path.name for path in parent.iterdir()) == sorted([FIRST, SECOND, "latest", *(m.name for m in mine)])
    assert saved(run).folder.name == SECOND


@pytest.mark.long
def test_going_back_by_hand_sets_the_later_ones_aside(
    shards: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing may fall back to a course that its owner has left; the same command replays it to the same bits."""
    parent = run / "checkpoints"
    (parent / "latest").write_text(f"{FIRST}\n")
    done = succeed(2, "megapix", arguments(shards, run))
    assert f"set aside, because the run resumes from before it: {parent / SECOND}.aside" in done[0].err
    old, new = (flat_vectors(parent / name) for name in (f"{SECOND}.aside", SECOND))
    assert all(torch.equal(old[part], new[part]) for part in PARTS)
    assert complete(run) == [parent / FIRST, parent / SECOND]


def test_a_rollback_leaves_what_is_marked_or_being_read(run: Path) -> None:
    parent = run / "checkpoints"
    third, fourth = (parent / f"images-{number:012d}" for number in (240, 320))
    shutil.copytree(parent / SECOND, third)
    shutil.copytree(parent / SECOND, fourth)
    (third / "KEEP").touch()
    with reading(fourth):
        aside = retention.leave(run, parent / FIRST, remove=True)
    assert [path.name for path in aside] == [f"{third.name}.aside", f"{fourth.name}.aside"]
    assert complete(run) == [parent / FIRST], "and the second is removed"
    assert not (parent / f"{SECOND}.gone").exists()


@needs("chattr")
def test_a_checkpoint_that_cannot_be_removed_ends_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = run / "checkpoints"
    command = ["chattr", "+i", str(rank_file(parent / FIRST))]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file here can be made immutable")
    try:
        retention.prune(run, parent / SECOND, config.CheckpointConfig(keep=1))
        assert "could not be removed: Operation not permitted" in capsys.readouterr().err
        assert complete(run) == [parent / SECOND]
        retention.settle(run, saved(run))
        assert "could not be removed: Operation not permitted" in capsys.readouterr().err
    finally:
        subprocess.run(["chattr", "-R", "-i", str(parent)], check=True)
    retention.settle(run, saved(run))
    assert [path.name for path in parent.glob("images-*")] == [SECOND]


def test_any_error_of_the_background_thread_is_told(tmp_path: Path) -> None:
    """Here the state cannot be written as JSON, which no one has foreseen."""
    saver = Saver(tmp_path, config.CheckpointConfig(max_failed=1), World())
    layout = Layout({"a": (4,)}, 1)
    state = State(Counters(8, 8), SMALL, b"no text", (), layout, 1)  # type: ignore[arg-type]
    saver.save(state, {part: torch.zeros(4) for part in PARTS})
    with pytest.raises(
        RunError, match=r"images-000000000008 could not be saved: .*TypeError.*; there is none before it"
    ):
        saver.finish()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock ends with its process, and with its file."""
    code = """
import sys
from pathlib import Path
from megapix.resilience.run_lock import run_lock
from megapix.dist import World
with run_lock(Path(sys.argv[1]), World()):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(InputError, match=rf"another run works there \(process {other.pid} on "),
        run_lock(tmp_path / "run", World(), patience=0.5),
    ):
        pass
    assert f"is held by process {other.pid} on" in capsys.readouterr().err
    other.kill()
    other.wait()
    with run_lock(tmp_path / "run", World(), patience=10):
        (tmp_path / "run" / "lock").unlink()
        with run_lock(tmp_path / "run", World(), patience=0):
            pass


def test_a_checkpoint_that_vanishes_is_named(run: Path, tmp_path: Path) -> None:
    """Removed by its run after it was found: one line, and no half-written file."""
    found = find(run, World())
    (found.folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"rank-00001-of-00002.safetensors"):
        reshard(found, 3, tmp_path / "three")
    assert not list((tmp_path / "three").rglob("*.tmp"))
    shutil.rmtree(found.folder)
    with pytest.raises(InputError, match=r"rank-00000-of-00002.safetensors"):
        list(vectors.read(found.folder, found.state.layout, "ema", 0, 4))

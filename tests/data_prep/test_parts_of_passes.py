"""Passes over a prepared folder by several machines, and by several devices of one: the bytes of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.parts import gpus
from data_prep.passes import statistics
from megapix.encoders import scoring
from megapix.errors import InputError
from megapix.shards.index import read_index, write_index
from megapix.shards.statistics import read_reference
from tests.data_prep.test_parts import run, said
from tests.data_prep.test_write import hashes
from tests.support import image_encoders
from tests.support.small_extractor import SmallExtractor


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoders.make(tmp_path_factory.mktemp("encoder") / "encoder")


def features(shards: Path, encoder: Path, out: Path, *options: object) -> int:
    return run("features", shards, "--encoder", encoder, "--out", out, "--batch", 7, "--workers", 1, *options)


def test_features_of_images(shards: Path, image_encoder: Path, tmp_path: Path) -> None:
    assert features(shards, image_encoder, tmp_path / "one") == 0
    for number in (1, 0):
        assert features(shards, image_encoder, tmp_path / "parts", "--part", f"{number}/2") == 0
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "one")
    assert features(shards, image_encoder, tmp_path / "parts", "--part", "0/2") == 0, "a part that comes late"
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "one")


def test_features_of_captions(
    text_shards: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, parts = (Path(shutil.copytree(text_shards, tmp_path / name)) for name in ("one", "parts"))
    for folder in (one, parts):
        write_index(folder, replace(read_index(folder), text=None))
        for path in folder.glob("text-*"):
            path.unlink()
    options = (
        "--encoder",
        text_encoder,
        "--max-tokens",
        12,
        "--dtype",
        "fp32",
        "--batch",
        7,
        "--prefix",
        "",
        "--replace",
    )
    assert run("embed-text", one, *options) == 0
    capsys.readouterr()
    assert run("embed-text", parts, *options, "--part", "1/3") == 2
    assert "expected without --replace" in said(capsys)
    for number in (2, 0, 1):
        assert run("embed-text", parts, *options[:-1], "--part", f"{number}/3") == 0
    assert hashes(parts) == hashes(one)


def test_faults_of_all_parts(text_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = Path(shutil.copytree(text_shards, tmp_path / "shards"))
    for tar in sorted(shards.glob("*.tar")):
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
    (shards / "text-000001.safetensors").unlink()
    command = ("verify", shards, "--workers", 1)
    assert run(*command, "--out", tmp_path / "one.txt") == 2
    assert run(*command, "--part", "1/3") == 2
    assert "expected --out FILE" in capsys.readouterr().err
    codes = [run(*command, "--out", tmp_path / "parts.txt", "--part", f"{number}/3") for number in (2, 0, 1)]
    assert codes == [0, 0, 2]
    assert (tmp_path / "parts.txt").read_bytes() == (tmp_path / "one.txt").read_bytes()
    assert len((tmp_path / "one.txt").read_text().splitlines()) == 1 + len(list(shards.glob("*.tar")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "parts.txt", "shards"]


def stats(shards: Path, out: Path, *options: object) -> int:
    """In fourteen batches of the forty images."""
    return run("stats", shards, "--out", out, "--batch", 3, *options)


@pytest.fixture
def by_one(shards: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Statistics of a small extractor, which stays the one that is used, by one machine and one worker."""
    monkeypatch.setattr(scoring, "open_extractor", lambda *_: SmallExtractor())
    out = tmp_path_factory.mktemp("statistics") / "one.npz"
    assert stats(shards, out, "--workers", 1) == 0
    return out.read_bytes()


def test_statistics(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four blocks of four batches: by one machine, by two workers, and by parts in any order."""
    monkeypatch.setattr(scoring, "open_extractor", lambda *_: SmallExtractor())
    monkeypatch.setattr(statistics, "BLOCKS", 4)
    assert stats(shards, tmp_path / "one.npz", "--workers", 1) == 0
    assert stats(shards, tmp_path / "workers.npz", "--workers", 2) == 0
    blocks = []
    for number in (2, 0, 1):
        assert stats(shards, tmp_path / "parts.npz", "--workers", 1, "--part", f"{number}/3") == 0
        blocks.append(sorted(path.name for path in tmp_path.glob(".parts.npz.*.blocks/block-*.npz")))
    assert blocks == [
        ["block-000002.npz"],
        ["block-000000.npz", "block-000002.npz", "block-000003.npz"],
        [],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "parts.npz", "workers.npz"]
    one = (tmp_path / "one.npz").read_bytes()
    assert (tmp_path / "workers.npz").read_bytes() == one
    assert (tmp_path / "parts.npz").read_bytes() == one
    capsys.readouterr()
    assert stats(shards, tmp_path / "parts.npz", "--part", "1/3") == 0, "a part that comes late"
    assert "was finished already" in capsys.readouterr().out
    assert (tmp_path / "parts.npz").read_bytes() == one
    found, _ = read_reference(tmp_path / "one.npz")
    values = found.features.astype(np.float64)  # of all images
    assert len(values) == found.moments.count == 40
    np.testing.assert_allclose(found.moments.mu, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.moments.sigma, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-15)


def test_statistics_go_on_from_the_blocks_that_are_there(
    shards: Path, by_one: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a part, and of one machine, that ended at an image that could not be read."""
    theirs, out = Path(shutil.copytree(shards, tmp_path / "shards")), tmp_path / "stats.npz"
    tar = max(theirs.glob("*.tar"))
    whole = tar.read_bytes()
    for options in (("--part", "0/2"), ()):
        tar.write_bytes(whole.replace(b"\x89PNG", b"oops"))
        assert stats(theirs, out, "--workers", 1, *options) == 2
        there = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".stats.npz.*.blocks/block-*.npz")}
        assert there
        tar.write_bytes(whole)
        assert stats(theirs, out, "--workers", 1, *options) == 0
        if options:
            assert {path: path.stat().st_mtime_ns for path in there} == there
            assert stats(theirs, out, "--workers", 1, "--part", "1/2") == 0
        assert out.read_bytes() == by_one
        out.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_statistics_that_a_killed_part_has_left(
    shards: Path,
    by_one: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "stats.npz"
    assert stats(shards, out, "--part", "1/2") == 0
    capsys.readouterr()
    assert run("finish", out) == 2
    assert "parts 0 of 2 are missing; give the same 'data_prep stats' command with --part 0/2" in said(capsys)
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "write_reference", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stats(shards, out, "--part", "0/2")
    before = Path(shutil.copytree(tmp_path / ".stats.npz.parts", tmp_path / "before"))
    block = max(tmp_path.glob(".stats.npz.*.blocks/*"))
    data = block.read_bytes()
    block.write_bytes(data[:-99])
    capsys.readouterr()
    assert run("finish", out) == 2
    line = f"{block} is gone or damaged; delete it, and give its part again: --part 1/2"
    assert line in said(capsys)
    block.write_bytes(data)
    assert run("finish", out) == 0
    shutil.move(before, tmp_path / ".stats.npz.parts")  # killed when the statistics were there, and the blocks gone
    assert run("finish", out) == 0
    assert out.read_bytes() == by_one
    assert run("finish", out) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--part", "1/3", "--batch", 4), "its parts have --batch 3, part 1/3 has 4; expected the same options"),
        (("--part", "1/3", "--features", 5), "its parts have --features 10000, part 1/3 has 5"),
        (("--part", "3/3"), "--part = '3/3': expected I/N with I from 0 to N - 1"),
        (("--part", "1/4"), "is being made in 3 parts, this is part 1/4; expected --part I/3"),
        ((), "is being made in 3 parts; give one of them (--part 0/3)"),
    ],
)
def test_parts_of_other_statistics_are_refused(
    options: tuple[object, ...],
    line: str,
    shards: Path,
    by_one: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stats(shards, tmp_path / "stats.npz", "--part", "2/3") == 0
    capsys.readouterr()
    assert stats(shards, tmp_path / "stats.npz", *options) == 2
    assert line in said(capsys)


def test_parts_of_other_images_are_refused(
    shards: Path, text_shards: Path, by_one: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stats(shards, tmp_path / "stats.npz", "--part", "2/3") == 0
    capsys.readouterr()
    assert stats(text_shards, tmp_path / "stats.npz", "--part", "1/3") == 2
    assert f"the parts do not see the same files: data = '{read_index(shards).digest}' elsewhere" in said(capsys)


@pytest.mark.long
def test_all_devices_of_a_machine(
    shards: Path, image_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, which are told of two CPUs in place of GPUs."""
    assert features(shards, image_encoder, tmp_path / "one") == 0
    assert stats(shards, tmp_path / "one.npz") == 0
    monkeypatch.setattr(gpus, "devices", lambda: ["cpu", "cpu"])
    assert features(shards, image_encoder, tmp_path / "two") == 0
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    assert stats(shards, tmp_path / "two.npz") == 0
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["about"] == two["about"]
        assert one["count"] == two["count"]
        for name in ("mu", "sigma", "features"):  # a CPU's convolutions have other last bits with other threads
            np.testing.assert_allclose(two[name], one[name], atol=1e-4)


def killed(device: str, jobs: list[int], update: object) -> None:
    """What runs out of memory on one of the devices."""
    if device == "second":
        raise SystemExit(9)


def refused(device: str, jobs: list[int], update: object) -> None:
    raise InputError(f"{device} cannot")


def test_a_device_that_fails_ends_all() -> None:
    for work, line in ((killed, "ended with code 9"), (refused, "cannot")):
        with pytest.raises(InputError, match=line):
            gpus.on_each(work, range(3), ["first", "second"], lambda _: None)

"""Passes over a prepared folder by several machines, and by several devices of one: the bytes of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.parts import gpus
from megapix.errors import InputError
from megapix.shards.index import read_index, write_index
from tests.data_prep.test_parts import run, said
from tests.data_prep.test_write import hashes
from tests.support import image_encoders


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


@pytest.mark.long
def test_all_devices_of_a_machine(
    shards: Path, image_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, which are told of two CPUs in place of GPUs."""
    assert features(shards, image_encoder, tmp_path / "one") == 0
    monkeypatch.setattr(gpus, "devices", lambda: ["cpu", "cpu"])
    assert features(shards, image_encoder, tmp_path / "two") == 0
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


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

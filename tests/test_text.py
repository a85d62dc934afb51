"""Text files that people write for runs and commands, as their editors save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megapix.cli import config_file
from megapix.conditioning.text_source import read_prompts
from megapix.config.ds_config import read_knobs
from megapix.errors import InputError
from megapix.launch import handover
from megapix.sample.prompts import rows_of
from megapix.text import text_of

BEAR = "ein Bär 🐻"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_prompts(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a red mat \r\n\r\n  {BEAR}\u2028twice\r\n".encode(encoding))
    assert read_prompts(path, "--prompts") == ("a red mat", f"{BEAR}\u2028twice")
    path.write_bytes("a dog\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"prompts.txt': cannot be read: it holds zero bytes, as UTF-16 without"):
        read_prompts(path, "--prompts")


def test_a_configuration_with_a_mark(tmp_path: Path) -> None:
    written = '{"model": {"width": 48}}\r\n'
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "c.json").write_bytes(written.encode(encoding))
        assert config_file.read(tmp_path / "c.json")["model"] == {"width": 48}
        (tmp_path / "ds.json").write_bytes('{"zero_optimization": {"stage": 2}}'.encode(encoding))
        assert read_knobs(str(tmp_path / "ds.json"))["zero_optimization"] == {"stage": 2}
    (tmp_path / "c.json").write_bytes(written.encode("utf-16-le"))
    with pytest.raises(InputError, match=r"c.json: cannot be read as JSON: it holds zero bytes"):
        config_file.read(tmp_path / "c.json")


def test_deepspeeds_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_bytes(b"\xef\xbb\xbfNCCL_DEBUG=INFO\r\nODD=\xff\r\n")
    assert handover._users() == {"NCCL_DEBUG": "INFO", "ODD": "\udcff"}
    (tmp_path / ".deepspeed_env").write_bytes(b"\xef\xbb\xbfNCCL_DEBUG=INFO\r\nNCCL_X=1\r\n")
    assert handover._users() == {"NCCL_DEBUG": "INFO", "NCCL_X": "1"}


def test_text_of_says_what_would_be_right() -> None:
    assert text_of(b"a\r\nb\rc\n") == "a\nb\nc\n"
    with pytest.raises(ValueError, match="byte 0 is not UTF-8 text; expected UTF-8, or UTF-16 with a byte order mark"):
        text_of(b"\xff\x00")


def test_dpg_prompts_with_endings_of_another_system(tmp_path: Path) -> None:
    for name, data in {"B.TXT": b"\xef\xbb\xbfa cat\r\n", "a.txt": b"a dog", "c.md": b"no"}.items():
        (tmp_path / name).write_bytes(data)
    assert [row.name for row in rows_of(tmp_path, "dpg", 0)] == ["a cat", "a dog"]

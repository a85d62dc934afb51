"""Sets that grow, shrink and break: `data_prep index` keeps what is finished, and a run keeps the set it began with."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_prep.parts import indexed
from data_prep.writing import index as indexing
from data_prep.writing import receipt
from megapix.config import DataConfig, freeze
from megapix.data.locate import locate, locate_version
from megapix.data.mix.located import LocatedMix
from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.train.resolve import resolve
from tests.data_prep.test_index import add, index_of, run
from tests.data_prep.test_labels import adds_up
from tests.shards.test_images import encoded
from tests.support.foreign_shards import captions, make
from tests.support.made_run import checkpoint_of
from tests.support.small_run import SMALL
from tests.support.version_2 import make_listed

PNG = encoded(Image.new("RGB", (20, 20)))


def tars(folder: Path, count: int = 4) -> Path:
    """`count` tar files of 8 samples each, of 3 classes."""
    make(folder, count)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tar file was read as a whole."""
    counted: Counter[str] = Counter()
    as_it_is = indexing._indexed

    def counting(path: Path, shown: str, name: str, *rest: object) -> receipt.Receipt:
        counted[name] += 1
        return as_it_is(path, shown, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(indexing, "_indexed", counting)
    monkeypatch.setattr(indexing, "in_processes", lambda work, jobs, workers: ((job, work(job)) for job in jobs))
    return counted


def cut(tar: Path) -> None:
    """As a downloader leaves it that was killed."""
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def test_a_truncated_tar_is_left_out_and_read_again_once_it_is_mended(
    tmp_path: Path, read: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = tars(tmp_path / "theirs"), tmp_path / "index"
    whole = (theirs / "00002.tar").read_bytes()
    cut(theirs / "00002.tar")
    index_of(theirs, out)
    assert "1 of these are tar files that cannot be read" in capsys.readouterr().out
    index = read_index(out)
    assert (index.samples, index.rejected, len(index.files)) == (24, 1, 3)
    (line,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert line["source"] == "00002.tar"
    assert "unexpected end of data" in line["reason"]
    account = json.loads((out / "entries.json").read_text())
    assert account["listed"] == 3 * 24 + 1 == account["used"] + account["rejected"] + account["parts"]
    index_of(theirs, out)
    assert "was finished already" in capsys.readouterr().out
    assert max(read.values()) == 1
    (theirs / "00002.tar").write_bytes(whole)
    index_of(theirs, out)
    assert read == {"00000.tar": 1, "00001.tar": 1, "00002.tar": 2, "00003.tar": 1}
    assert (read_index(out).samples, read_index(out).rejected) == (32, 0)
    index_of(theirs, tmp_path / "fresh")
    for name in ("index.json", "samples.bin", "captions.bin", "entries.json", "plan.json"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_the_budget_of_tars(tmp_path: Path, read: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tars(tmp_path / "theirs")
    for name in ("00001.tar", "00003.tar"):
        cut(theirs / name)
    command = ["index", theirs, "--out", tmp_path / "index", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    words = "2 of 4 tar files cannot be used, --max-rejected-tars 0.01 allows 1; the latest is '00003.tar': "
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert run(*command, "--max-rejected-tars", 0) == 2
    assert "1 of 4 tar files cannot be used, --max-rejected-tars 0 allows 0" in capsys.readouterr().err
    assert run(*command, "--max-rejected-tars", 0.5) == 0
    assert read == {f"0000{n}.tar": 1 for n in range(4)}, "each was read once in all"
    assert run(*command, "--max-rejected-tars", 2) == 2
    assert "--max-rejected-tars = 2.0: expected a share, 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("made_by", ["now", "version 2"])
def test_a_set_may_grow_and_shrink(tmp_path: Path, read: Counter[str], made_by: str) -> None:
    theirs, out = tars(tmp_path / "theirs"), tmp_path / "index"
    (tmp_path / "later").mkdir()
    later = [(theirs / name).rename(tmp_path / "later" / name) for name in ("00002.tar", "00003.tar")]
    index_of(theirs, out)
    first = read_index(out if made_by == "now" else make_listed(out))
    before = {name: (out / name).read_bytes() for name in ("samples.bin", "captions.bin")}
    for path in later:
        path.rename(theirs / path.name)
    os.utime(theirs / "00000.tar", ns=(1, 1))
    index_of(theirs, out)
    second = read_index(out)
    assert read == {f"0000{n}.tar": 1 for n in range(4)}
    assert (second.samples, len(second.files)) == (32, 4)
    kept = out / "versions" / first.digest[:16]
    assert read_index(kept).digest == first.digest
    assert {name: (kept / name).read_bytes() for name in before} == before
    assert run("verify", kept, "--workers", 1) == 0, "its tar files are found from there"
    (theirs / "00000.tar").unlink()
    index_of(theirs, out)
    assert [entry.name for entry in read_index(out).files] == ["00001.tar", "00002.tar", "00003.tar"]
    assert {path.name for path in (out / "versions").iterdir()} == {first.digest[:16], second.digest[:16]}
    assert max(read.values()) == 1
    assert captions(out) == [f"picture {n} – ü" for n in range(8, 32)]


@pytest.mark.parametrize("made_by", ["now", "version 2"])
def test_what_changed_is_found_by_its_time_or_hash(tmp_path: Path, read: Counter[str], made_by: str) -> None:
    theirs, out = tars(tmp_path / "theirs", 2), tmp_path / "index"
    index_of(theirs, out)
    about, digest = (theirs / "00000.tar").stat(), read_index(out if made_by == "now" else make_listed(out)).digest
    os.utime(theirs / "00000.tar", ns=(1, 1))
    index_of(theirs, out)
    assert read == {"00000.tar": 1, "00001.tar": 1}, "another time, the same hash"
    assert read_index(out).digest == digest
    assert not (out / "versions" / digest[:16]).exists()
    data = bytearray((theirs / "00000.tar").read_bytes())
    at = data.index(b"picture 1")
    data[at : at + 9] = b"picture X"
    (theirs / "00000.tar").write_bytes(data)
    os.utime(theirs / "00000.tar", ns=(about.st_atime_ns, 1))
    index_of(theirs, out)
    assert read_index(out).digest == digest, "neither size nor time say that it changed"
    index_of(theirs, out, "--rehash")
    assert read == {"00000.tar": 2, "00001.tar": 1}
    assert captions(out)[:2] == ["picture 0 – ü", "picture X – ü"]
    assert (out / "versions" / digest[:16] / "index.json").is_file()


def test_a_run_keeps_the_set_that_it_began_with(tmp_path: Path) -> None:
    theirs, out = tars(tmp_path / "theirs", 2), tmp_path / "index"
    index_of(theirs, out)
    first = read_index(out)
    run_of = replace(SMALL, out=str(tmp_path / "run"), data=replace(SMALL.data, path=str(out)))
    checkpoint_of(freeze(run_of, first.samples), out, tmp_path / "run", ranks=1)
    tars(theirs, 3)
    index_of(theirs, out)
    second, config = read_index(out), DataConfig(path=str(out), image_size=16)
    assert locate(config).index.digest == second.digest
    found = locate_version(config, first.digest)
    assert (found.index.digest, found.newer) == (first.digest, second.digest)
    assert found.folder == out / "versions" / first.digest[:16]
    resolved = resolve(run_of, 1)
    assert resolved.located == found
    said = f"{str(out)!r} has a newer index, {second.digest[:16]}…; the run keeps its own, {first.digest[:16]}…"
    assert resolved.kept == (f"data.path: {said} of 16 images",)
    fresh = resolve(replace(run_of, out=str(tmp_path / "other")), 1)
    assert (fresh.located.index.digest, fresh.kept) == (second.digest, ())
    shutil.rmtree(out / "versions")
    with pytest.raises(InputError, match=f"was trained on the data set {first.digest[:16]}…"):
        resolve(run_of, 1)


def test_a_mix_keeps_the_sets_that_its_run_began_with(tmp_path: Path) -> None:
    """One of two has grown: the run goes on with its older index, and says so; another run takes the newest."""
    folders = [tmp_path / "steady", tmp_path / "growing"]
    for number, out in enumerate(folders):
        index_of(tars(tmp_path / f"tars {number}", number + 1), out)
    mix = tmp_path / "mix.json"
    sets = [{"path": str(out), "weight": 1} for out in folders]
    mix.write_text(json.dumps({"format": "megapix-mix", "version": 1, "sets": sets}))
    run_of = replace(SMALL, out=str(tmp_path / "run"), data=replace(SMALL.data, path=str(mix)))
    began = resolve(run_of, 1)
    digests = tuple(read_index(out).digest for out in folders)
    more = {"data_digest": began.located.index.digest, "sets": digests, "weights": ((0, (1, 1), (None, None)),)}
    checkpoint_of(began.config, folders[0], tmp_path / "run", 1, **more)
    tars(tmp_path / "tars 1", 3)
    index_of(tmp_path / "tars 1", folders[1])
    resolved = resolve(run_of, 1)
    assert isinstance(resolved.located, LocatedMix)
    assert resolved.located.digests == digests
    assert resolved.located.index.samples == 24
    (said,) = resolved.kept
    assert f"has a newer index, {read_index(folders[1]).digest[:16]}…; the run keeps its own" in said
    fresh = resolve(replace(run_of, out=str(tmp_path / "other")), 1)
    assert (fresh.located.index.samples, fresh.kept) == (32, ())
    shutil.rmtree(folders[1] / "versions")
    with pytest.raises(InputError, match=r"was trained on a mix of 2 sets, and .*growing' in .* is none of them"):
        resolve(run_of, 1)


def test_a_grown_source_of_write_is_a_second_folder(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(image_folder, tmp_path / "source"))
    command = ["write", source, tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command) == 0
    image = next(source.rglob("*.png"))
    shutil.copy(image, image.with_name("one more.png"))
    assert run(*command) == 2
    words = (
        "begun with samples = 40, this command has 41; give another folder, or the old value, or prepare what is new "
        "in a second one and join them: data_prep merge FOLDER SECOND --out INDEX"
    )
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)


def test_an_older_half_finished_index_goes_on(tmp_path: Path, read: Counter[str]) -> None:
    """Receipts went by the number of the tar file in the list, and tar files by their resolved path."""
    theirs, out = tars(tmp_path / "theirs", 3), tmp_path / "index"
    index_of(theirs, out)
    whole = {name: (out / name).read_bytes() for name in ("samples.bin", "captions.bin")}
    for number in range(2):
        made = receipt.load(out, f"{number:05d}.tar")
        assert made
        data = json.loads(
            next(p for p in (out / ".receipts").iterdir() if f'"{number:05d}.tar"' in p.read_text()).read_text()
        )
        del data["tar"]
        (out / ".receipts" / f"{number:06d}.json").write_text(json.dumps(data))
    for path in [*(out / ".receipts").glob("tar-*"), out / "index.json", *(out / name for name in whole)]:
        path.unlink()
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(plan | {"base": str(theirs.resolve())}))
    read.clear()
    index_of(theirs, out)
    assert read == {"00002.tar": 1}
    assert {name: (out / name).read_bytes() for name in whole} == whole
    assert read_index(out).base == str(theirs.resolve())


def test_a_set_of_one_damaged_tar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add(tmp_path / "theirs", ("a.png", PNG))
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:700])
    assert run("index", folder, "--out", tmp_path / "index", "--size", 16, "--max-rejected-tars", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 tar files cannot be used, --max-rejected-tars 1 allows 0; the latest is '0.tar': " in error


def test_both_folders_of_a_set_in_two_have_versions(tmp_path: Path, read: Counter[str]) -> None:
    """What is held out stays so when the set grows, and a tar file that is rejected is in one of the folders."""
    theirs, out, held = tars(tmp_path / "theirs", 5), tmp_path / "index", tmp_path / "index-held-out"
    later = (theirs / "00004.tar").rename(tmp_path / "00004.tar")
    whole = (theirs / "00001.tar").read_bytes()
    cut(theirs / "00001.tar")
    index_of(theirs, out, "--hold-out", "0.3")
    first = {folder: read_index(folder) for folder in (out, held)}
    texts = {folder: set(captions(folder)) for folder in (out, held)}
    assert sorted(index.source.get("rejected_tars", 0) for index in first.values()) == [0, 1]
    assert sum(index.rejected for index in first.values()) == 1
    (theirs / "00001.tar").write_bytes(whole)
    later.rename(theirs / later.name)
    index_of(theirs, out, "--hold-out", "0.3")
    assert read == {f"0000{n}.tar": 2 if n == 1 else 1 for n in range(5)}
    for folder in (out, held):
        adds_up(folder)
        assert texts[folder] < set(captions(folder))
        kept = folder / "versions" / first[folder].digest[:16]
        assert read_index(kept).digest == first[folder].digest
        assert set(captions(kept)) == texts[folder]
        for place in (folder, kept):
            assert run("verify", place, "--workers", 1) == 0
    assert sorted(captions(out) + captions(held)) == sorted(f"picture {n} – ü" for n in range(40))


def test_receipts_that_are_newer_than_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was killed when a changed tar file was read again, but before the index was written."""
    theirs, out = tars(tmp_path / "theirs", 2), tmp_path / "index"
    index_of(theirs, out)
    data = (theirs / "00000.tar").read_bytes()
    (theirs / "00000.tar").write_bytes(data.replace(b"picture 1 ", b"picture X "))
    with monkeypatch.context() as patched:
        patched.setattr(indexed, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index_of(theirs, out)
    index_of(theirs, out)
    assert captions(out)[:2] == ["picture 0 – ü", "picture X – ü"]
    assert run("verify", out, "--workers", 1) == 0


@pytest.mark.parametrize("name", ["00000.tar", "00001.tar"])
def test_a_written_set_in_two_with_a_damaged_tar(name: str, tmp_path: Path) -> None:
    """Also where it is the first, by which the kind of source is recognised."""
    theirs, out, held = tars(tmp_path / "theirs"), tmp_path / "out", tmp_path / "out-held-out"
    (theirs / name).write_bytes(b"<html>not found</html>")
    assert run("write", theirs, out, "--size", 16, "--workers", 1, "--hold-out", "0.3") == 0
    lines = [path.read_text() for folder in (out, held) if (path := folder / "rejected.jsonl").is_file()]
    assert [json.loads(line)["source"] for line in lines] == [name]
    assert adds_up(out).used + adds_up(held).used == 24
    assert adds_up(out).listed == adds_up(held).listed == 3 * 24 + 1


def test_a_package_that_is_not_there_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add(tmp_path / "theirs", ("a.png", PNG))
    (folder / "0.parquet").write_bytes(b"PAR1")
    add(tmp_path / "more", ("b.png", PNG)).joinpath("0.tar").rename(folder / "1.tar")
    monkeypatch.setattr(indexing, "in_processes", lambda work, jobs, workers: ((job, work(job)) for job in jobs))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["index", folder, "--out", tmp_path / "x"], ["write", folder, tmp_path / "y"]):
        assert run(*command, "--size", 16, "--workers", 1) == 2
        assert "pip install 'megapix[parquet]'" in capsys.readouterr().err.splitlines()[-1]

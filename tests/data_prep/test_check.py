"""How closely `data_prep index` looks at images, and what makes it look again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.writing import receipt
from megapix.shards.image_policy import Policy
from megapix.shards.index import read_index
from tests.data_prep.test_growing import cut, read, tars  # noqa: F401  # a fixture
from tests.data_prep.test_index import index_of, run
from tests.data_prep.test_metadata import OF_TABLE, TABLE, img2dataset_tars, table_of, tar_of
from tests.shards.test_images import encoded, photo
from tests.support.foreign_shards import captions

WHOLE = encoded(Image.fromarray(photo(40, 60, seed=1)), "JPEG")
ODD = {
    "whole.jpg": WHOLE,
    "cut.jpg": WHOLE[: len(WHOLE) // 2],
    "long.png": encoded(Image.new("1", (400_000, 1))),
    "small.png": encoded(Image.new("RGB", (5, 7))),
    "words.png": b"no image at all",
}


def odd(folder: Path) -> Path:
    """A tar file of images that can be used, and of some that cannot, each in another way."""
    return tar_of(folder, {f"{n}.{name.rpartition('.')[2]}": data for n, (name, data) in enumerate(ODD.items())})


def rejected(out: Path) -> set[str]:
    path = out / "rejected.jsonl"
    names = list(ODD)
    lines = path.read_text().splitlines() if path.exists() else []
    return {names[int(json.loads(line)["source"].rpartition("/")[2][0])] for line in lines}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"cut.jpg", "long.png", "words.png"}),
        (("--check", "headers"), {"long.png", "words.png"}),
        (("--check", "none"), set()),
        (("--check", "none", "--policy", "buckets"), {"words.png"}),
    ],
    ids=["decode", "headers", "none", "none, buckets"],
)
def test_what_each_check_rejects(options: tuple[str, ...], expected: set[str], tmp_path: Path) -> None:
    """What decoding rejects is what the policy as a whole would, with every image resized."""
    theirs = odd(tmp_path / "theirs")
    assert (
        run("index", theirs, "--out", tmp_path / "out", "--size", 16, "--workers", 1, "--max-rejected", 1, *options)
        == 0
    )
    assert rejected(tmp_path / "out") == expected
    if not options:
        policy = Policy.make("crop", 16)

        def usable(data: bytes) -> bool:
            try:
                return policy.render(data, 0).pixels.shape == (16, 16, 3)
            except ValueError:
                return False

        assert expected == {name for name, data in ODD.items() if not usable(data)}
    remarks = json.loads((tmp_path / "out" / "entries.json").read_text()).get("remarks", [])
    assert [line[:41] for line in remarks] == (["the images of 1 tar files were not decode"] if options else [])


def test_a_stricter_check_looks_again_and_a_weaker_one_does_not(
    tmp_path: Path,
    read: Counter[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, out = tars(tmp_path / "theirs", 2), tmp_path / "index"
    index_of(theirs, out, "--check", "headers")
    digest, notes = read_index(out).digest, json.loads((out / "entries.json").read_text())
    assert notes["remarks"] == [
        "the images of 2 tar files were not decoded (--check headers): damaged ones may be among them"
    ]
    index_of(theirs, out)
    assert read == {"00000.tar": 2, "00001.tar": 2}
    assert read_index(out).digest == digest, "the same samples: a run goes on"
    assert "remarks" not in json.loads((out / "entries.json").read_text())
    capsys.readouterr()
    index_of(theirs, out, "--check", "none")
    assert "was finished already" in capsys.readouterr().out
    assert read == {"00000.tar": 2, "00001.tar": 2}
    index_of(theirs, tmp_path / "fresh")
    for name in ("index.json", "samples.bin", "captions.bin", "entries.json", "plan.json"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_headers_give_the_notes_of_decoded_images(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    theirs = tar_of(
        tmp_path / "theirs", {"a.png": encoded(Image.new("RGB", (9, 9)), icc_profile=profile), "b.jpg": WHOLE}
    )
    index_of(theirs, tmp_path / "decoded")
    index_of(theirs, tmp_path / "headers", "--check", "headers")
    found = [json.loads((tmp_path / out / "entries.json").read_text())["notes"] for out in ("decoded", "headers")]
    assert found == [{"icc unusable": 1, "upscaled": 1}] * 2


def test_duplicates_need_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, out = tars(tmp_path / "theirs", 2), tmp_path / "index"
    command = ["index", theirs, "--out", out, "--size", 16, "--workers", 1, "--dedupe", "exact", "--check", "headers"]
    assert run(*command) == 2
    words = "--check headers decodes no image, which --dedupe exact compares; expected decode"
    assert capsys.readouterr().err == f"data_prep: error: {words}\n"


def test_notes_do_not_count_duplicates_that_are_taken(tmp_path: Path) -> None:
    small = [encoded(Image.fromarray(np.full((8, 9, 3), grey, np.uint8))) for grey in (10, 200)]
    large = encoded(Image.fromarray(np.full((18, 19, 3), 10, np.uint8)))
    members = dict(
        zip([f"{n}.png" for n in range(6)], [small[0], small[0], large, small[1], small[0], large], strict=True)
    )
    index_of(tar_of(tmp_path / "theirs", members), tmp_path / "index", "--dedupe", "exact")
    account = json.loads((tmp_path / "index" / "entries.json").read_text())
    assert (account["used"], account["filtered"], account["notes"]) == (3, {"--dedupe exact": 3}, {"upscaled": 2})


def test_a_changed_table_makes_its_tar_file_be_read_again(tmp_path: Path, read: Counter[str]) -> None:  # noqa: F811
    theirs, out = img2dataset_tars(tmp_path / "in"), tmp_path / "index"
    index_of(theirs, out)
    assert captions(out) == OF_TABLE
    index_of(theirs, out)
    assert set(read.values()) == {1}
    (tar,) = theirs.glob("*.tar")
    changed = [row | {"caption": "another"} if row.get("caption") == OF_TABLE[0] else row for row in TABLE]
    assert changed != TABLE
    table_of(tar.with_suffix(".parquet"), changed)
    index_of(theirs, out)
    assert read == {tar.name: 2}
    assert captions(out) == ["another", *OF_TABLE[1:]]
    tar.with_suffix(".parquet").unlink()
    index_of(theirs, out)
    assert read == {tar.name: 3}
    assert captions(out)[0] != "another"
    made = receipt.load(out, tar.name)
    assert made
    assert made.tar
    assert made.tar.table == receipt.NO_TABLE
    table_of(tar.with_suffix(".parquet"), TABLE)
    index_of(theirs, out)
    assert captions(out) == OF_TABLE, "one that appears counts, too"


def test_a_dry_run_counts_a_damaged_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tars(tmp_path / "theirs", 3)
    cut(theirs / "00001.tar")
    assert (
        run("index", theirs, "--out", tmp_path / "out", "--size", 16, "--workers", 1, "--min-side", 25, "--dry-run")
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert ["".join(line.split()) for line in lines[:4]] == ["samples17", "--min-side253", "cannotberead1", "left13"]
    assert lines[4].startswith("data_prep: tar file '00001.tar' cannot be read: ")
    assert not (tmp_path / "out").exists()

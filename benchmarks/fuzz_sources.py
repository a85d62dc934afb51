"""Damaged and hostile sources: does listing them always answer, and account for every entry?

    python -m benchmarks.fuzz_sources [--each 20000] [--seed 0] [--kinds tar,csv] [--minutes M]

As `benchmarks.fuzz_images`, for what `data_prep write` lists: tar, zip and parquet files, metadata, captions, labels.
Each file is refused in one line (InputError), or its entries add up and each of its samples is read or has a reason.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
import time
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fuzz_images import SECONDS, fuzz_all, mutation_of, options_of
from data_prep.listing.reading import PLAIN, Reading
from data_prep.sources import open_source
from megapix.errors import InputError
from megapix.shards.captions import unpack

KINDS = ("tar", "zip", "parquet", "jsonl", "csv", "json", "txt", "labels", "dataset.json", "metadata.parquet")


@cache
def _images() -> tuple[bytes, ...]:
    made = []
    for shade in range(3):
        out = io.BytesIO()
        Image.new("RGB", (9, 7), (shade, 99, 200)).save(out, "PNG")
        made.append(out.getvalue())
    return tuple(made)


@cache
def _original(kind: str) -> bytes:
    """A whole file of a kind that belongs to three images."""
    out, rows = io.BytesIO(), [{"file_name": f"{n}.png", "text": f"fox {n}", "label": n % 2} for n in range(3)]
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for n, image in enumerate(_images()):
                json_text = json.dumps({"caption": f"fox {n}", "score": n / 2}).encode()
                for ending, data in (("png", image), ("json", json_text), ("cls", b"1")):
                    member = tarfile.TarInfo(f"{'long/' * 25}ü{n}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "0.png"
            tar.addfile(link)
        return out.getvalue()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for n, image in enumerate(_images()):
                archive.writestr(f"00000/{n}.png", image)
            archive.writestr("dataset.json", json.dumps({"labels": [[f"00000/{n}.png", n % 2] for n in range(3)]}))
        return out.getvalue()
    if kind in ("parquet", "metadata.parquet"):
        import pyarrow
        import pyarrow.parquet

        table = [{"image": {"bytes": image}, "label": n % 2, "text": f"fox {n}"} for n, image in enumerate(_images())]
        table = table if kind == "parquet" else rows
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), out, row_group_size=2)
        return out.getvalue()
    texts = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": "file_name,text,label\n" + "\n".join(f'{n}.png,"fox, {n}",{n % 2}' for n in range(3)),
        "json": json.dumps({"captions": ["a fox", {"text": "foxes", "weight": 0.5}], "score": 7}),
        "txt": "a fox, in the snow \U0001f98a\r\n",
        "labels": "file,label\n" + "\n".join(f"{n}.png,class {n % 2}" for n in range(3)),
        "dataset.json": json.dumps({"labels": [[f"{n}.png", n % 2] for n in range(3)]}),
    }
    return texts[kind].encode()


def mutated(kind: str, number: int, seed: int) -> bytes:
    """File `number` of a kind; one in four texts is in UTF-16."""
    generator = np.random.default_rng([seed, KINDS.index(kind), number])
    data = _original(kind)
    if kind not in ("tar", "zip", "parquet", "metadata.parquet") and generator.random() < 0.25:
        data = data.decode().encode("utf-16")
    return mutation_of(data, generator)


def _laid_out(kind: str, data: bytes, folder: Path) -> tuple[Path, Reading]:
    """The source that a file makes, with three images beside it where it holds none."""
    if kind in ("tar", "zip", "parquet"):
        path = folder / f"0.{kind}"
        path.write_bytes(data)
        return (path if kind == "zip" else folder), PLAIN
    if kind == "dataset.json":
        with zipfile.ZipFile(folder / "0.zip", "w") as archive:
            for n, image in enumerate(_images()):
                archive.writestr(f"{n}.png", image)
            archive.writestr(kind, data)
        return folder / "0.zip", PLAIN
    for n, image in enumerate(_images()):
        (folder / f"{n}.png").write_bytes(image)
    (folder / "1.txt").write_text("an owl")
    names = {"jsonl": "metadata.jsonl", "csv": "metadata.csv", "labels": "labels.csv", "metadata.parquet": kind}
    name = names.get(kind, f"0.{kind}")
    (folder / name).write_bytes(data)
    return folder, Reading(labels=folder / name) if kind == "labels" else PLAIN


def fault_of(kind: str, data: bytes) -> tuple[bool, str]:
    """Whether a file is read as a source, and what is wrong with the answer; '' if nothing is."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="megapix-fuzz-") as name:
            found = _fault_in(*_laid_out(kind, data, Path(name)))
    except InputError as error:
        found = False, "" if str(error).isprintable() else f"refused with {str(error)!r}"
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}"
    if (seconds := time.monotonic() - start) > SECONDS:
        return False, f"took {seconds:.1f} s"
    return found


def _fault_in(path: Path, reading: Reading) -> tuple[bool, str]:
    source = open_source(path, reading=reading)
    entries, used = source.entries, 0
    for item in source.items:
        unpack(item.caption)
        json.loads(item.about or "{}")
        if not 0 <= item.label < len(source.classes):
            return True, f"{item.name!r} has label {item.label} of {len(source.classes)}"
        if item.fault:
            continue
        try:
            source.reader.read(item, 8)
            used += 1
        except (ValueError, OSError):
            continue
    kept = len(source.items) + entries.parts + sum(entries.passed.values()) + len(entries.unreadable)
    wrong = "" if kept == entries.listed else f"{entries.listed} entries are listed, {kept} accounted for"
    return used > 0, wrong


def main(arguments: list[str]) -> int:
    """Print faults and counts; returns the exit code."""
    asked = options_of(__doc__, KINDS).parse_args(arguments)
    return fuzz_all(asked, lambda kind: partial(fault_of, kind), mutated, "read")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

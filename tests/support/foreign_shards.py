"""WebDataset shards as strangers make them: images of many sizes and kinds, captions, odd names."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME
from megapix.shards.table import RECORD
from tests.shards.test_images import photo

ENDINGS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
SHAPES = ((40, 60), (60, 40), (32, 32), (90, 30), (33, 64), (20, 50))


@dataclass(frozen=True)
class Foreign:
    """One sample as it was made."""

    tar: str
    key: str
    data: bytes
    pixels: np.ndarray
    """As Pillow decodes it: uint8 [H, W, 3]."""
    label: int
    caption: str


def make(folder: Path, tars: int = 3, samples: int = 8, labelled: bool = True) -> list[Foreign]:
    """Write tar files 00000.tar, … with the stock writer; return the samples in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Foreign] = []
    for number in range(tars):
        with open(folder / f"{number:05d}.tar", "wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
            for n in range(samples):
                place = number * samples + n
                ending = list(ENDINGS)[place % 4]
                image, out = Image.fromarray(photo(*SHAPES[place % len(SHAPES)], seed=place)), io.BytesIO()
                image.save(out, ENDINGS[ending], quality=95)
                caption, label = f"picture {place} – ü", place % 3
                sample = {"__key__": f"deep/part.{number}/s{n}", ending: out.getvalue()}
                if place % 2:
                    sample["txt"] = caption.encode()
                else:
                    sample["json"] = json.dumps({"caption": caption, "url": "https://example.org"}).encode()
                if labelled:
                    sample["cls"] = str(label).encode()
                tar.write(sample)
                with Image.open(io.BytesIO(out.getvalue())) as decoded:
                    pixels = np.asarray(decoded.convert("RGB"))
                found.append(Foreign(f"{number:05d}.tar", f"s{n}", out.getvalue(), pixels, label * labelled, caption))
    return found


def captions(folder: Path) -> list[str]:
    """The captions of an index in the order of its samples."""
    table, text = (folder / TABLE_NAME).read_bytes(), (folder / CAPTIONS_NAME).read_bytes()
    return [text[at : at + size].decode() for *_, at, size in RECORD.iter_unpack(table)]

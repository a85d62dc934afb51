"""The two data sets as shards of 32 pixels: Fashion-MNIST, and the embedded set."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.openmoji import OpenMoji
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.shards.image_policy import Policy

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files of the set."""
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 32


@dataclass(frozen=True)
class Data:
    """A data set that is ready to be trained on."""

    train: Path
    heldout: Path
    classes: int
    reference: Path
    """Statistics of the held-out images, or of the training images where those are too few."""


def prepare(name: str, work: Path, files: Path) -> Data:
    """Shards and reference statistics of a data set below `work`; what is there already is left as it is."""
    for split in ("train", "heldout"):
        write(_source(name, split, work, files), work / split, Options(Policy.make("crop", SIDE)), workers=2)
    counted = work / ("heldout" if name == "fashion-mnist" else "train")
    stats = work / "reference.npz"
    if not stats.is_file():
        subprocess.run([sys.executable, "-m", "data_prep", "stats", counted, "--out", stats], check=True)
    return Data(work / "train", work / "heldout", len(CLASSES) if name == "fashion-mnist" else 5, stats)


def _source(name: str, split: str, work: Path, files: Path) -> OpenMoji | ImageFolder:
    if name == "openmoji":
        return OpenMoji.open("train" if split == "train" else "heldout")
    folder = work / "png" / split
    if not folder.is_dir():
        temporary = work / f"{split}.tmp"
        _write_pngs(files, {"train": "train", "heldout": "t10k"}[split], temporary)
        folder.parent.mkdir(exist_ok=True)
        temporary.rename(folder)
    return ImageFolder.open(folder)


def _write_pngs(files: Path, stem: str, folder: Path) -> None:
    """Grey images of 28 pixels as PNG of 32, with two black pixels on each side, in a folder for each class."""
    images, labels = read_idx(files / f"{stem}-images-idx3-ubyte.gz"), read_idx(files / f"{stem}-labels-idx1-ubyte.gz")
    for number, name in enumerate(CLASSES):
        (folder / f"{number} {name}").mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        padded = np.pad(image, (SIDE - len(image)) // 2)
        Image.fromarray(padded).convert("RGB").save(folder / f"{label} {CLASSES[label]}" / f"{i:05d}.png")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes, in its own shape."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: expected the file of Debian's dataset-fashion-mnist (--files FOLDER)")
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)

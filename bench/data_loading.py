"""Decoded samples a second: our loader, stock webdataset, and torch's DataLoader over an image folder.

    python -m bench.data_loading [--size 256] [--workers 1]

The same JPEG images (OpenMoji, drawn at SIZE), the same batch size and number of worker processes, uint8 tensors out.
Each loader runs for one epoch after a warm-up epoch, five times in turn; the table gives medians and the ratio to ours.
The stock pipeline shuffles in a buffer of 1,000 samples and reads every member of a sample; ours shuffles perfectly and
reads the image alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_prep.demo import OpenMoji
from data_prep.encode import encode
from data_prep.plan import Options
from data_prep.write import write
from megapix.config import BatchLayout, DataConfig
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.images import Policy, decode
from megapix.shards import read_index

BATCH, REPEATS = 32, 5


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W], as ours."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1)))


class Folder(Dataset[Any]):
    """Images of class folders, as torchvision's ImageFolder reads them."""

    def __init__(self, root: Path) -> None:
        classes = sorted(path.name for path in root.iterdir())
        self.files = [(path, classes.index(path.parent.name)) for path in sorted(root.rglob("*.jpg"))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        path, label = self.files[number]
        with Image.open(path) as image:
            return to_tensor(image), label


def make(root: Path, size: int) -> tuple[Path, Path]:
    """Shards and an image folder of the same JPEG images."""
    source = OpenMoji.open("train")
    write(
        source,
        root / "shards",
        Options(Policy.make("crop", size), "jpg", samples_per_shard=100),
        workers=2,
        progress=False,
    )
    for item in source.items:
        folder = root / "folder" / source.classes[item.label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{item.name}.jpg").write_bytes(encode(decode(source.reader.read(item, size)), "jpg", 95))
    return root / "shards", root / "folder"


def ours(shards: Path, size: int, workers: int) -> Iterator[Any]:
    """Endless batches of our loader."""
    config = DataConfig(path=str(shards), image_size=size, workers=workers)
    return batches(config, locate(config), 0, BatchLayout(BATCH, 1, 1), 0, 0, ())


def stock(shards: Path, size: int, workers: int) -> Iterator[Any]:
    """Endless batches of a stock webdataset pipeline."""
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=False, resampled=True).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(to_tensor, lambda x: x).batched(BATCH, partial=False)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def folder(root: Path, size: int, workers: int) -> Iterator[Any]:
    """Endless batches of torch's DataLoader over files."""
    loader = DataLoader(
        Folder(root), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )

    def forever() -> Iterable[Any]:
        while True:
            yield from loader

    return iter(forever())


def rate(loader: Iterator[Any], count: int) -> float:
    """Samples a second over `count` batches."""
    start = time.perf_counter()
    for _ in islice(loader, count):
        pass
    return count * BATCH / (time.perf_counter() - start)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        shards, files = make(Path(root), options.size)
        count = read_index(shards).samples // BATCH
        makers: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": lambda: ours(shards, options.size, options.workers),
            "stock webdataset": lambda: stock(shards, options.size, options.workers),
            "DataLoader over files": lambda: folder(files, options.size, options.workers),
        }
        loaders = {name: maker() for name, maker in makers.items()}
        for loader in loaders.values():
            rate(loader, count)  # warm-up: workers start, files are in the page cache
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(REPEATS):
            for name, loader in loaders.items():
                rates[name].append(rate(loader, count))
    reference = statistics.median(rates["ours"])
    print(f"{options.size} pixels, {options.workers} workers, batches of {BATCH}, {count} batches")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f}-{max(values):.0f}"
        print(f"{name:24} {median:8.0f} samples/s ({spread}), ours is {reference / median:.2f} x")


if __name__ == "__main__":
    main()

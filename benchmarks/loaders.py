"""The loaders that are compared: each yields endless batches of (uint8 images [B, 3, H, W], labels) of one image set.

`skip` is how many batches of the first epoch are passed over, as on resume: by the loader's own means where it has
some (ours: the position; MosaicML Streaming: its state), else by reading and dropping them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from megapix.config import BatchLayout, DataConfig
from megapix.data.loader import batches
from megapix.data.locate import locate

BATCH = 32


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W], as ours."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1)))


def ours(root: Path, workers: int, skip: int) -> Iterator[Any]:
    """Our loader over the shards."""
    config = DataConfig(path=str(root / "shards"), workers=workers)
    return batches(config, locate(config), 0, BatchLayout(BATCH, 1, 1), 0, skip * BATCH, ())


def stock(root: Path, workers: int, skip: int) -> Iterator[Any]:
    """A stock webdataset pipeline: shuffle buffer of 1,000 samples, every member of a sample read."""
    urls = sorted(str(path) for path in (root / "shards").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=False, resampled=True).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(to_tensor, lambda x: x).batched(BATCH, partial=False)
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
    return islice(loader, skip, None)


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


def folder(root: Path, workers: int, skip: int) -> Iterator[Any]:
    """torch's DataLoader over files, shuffled."""
    loader = DataLoader(
        Folder(root / "folder"),
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )

    def forever() -> Iterable[Any]:
        while True:
            yield from loader

    return islice(iter(forever()), skip, None)


def mosaic(root: Path, workers: int, skip: int) -> Iterator[Any]:
    """MosaicML Streaming over the same JPEG bytes in its MDS format, resumed by its state."""
    without_torchvision()
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return to_tensor(sample["image"]), sample["label"]

    data = Decoded(local=str(root / "mds"), shuffle=True, batch_size=BATCH, shuffle_seed=0)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, drop_last=True)
    if skip:
        state = data.state_dict(skip * BATCH, from_beginning=True)
        data.load_state_dict({**state, "epoch": 0, "sample_in_epoch": skip * BATCH})

    def forever() -> Iterable[Any]:
        while True:
            yield from loader

    return iter(forever())


def without_torchvision() -> None:
    """Streaming imports torchvision for its vision data sets, which are not used here; a CPU torch may not have it."""
    import transformers  # noqa: F401  # looks for torchvision itself, so it comes first

    if importlib.util.find_spec("torchvision") is not None:
        return
    names = {
        "torchvision": [],
        "torchvision.datasets": ["VisionDataset", "ImageFolder", "CIFAR10"],
        "torchvision.transforms": ["ToTensor"],
        "torchvision.transforms.functional": ["to_tensor"],
    }
    for name, classes in names.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for one in classes:
            setattr(module, one, type(one, (), {}))
        sys.modules[name] = module


LOADERS = {"ours": ours, "stock webdataset": stock, "DataLoader over files": folder}
if importlib.util.find_spec("streaming") is not None:
    LOADERS["MosaicML Streaming"] = mosaic

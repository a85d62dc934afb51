"""What lies in shards, read without the loader."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megapix.shards.index import read_index


def stored(shards: Path) -> list[tuple[Tensor, int]]:
    """Image, uint8 [3, H, W], and label of every sample, in the order of the index."""
    images, labels = [], []
    for entry in read_index(shards).shards:
        with tarfile.open(shards / entry.name) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file
                if member.name.endswith(".png"):
                    images.append(torch.from_numpy(np.array(Image.open(io.BytesIO(file.read())))).permute(2, 0, 1))
                elif member.name.endswith(".cls"):
                    labels.append(int(file.read()))
    return list(zip(images, labels, strict=True))

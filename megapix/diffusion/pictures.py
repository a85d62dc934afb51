"""From samples to pictures: uint8 pixels, grids, and PNG files that say what they show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapix.errors import InputError
from megapix.files import write_atomic

METADATA = "megapix"
"""Text chunk of a PNG with its metadata: weights, class or prompt, seed, sampling options."""


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3] on the CPU, rounded to the nearest."""
    pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lay uint8 images [B, H, W, 3] out row by row on white: uint8 [rows·(H+gap)+gap, columns·(W+gap)+gap, 3]."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: Path, image: np.ndarray, zoom: int = 1, about: Mapping[str, Any] | None = None) -> None:
    """Write a uint8 image [H, W, 3] as PNG, each pixel `zoom` × `zoom`; the file appears whole or not at all.

    Args:
        about: its metadata, as JSON in the text chunk METADATA.

    Raises:
        InputError: the file cannot be written.
    """
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    png, chunks = io.BytesIO(), PngInfo()
    if about is not None:
        chunks.add_itxt(METADATA, json.dumps(about, ensure_ascii=False))
    Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1)).save(png, format="PNG", pnginfo=chunks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, png.getvalue())
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error

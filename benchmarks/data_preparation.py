"""Images per second of one core that goes through preparation's rendering: decode, resize, encode.

    python -m benchmarks.data_preparation [--size 256]

The same JPEG pictures, one thread, five rounds in turn. Compared are our exact and fast modes, a plain Pillow pipeline
(decode, bicubic, centre crop, save), EDM2's recipe (its dataset tool: ADM's crop with Pillow, PNG without compression),
and, where OpenCV is installed, what img2dataset's resizer does (OpenCV: decode, area interpolation, JPEG).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks.photos import jpegs
from data_prep.writing.encode import Format, encode
from megapix.shards.image_policy import Policy

COUNT, REPEATS = 60, 5


def ours(data: bytes, policy: Policy, extension: Format) -> bytes:
    """What `data_prep write` does with an image."""
    return encode(policy.render(data, 0).pixels, extension, 95)


def plain(data: bytes, size: int, kind: str) -> bytes:
    """Pillow as one would write it down: bicubic to the shorter side, cut, saved with its defaults (JPEG: 95)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    out = io.BytesIO()
    image.crop((left, top, left + size, top + size)).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def edm2(data: bytes, size: int) -> bytes:
    """ADM's crop with Pillow, saved as PNG without compression."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    out = io.BytesIO()
    image.crop((left, top, left + size, top + size)).save(out, "PNG", compress_level=0, optimize=False)
    return out.getvalue()


def opencv(data: bytes, size: int) -> bytes:
    """OpenCV: decode, area interpolation to the shorter side, cut, JPEG 95."""
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    scale = size / min(image.shape[:2])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    encoded = cv2.imencode(".jpg", image[top : top + size, left : left + size], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return bytes(encoded)


def main() -> None:
    """Print a table for each output format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    size = parser.parse_args().size
    torch.set_num_threads(1)
    exact, fast = Policy.make("crop", size), Policy.make("crop", size, resize="fast")
    ways: dict[str, Callable[[bytes], bytes]] = {
        "png: ours, fast": lambda data: ours(data, fast, "png"),
        "png: ours, exact": lambda data: ours(data, exact, "png"),
        "png: plain Pillow": lambda data: plain(data, size, "PNG"),
        "png: EDM2's recipe": lambda data: edm2(data, size),
        "jpg: ours, fast": lambda data: ours(data, fast, "jpg"),
        "jpg: ours, exact": lambda data: ours(data, exact, "jpg"),
        "jpg: plain Pillow": lambda data: plain(data, size, "JPEG"),
    }
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        ways["jpg: img2dataset's resizer (OpenCV)"] = lambda data: opencv(data, size)
    pictures = jpegs(COUNT)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {name: sum(len(way(data)) for data in pictures) / COUNT for name, way in ways.items()}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            for data in pictures:
                way(data)
            rates[name].append(COUNT / (time.perf_counter() - start))
    print(f"{COUNT} JPEG pictures of {sum(map(len, pictures)) / COUNT / 1e3:.0f} kB, to {size} pixels, one thread")
    for name, values in rates.items():
        reference = statistics.median(rates[f"{name[:3]}: plain Pillow"])
        median = statistics.median(values)
        print(
            f"{name:36} {median:7.1f} images/s ({min(values):.0f}-{max(values):.0f}), {median / reference:.2f} x plain "
            f"Pillow, {sizes[name] / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()

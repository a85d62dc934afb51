"""Libraries that decode JPEG, beside Pillow: CPU time of an image, and whether their pixels are Pillow's bit for bit.

    python -m benchmarks.decode_backends [--rounds 7]

Those that are installed take turns on the same pictures, each on one thread, from bytes to uint8 [H, W, 3]; times are
medians of the rounds. Pixels are compared on odd sizes, as they are stored in every usual way.

Only a library that gives Pillow's pixels may be chosen by itself (`megapix.shards.pixels`): with another one, what a
run sees would depend on what happens to be installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.photos import jpegs, photo
from megapix.shards.pixels import Pixels

Decode = Callable[[bytes], Pixels]
STORED: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {},
}
SMALL, LARGE = 24, 2
"""Pictures of ImageNet's sizes and of 12 megapixels."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 7


def pillow(_module: Any) -> Decode:
    """The reference."""
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def simplejpeg(module: Any) -> Decode:
    """libjpeg-turbo of its own, with nothing but what TurboJPEG needs."""
    return lambda data: module.decode_jpeg(data, "RGB")


def turbojpeg(module: Any) -> Decode:
    """PyTurboJPEG over the system's libturbojpeg."""
    library = module.TurboJPEG()
    return lambda data: library.decode(data, pixel_format=module.TJPF_RGB)


def opencv(module: Any) -> Decode:
    """OpenCV, whose channels are turned round."""
    module.setNumThreads(1)
    return lambda data: module.cvtColor(
        module.imdecode(np.frombuffer(data, np.uint8), module.IMREAD_COLOR), module.COLOR_BGR2RGB
    )


def imagecodecs(module: Any) -> Decode:
    """imagecodecs over libjpeg-turbo."""
    return lambda data: module.jpeg8_decode(data, outcolorspace="rgb")


def pyvips(module: Any) -> Decode:
    """libvips."""
    return lambda data: module.Image.new_from_buffer(data, "").colourspace("srgb").numpy()


def torchvision(module: Any) -> Decode:
    """torchvision over libjpeg-turbo."""
    torch, image = importlib.import_module("torch"), importlib.import_module(f"{module.__name__}.io")
    torch.set_num_threads(1)
    return lambda data: (
        image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), image.ImageReadMode.RGB)
        .permute(1, 2, 0)
        .numpy()
    )


BACKENDS: dict[str, tuple[str, Callable[[Any], Decode]]] = {
    "Pillow": ("PIL", pillow),
    "simplejpeg": ("simplejpeg", simplejpeg),
    "PyTurboJPEG": ("turbojpeg", turbojpeg),
    "opencv-python-headless": ("cv2", opencv),
    "imagecodecs": ("imagecodecs", imagecodecs),
    "pyvips": ("pyvips", pyvips),
    "torchvision": ("torchvision", torchvision),
}
"""Name of the package -> its module, and what makes a decoder of it."""


def installed() -> dict[str, Decode]:
    """The decoders that this machine has; of each other one a line says what is missing."""
    found = {}
    for name, (module, make) in BACKENDS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed")
            continue
        try:
            found[name] = make(importlib.import_module(module))
        except (ImportError, OSError, RuntimeError) as error:  # the C library that it needs
            print(f"{name}: cannot be used: {str(error).splitlines()[0]}")
    return found


def differences(decode: Decode, reference: Decode) -> str:
    """'Pillow's', or how far the pixels are from Pillow's and how they were stored where they are."""
    largest, means, where = 0, [], []
    for seed, (stored, options) in enumerate(STORED.items()):
        for shape in ((97, 131), (333, 500), (601, 801)):
            out, picture = io.BytesIO(), photo(*shape, seed)
            (picture.convert("L") if stored == "grey" else picture).save(out, "JPEG", quality=92, **options)
            apart = np.abs(decode(out.getvalue()).astype(int) - reference(out.getvalue()))
            largest, means = max(largest, int(apart.max())), [*means, float(apart.mean())]
            if apart.any() and stored not in where:
                where.append(stored)
    if not where:
        return "Pillow's"
    return f"apart by {largest} at most, {np.mean(means):.4f} on average ({', '.join(where)})"


def timed(decoders: dict[str, Decode], pictures: list[bytes], rounds: int) -> dict[str, float]:
    """CPU milliseconds of an image: medians of rounds by turns."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            start = time.process_time()
            for data in pictures:
                decode(data)
            times[name].append((time.process_time() - start) / len(pictures) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Print the table."""
    options = tyro.cli(Options)
    decoders = installed()
    large = []
    for seed in range(LARGE):
        out = io.BytesIO()
        photo(3000, 4000, seed).save(out, "JPEG", quality=92)
        large.append(out.getvalue())
    small_ms, large_ms = (timed(decoders, pictures, options.rounds) for pictures in (jpegs(SMALL), large))
    print("| package | release | ImageNet's sizes, CPU ms | of Pillow | 12 megapixels, CPU ms | of Pillow | pixels |")
    print("|---|---|---|---|---|---|---|")
    for name, decode in decoders.items():
        shares = [ms[name] / ms["Pillow"] for ms in (small_ms, large_ms)]
        print(
            f"| {name} | {importlib.metadata.version(name)} | {small_ms[name]:.2f} | {shares[0]:.2f} | "
            f"{large_ms[name]:.1f} | {shares[1]:.2f} | {differences(decode, decoders['Pillow'])} |"
        )


if __name__ == "__main__":
    main()

"""Decoded samples per second, time to the first batch, and time to the first batch of a resume at 90 % of an epoch.

    python -m benchmarks.data_loading [--size 256] [--workers 1] [--images 2000]

The same JPEG images, the same batch size and number of worker processes, uint8 tensors out: our loader, stock
webdataset, torch's DataLoader over an image folder, and MosaicML Streaming where it is installed
(benchmarks/loaders.py). Every figure comes from a process of its own, five for each loader, in turn; times begin before
the loader is made and after its libraries are imported. The table gives medians.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.loaders import BATCH, LOADERS, without_torchvision
from benchmarks.photos import photo

REPEATS = 5
CLASSES = 10


def make(root: Path, size: int, images: int) -> None:
    """Shards, an image folder and, where Streaming is installed, MDS files of the same JPEG bytes."""
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.writing.plan import Options
    from data_prep.writing.write import write
    from megapix.shards.image_policy import Policy

    pictures = []
    for number in range(images):
        out = io.BytesIO()
        photo(size, size, number).save(out, "JPEG", quality=92)
        pictures.append(out.getvalue())
        folder = root / "folder" / str(number % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:06d}.jpg").write_bytes(out.getvalue())
    # The policy finds nothing to do; untouched bytes need no second JPEG generation, so the images are really the same.
    source, options = ImageFolder.open(root / "folder"), Options(Policy.make("untouched", 0), "original", 95, 200)
    write(source, root / "raw", options, workers=2, progress=False)
    _as_prepared(root / "raw", root / "shards", size)
    if "MosaicML Streaming" in LOADERS:
        without_torchvision()
        from streaming import MDSWriter

        with MDSWriter(out=str(root / "mds"), columns={"image": "jpeg", "label": "int"}) as writer:
            for number, data in enumerate(pictures):
                writer.write({"image": Image.open(io.BytesIO(data)), "label": number % CLASSES})


def _as_prepared(raw: Path, out: Path, size: int) -> None:
    """The same shards, with an index that says what is true of these: every image has the size already."""
    raw.rename(out)
    index = json.loads((out / "index.json").read_text())
    index["image_policy"] |= {"mode": "crop", "size": size, "buckets": [[size, size]]}
    (out / "index.json").write_text(json.dumps(index))


def measure(name: str, root: Path, workers: int, count: int) -> dict[str, float]:
    """In a process of its own: seconds to the first batch, samples/s of the next epoch, seconds to resume at 90 %."""
    torch.set_num_threads(1)
    if name == "MosaicML Streaming":
        without_torchvision()
        import streaming  # noqa: F401
    start = time.perf_counter()
    loader = LOADERS[name](root, workers, 0)
    first = next(loader)
    to_first = time.perf_counter() - start
    assert (first[0] if isinstance(first, (tuple, list)) else first.images).shape[0] == BATCH
    for _ in range(count // 4):
        next(loader)
    start = time.perf_counter()
    for _ in range(count):
        next(loader)
    rate = count * BATCH / (time.perf_counter() - start)
    return {"first": to_first, "rate": rate}


def resume(name: str, root: Path, workers: int, count: int) -> dict[str, float]:
    """In a process of its own: seconds until the batch at 90 % of the epoch is there."""
    torch.set_num_threads(1)
    if name == "MosaicML Streaming":
        without_torchvision()
        import streaming  # noqa: F401
    start = time.perf_counter()
    next(LOADERS[name](root, workers, int(0.9 * count)))
    return {"resume": time.perf_counter() - start}


def main() -> None:
    """Print a table, or, as a child, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = options.images // BATCH
    if options.child:
        what, name, root = options.child
        print("\n" + json.dumps({"measure": measure, "resume": resume}[what](name, Path(root), options.workers, count)))
        return
    found: dict[str, dict[str, list[float]]] = {name: {"first": [], "rate": [], "resume": []} for name in LOADERS}
    with tempfile.TemporaryDirectory() as root:
        make(Path(root), options.size, options.images)
        for _ in range(REPEATS):
            for name in LOADERS:
                for what in ("measure", "resume"):
                    # Not -m: forkserver workers would import that module first, and torch with it.
                    command = [sys.executable, "-c", "from benchmarks.data_loading import main; main()"]
                    command += ["--child", what, name, root]
                    command += ["--workers", str(options.workers), "--images", str(options.images)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                        found[name][key].append(value)
    print(f"{options.size} pixels, {options.workers} workers, batches of {BATCH}, epochs of {count} batches")
    reference = statistics.median(found["ours"]["rate"])
    for name, values in found.items():
        first, rate, later = (np.median(values[key]) for key in ("first", "rate", "resume"))
        spread = f"{min(values['rate']):.0f}-{max(values['rate']):.0f}"
        print(
            f"{name:24} {rate:7.0f} samples/s ({spread}), ours is {reference / rate:.2f} x; "
            f"first batch {first:.2f} s, resume at 90 % {later:.2f} s"
        )


if __name__ == "__main__":
    main()

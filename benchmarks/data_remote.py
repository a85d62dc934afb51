"""Decoded samples per second from a web server that is far away, and the time to the first batch.

    python -m benchmarks.data_remote [--quick] [--latencies 0 30 100] [--workers 1 4] [--rounds 5] [--size 256]

The same JPEG images for all, the same decoder and number of worker processes, batches of 32, uint8 out:

    ours        byte ranges, a perfect shuffle of all samples
    ours cache  whole shards through the cache, which is empty at first; the same shuffle
    webdataset  the same tar files streamed: shards in random order, a shuffle buffer of 1,000 samples
    Streaming   MosaicML Streaming over MDS files of the same images, where it is installed; it reads s3:// and no
                http://, so nginx plays S3 for it

Each figure comes from a process of its own; every round goes once through all loaders. The table has medians and
quartiles of the rounds, what the server has sent, and CPU-seconds of the loader's processes (curl's too, which stock
webdataset starts). Where both cores are full, decoding decides: `--size 64` asks less of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 32
DISTINCT = 300
"""Different pictures; the samples are these again and again."""
SHARDS = 20
LOADERS = ("ours", "ours cache", "webdataset", "Streaming")


def make(root: Path, size: int, samples: int) -> None:
    """Shards, their index and, where Streaming is installed, MDS files of the same JPEG bytes."""
    from benchmarks.data_loading import _as_prepared
    from benchmarks.photos import photo
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.writing.plan import Options
    from data_prep.writing.write import write
    from megapix.shards.image_policy import Policy

    pictures = []
    for number in range(DISTINCT):
        out = io.BytesIO()
        photo(size, size, number).save(out, "JPEG", quality=92)
        pictures.append(out.getvalue())
    for number in range(samples):
        path = root / "folder" / str(number % 10) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        first = root / "folder" / str(number % DISTINCT % 10) / f"{number % DISTINCT:06d}.jpg"
        if number < DISTINCT:
            path.write_bytes(pictures[number])
        else:
            os.link(first, path)
    source, options = (
        ImageFolder.open(root / "folder"),
        Options(Policy.make("untouched", 0), "original", 95, samples // SHARDS),
    )
    write(source, root / "raw", options, workers=2, progress=False)
    _as_prepared(root / "raw", root / "shards", size)
    shutil.rmtree(root / "folder")
    if _streaming():
        from streaming import MDSWriter

        with MDSWriter(out=str(root / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
            for number in range(samples):
                writer.write({"image": pictures[number % DISTINCT], "label": number % 10})


def _streaming() -> bool:
    import importlib.util

    if importlib.util.find_spec("streaming") is None:
        return False
    from benchmarks.loaders import without_torchvision

    without_torchvision()
    return True


def decoded(data: bytes) -> Any:
    """uint8 [3, H, W]: the decoder of all loaders."""
    import numpy as np
    import torch

    from megapix.shards.pixels import decode

    return torch.from_numpy(np.ascontiguousarray(decode(data).transpose(2, 0, 1)))


def ours(url: str, workers: int, scratch: Path, cache_gib: float = 0.0) -> Iterator[Any]:
    """Our loader over the URL: its index is fetched first."""
    from megapix.config import BatchLayout, DataConfig
    from megapix.data.loader import batches
    from megapix.data.locate import locate

    config = DataConfig(path=f"{url}/shards", workers=workers, cache=str(scratch / "cache"), cache_gib=cache_gib)
    stream = batches(config, locate(config), 0, BatchLayout(BATCH, 1, 1), 0, 0, ())
    return (batch.images for batch in stream)


def cached(url: str, workers: int, scratch: Path) -> Iterator[Any]:
    """Through whole shards."""
    return ours(url, workers, scratch, 64.0)


def stock(url: str, workers: int, scratch: Path) -> Iterator[Any]:
    """A stock webdataset pipeline."""
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    names = json.loads((scratch / "names.json").read_text())
    urls = [f"{url}/shards/{name}" for name in names]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), nodesplitter=webdataset.split_by_node, seed=0)
    data = data.repeat().shuffle(1000).to_tuple("jpg", "cls").map_tuple(decoded, lambda x: x)
    data = data.batched(BATCH, collation_fn=lambda rows: torch.stack([image for image, _ in rows]), partial=False)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4))


def mosaic(url: str, workers: int, scratch: Path) -> Iterator[Any]:
    """MosaicML Streaming, its shuffle at its default."""
    os.environ |= {"S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    _streaming()
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            return decoded(super().__getitem__(at)["image"])

    data = Decoded(remote="s3://mds", local=str(scratch / "mds"), shuffle=True, batch_size=BATCH, shuffle_seed=0)
    return iter(StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, drop_last=True))


def measure(name: str, url: str, workers: int, scratch: Path, count: int) -> dict[str, float]:
    """In a process of its own: seconds to the first batch, samples/s of what follows, CPU-seconds per 1,000 samples."""
    import torch

    torch.set_num_threads(1)
    if name == "webdataset":
        import webdataset  # noqa: F401
    start = time.perf_counter()
    loader = {"ours": ours, "ours cache": cached, "webdataset": stock, "Streaming": mosaic}[name](url, workers, scratch)
    assert tuple(next(loader).shape[:2]) == (BATCH, 3)
    first = time.perf_counter() - start
    before, start = cpu(), time.perf_counter()
    for _ in range(count):
        next(loader)
    seconds = time.perf_counter() - start
    return {"first": first, "rate": count * BATCH / seconds, "cpu": (cpu() - before) / (count * BATCH) * 1e3}


def cpu() -> float:
    """CPU-seconds of all processes of this session, and of those that they have waited for."""
    import psutil

    total, session = 0.0, os.getsid(0)
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        except (psutil.Error, ProcessLookupError):
            continue
    return total


def child(name: str, url: str, workers: int, scratch: Path, count: int, size: int) -> dict[str, float]:
    """The figures of `measure`."""
    command = [sys.executable, "-m", "benchmarks.data_remote", "--child", name, url, str(workers), str(scratch)]
    command += [str(count), "--size", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table, or, as a child, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 samples, two rounds of 960")
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 30, 100], help="milliseconds")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--samples", type=int, default=0, help="of the data set")
    parser.add_argument("--measured", type=int, default=0, help="samples of one figure")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--data", type=Path, help="folder for the images, which is kept")
    parser.add_argument("--port", type=int, default=18_740)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, url, workers, scratch, count = options.child
        print("\n" + json.dumps(measure(name, url, int(workers), Path(scratch), int(count))), flush=True)
        os._exit(0)  # whatever a loader has left running
    samples = options.samples or (2_000 if options.quick else 20_000)
    rounds, count = options.rounds or (2 if options.quick else 5), options.measured or (960 if options.quick else 6_400)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or Path(temporary) / "data"
        if not (root / "shards" / "index.json").exists():
            make(root, options.size, samples)
        (Path(temporary) / "names.json").write_text(json.dumps(sorted(p.name for p in (root / "shards").glob("*.tar"))))
        names = [name for name in options.only if name != "Streaming" or (root / "mds").exists()]
        if "Streaming" in options.only and "Streaming" not in names:
            print("MosaicML Streaming is not installed (pip install mosaicml-streaming): left out")
        print(f"{samples:,} images of {options.size} pixels, batches of {BATCH}, {rounds} rounds of {count:,} samples")
        for latency in options.latencies:
            for workers in options.workers:
                compare(root, Path(temporary), names, latency, workers, rounds, count // BATCH, options)


def compare(
    root: Path, scratch: Path, names: list[str], latency: int, workers: int, rounds: int, count: int, options: Any
) -> None:
    """Print the rows of one latency and number of workers."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with far(root, scratch / "nginx", latency / 1e3, options.port) as server:
        for _ in range(rounds):
            for name in names:
                before = server.sent()
                row = child(name, server.url, workers, scratch, count, options.size)
                time.sleep(0.5)  # nginx writes a line when an answer has ended
                after = server.sent()
                found[name].append(row | {"requests": after[0] - before[0], "sent": after[1] - before[1]})
                for left in ("cache", "mds"):
                    shutil.rmtree(scratch / left, ignore_errors=True)
    reference = [row["rate"] for row in found.get("webdataset", [])]
    for name, rows in found.items():
        rates, middle = [row["rate"] for row in rows], {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (*rates, 0.0, *rates)
        ratio = statistics.median(a / b for a, b in zip(rates, reference, strict=True)) if reference else float("nan")
        print(
            f"{latency:3d} ms, {workers} workers  {name:10}  {middle['rate']:6.0f} samples/s ({low:.0f}-{high:.0f}), "
            f"{ratio:5.2f} x webdataset; first batch {middle['first']:5.2f} s; {middle['cpu']:5.2f} CPU-s per 1,000; "
            f"{middle['sent'] / 1e6:6.1f} MB in {middle['requests']:,.0f} requests",
            flush=True,
        )


if __name__ == "__main__":
    from benchmarks.latency import far

    main()

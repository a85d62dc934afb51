"""What an index of 10^6 to 10^8 samples costs a rank: opening, memory, seeking, a batch.

    python -m benchmarks.data_scale WORK [--samples 1000000 10000000 100000000] [--per-tar 1000] [--ranks 8]

It writes one and reads it for real: shards.bin and samples.bin are whole and valid; the tar files are sparse, their
images zeros, so that they take no room, and a batch is what the index costs and a read of each sample, undecoded.
Numbers are of processes of their own, which import, open and read as a loader's worker does, the worst of them; memory
is private (smaps_rollup), beyond that of the imports.

    first     the first opening on a node: hashes, every record, the size of each tar file
    opened    a later one, by its stamp
    memory    then, with the orders of two epochs
    seek      the samples of 256 positions of an epoch that was not looked at yet; again: of the same one
    batch     256 samples found and read, at random
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

SIZE, STRIDE, BATCH = 1000, 2048, 256
BLOCK = 1 << 20
RANK = """
import json, os, sys, time
import numpy as np
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.order import Order
from megapix.data.read import ShardReader

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000

before, config = private(), DataConfig(path=sys.argv[1], image_size=8)
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
located = locate(config)
found = {"open": time.perf_counter() - start}
order, reader = Order(0, located.index.shards, 0, 1, 256), ShardReader(located, config)
positions = np.arange(256)
for name, epoch in (("seek", 5), ("again", 5), ("next", 6)):
    start = time.perf_counter()
    samples = order.at(positions + epoch * located.index.samples + 12345)
    found[name] = time.perf_counter() - start
start = time.perf_counter()
for sample in order.at(positions + 5 * located.index.samples + 54321).tolist():
    reader.read(sample)
found["batch"] = time.perf_counter() - start
found["memory"] = private() - before
print(json.dumps(found))
"""


def make(folder: Path, samples: int, per_tar: int) -> None:
    """An index of that many samples, with its tar files."""
    from megapix.shards.image_policy import Policy
    from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME, ClassEntry, Index, shard_name, write_index
    from megapix.shards.table import DTYPE
    from megapix.shards.tables.entries import ENTRY, Shards, TarFile

    folder.mkdir(parents=True)
    tars, size = samples // per_tar, 512 + per_tar * STRIDE
    for number in range(tars):
        with open(folder / shard_name(number), "wb") as file:
            file.truncate(size)
    digest = hashlib.sha256()
    with open(folder / TABLE_NAME, "wb") as file:
        for start in range(0, samples, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, samples))
            block = np.zeros(len(numbers), DTYPE)
            block["shard"], block["offset"] = numbers // per_tar, 512 + numbers % per_tar * STRIDE
            block["size"], block["crc"] = SIZE, zlib.crc32(bytes(SIZE))
            digest.update(block.tobytes())
            file.write(block.tobytes())
    (folder / CAPTIONS_NAME).write_bytes(b"")
    entries = np.zeros(tars, ENTRY)
    entries["samples"], entries["file"] = per_tar, np.arange(tars)
    hashes = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(tars))
    files = [TarFile(shard_name(number), size, sha256) for number, sha256 in enumerate(hashes)]
    policy = Policy.make("crop", 8).to_dict() | {"applied": "loading"}
    nothing = hashlib.sha256(b"").hexdigest()
    classes = (ClassEntry("images", samples),)
    shards = Shards.made_of(files, entries)
    write_index(folder, Index(samples, "", classes, shards, digest.hexdigest(), nothing, policy, {}, 0))
    for path in folder.glob("*.bin"):
        os.utime(path, (0, 0))
    os.utime(folder, (0, 0))


def ranks(folder: Path, cache: Path, count: int) -> dict[str, float]:
    """The worst of each number of so many ranks that begin together."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", RANK, str(folder)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    for one in started:
        assert one.stdout is not None
        one.stdout.readline()
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    found = [json.loads(one.communicate()[0]) for one in started]
    return {name: max(one[name] for one in found) for name in found[0]}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_scale", description=__doc__)
    parser.add_argument("work", type=Path, help="folder to write to; what is made there is removed")
    parser.add_argument("--samples", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--per-tar", type=int, default=1000, help="samples of a tar file")
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    print(
        "| samples | tar files | ranks | first, s | opened, s | memory, MB | seek, ms | again, ms | batch, ms |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for samples in options.samples:
        folder = options.work / str(samples)
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, samples, options.per_tar)
        for count in sorted({1, options.ranks}):
            cache = options.work / f"cache-{samples}-{count}"
            first, later = ranks(folder, cache, count), ranks(folder, cache, count)
            numbers = (f"{later[name] * 1e3:.1f}" for name in ("seek", "again", "batch"))
            shown = [f"{first['open']:.2f}", f"{later['open']:.3f}", f"{later['memory']:.0f}", *numbers]
            print(f"| {samples:,} | {samples // options.per_tar:,} | {count} | {' | '.join(shown)} |", flush=True)
            shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

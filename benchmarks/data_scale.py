"""What an index of 10^6 to 10^8 samples costs a rank: opening, memory, seeking, a batch.

    python -m benchmarks.data_scale WORK [--samples 1000000 10000000 100000000] [--per-tar 1000] [--ranks 8]
    python -m benchmarks.data_scale WORK --features 10000 100000 1000000

It writes one and reads it for real: shards.bin and samples.bin are whole and valid; the tar files are sparse, their
images zeros, so that they take no room, and a batch is what the index costs and a read of each sample, undecoded.
Numbers are of processes of their own, which import, open and read as a loader's worker does, the worst of them; memory
is private (smaps_rollup), beyond that of the imports.

    first     the first opening on a node: hashes, every record, the size of each tar file
    opened    a later one, by its stamp
    memory    then, with the orders of two epochs
    seek      the samples of 256 positions of an epoch that was not looked at yet; again: of the same one
    batch     256 samples found and read, at random

With --features it opens text features in so many files instead, one caption each, on one rank: with the table of
version 2 of their manifest, and as version 1 lists them. Seconds are of CPU time. Of more than 100,000 files only those
that are read are there, with a stamp that says all of them are.
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
from dataclasses import replace
from pathlib import Path

import numpy as np

WHOLE = 100_000
"""Files of features that are all made."""
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


FEATURES_RANK = """
import json, sys, time
from pathlib import Path
from megapix.shards.index import read_index
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import read_text_features

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000

folder, before, found = Path(sys.argv[1]), private(), {}

def timed(name, work):
    start = time.process_time()
    done = work()
    found[name] = time.process_time() - start
    return done

index = timed("index", lambda: read_index(folder))
features = timed("open", lambda: read_text_features(folder, index))
reader, (first, *rest) = TextFeatureReader(features), map(int, sys.argv[2:])
timed("seek", lambda: reader.read(first, 0))
timed("batch", lambda: [reader.read(sample, 0) for sample in rest])
found["memory"] = private() - before
print(json.dumps(found))
"""


STAMP = """
import sys
from pathlib import Path
from megapix.shards import feature_file
from megapix.shards.index import read_index
from megapix.shards.text_features import listed_text_features
feature_file.faults = lambda *_: []
feature_file.check_files(listed_text_features(Path(sys.argv[1]), (index := read_index(sys.argv[1]))), index)
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


def make_features(folder: Path, files: int) -> None:
    """An index of that many tar files, which are not there, with features of one caption for each."""
    from megapix.shards.index import ClassEntry, Index
    from megapix.shards.tables.entries import ENTRY, Shards, TarFile
    from megapix.shards.tables.files import Files, file_name
    from megapix.shards.text_features import (
        EMPTY_NAME,
        KIND,
        Row,
        TextFeatures,
        TextFile,
        header,
        origin_of,
        write_file,
        write_manifest,
    )
    from megapix.shards.text_recipe import Recipe

    folder.mkdir(parents=True)
    entries, nothing = np.ones(files, ENTRY), hashlib.sha256(b"").hexdigest()
    entries["file"], entries["bucket"] = np.arange(files), 0
    shards = Shards.made_of([TarFile(f"{number:06d}.tar", 1, nothing) for number in range(files)], entries)
    policy = {"applied": "loading", "buckets": [[8, 8]]}
    index = Index(files, "", (ClassEntry("images", files),), shards, nothing, nothing, policy, {}, 0)
    recipe = Recipe(digest=nothing, width=64, max_tokens=8, normalize="none", scale=1.0, prefix="", dtype="bf16")
    empty = write_file(folder, recipe, index.digest, EMPTY_NAME, [1], [Row(np.zeros((8, 64), np.int16), False)])
    rest = (folder / EMPTY_NAME).read_bytes()[len(header(recipe, index.digest, empty)) :]
    for number in range(files) if files <= WHOLE else read_of(files):
        file = TextFile(file_name("text", number), *empty[1:])
        (folder / file.name).write_bytes(header(recipe, index.digest, file) + rest)
    counts = [np.full(files, count) for count in empty[1:]]
    table = Files.made_of(KIND, origin_of(recipe, index.digest), counts)
    write_manifest(TextFeatures(folder, "encoder", recipe, index.digest, table, empty), index)


def list_files(folder: Path) -> None:
    """Write what the index says of the features as version 1 did."""
    from megapix.shards.index import read_index, write_index
    from megapix.shards.text_features import listed_text_features

    index = read_index(folder)
    features = listed_text_features(folder, index)
    assert features is not None
    size = features.bytes_of(features.files[0])
    listed = [{**file._asdict(), "bytes": size} for file in features.files]
    write_index(folder, replace(index, text={**(index.text or {}), "version": 1, "files": listed}))


def read_of(files: int) -> list[int]:
    """The files that are read, one in each 257th."""
    return [files * n // 257 + n % 3 for n in range(257)]


def opened(folder: Path, cache: Path, files: int) -> str:
    """What the first and a later opening take, and bytes of the manifest."""
    for path in (folder, *folder.glob("*.bin")):
        os.utime(path, (0, 0))
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", FEATURES_RANK, str(folder), *map(str, read_of(files))]
    if files > WHOLE:
        subprocess.run([sys.executable, "-c", STAMP, str(folder)], env=environment, check=True)
    first, later = (json.loads(subprocess.check_output(command, env=environment)) for _ in range(2))
    shutil.rmtree(cache, ignore_errors=True)
    times = ["" if files > WHOLE else f"{first['open']:.2f}", f"{later['index'] + later['open']:.3f}"]
    memory = [f"{(folder / 'index.json').stat().st_size / 1e6:.2f}", f"{later['memory']:.1f}"]
    return " | ".join([memory[0], *times, memory[1], f"{later['seek'] * 1e3:.1f}", f"{later['batch'] * 1e3:.1f}"])


def open_features(work: Path, counts: list[int]) -> None:
    """Print a table of features in so many files."""
    print("| files | manifest | MB of JSON | first, s | opened, s | memory, MB | a caption, ms | 256, ms |", flush=True)
    print("|---|---|---|---|---|---|---|---|")
    for files in counts:
        folder = work / f"features-{files}"
        shutil.rmtree(folder, ignore_errors=True)
        make_features(folder, files)
        print(f"| {files:,} | a table | {opened(folder, work / 'cache', files)} |", flush=True)
        list_files(folder)
        print(f"| {files:,} | a list | {opened(folder, work / 'cache', files)} |", flush=True)
        shutil.rmtree(folder)


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
    parser.add_argument("--features", type=int, nargs="+", help="files of text features, to open those instead")
    options = parser.parse_args()
    if options.features:
        open_features(options.work, options.features)
        return
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

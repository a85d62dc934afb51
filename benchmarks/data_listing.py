"""Samples per second that `data_prep` lists from tar files before it writes, and again when it is restarted.

    python -m benchmarks.data_listing WORK [--tars 400] [--workers 1 2]

One tar file of 1,000 samples stands in WORK under so many names (hard links, so that it takes no room): an image of
20 kB with its class number, or with a caption and img2dataset's JSON. Each row is a process of its own:

    listed    nothing is known yet; --workers processes
    kept      the same command again: every list is there, and checked against its tar file's size and time
    memory    resident memory beyond that of the imports, with all samples listed

Seconds are of the wall clock, processes started and all.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SAMPLES, IMAGE = 1000, 20_000
LIST = """
import json, sys, time
from pathlib import Path
from data_prep.listing.reading import Reading
from data_prep.sources.shards import Shards

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if __name__ == "__main__":
    before, start = resident(), time.perf_counter()
    source = Shards.open(Path(sys.argv[1]), Reading(lists=Path(sys.argv[2]), workers=int(sys.argv[3])))
    count = len(source.items)
    print(json.dumps({"samples": count, "seconds": time.perf_counter() - start, "bytes": resident() - before}))
"""


def members(kind: str, number: int) -> dict[str, bytes]:
    """Extension -> bytes of a sample."""
    image = bytes([0xFF, 0xD8]) + bytes(IMAGE)
    if kind == "classes":
        return {"cls": str(number).encode(), "jpg": image}
    caption = f"a photograph of thing number {number} on a table, in the evening light"
    about = {"caption": caption, "url": f"https://host/{number}.jpg", "key": f"{number:09d}", "status": "success"}
    about |= {"width": 256, "height": 256, "original_width": 1024, "original_height": 768, "sha256": "0" * 64}
    return {"jpg": image, "txt": caption.encode(), "json": json.dumps(about).encode()}


def make(folder: Path, kind: str, tars: int) -> None:
    """Tar files of samples of that kind: one file under many names."""
    folder.mkdir(parents=True)
    first = folder / "00000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SAMPLES):
            for extension, data in members(kind, number).items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for number in range(1, tars):
        os.link(first, folder / f"{number:05d}.tar")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tars", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    program = options.work / "list_them.py"
    options.work.mkdir(parents=True, exist_ok=True)
    program.write_text(LIST)
    print("| samples | workers | listed, samples/s | kept, samples/s | memory, MB per million |\n|---|---|---|---|---|")
    for kind in ("classes", "captions"):
        folder, lists = options.work / kind, options.work / f"{kind}-out" / ".lists"
        make(folder, kind, options.tars)
        for workers in options.workers:
            rates = list[str]()
            for _ in range(2):
                command = [sys.executable, str(program), str(folder), str(lists), str(workers)]
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
                )
                found = json.loads(done.stdout)
                rates.append(f"{found['samples'] / found['seconds']:,.0f}")
            memory = found["bytes"] / found["samples"]
            print(f"| {found['samples']:,} with {kind} | {workers} | {' | '.join(rates)} | {memory:.0f} |", flush=True)
            shutil.rmtree(lists.parent)
        shutil.rmtree(folder)
    program.unlink()


if __name__ == "__main__":
    main()

"""Damaged and hostile images: does the decoder always answer, in time and within its memory?

    python -m benchmarks.fuzz_images [--each 20000] [--seed 0] [--kinds png,jpg] [--minutes M]

Makes files of each kind that is read, mutates them (bits and bytes, numbers, pieces doubled, left out, cut and spliced
with other files, also of other kinds), and gives each to `megapix.shards.pixels` in another process, so that a crash is
seen. Each file must be decoded or be a ValueError within SECONDS; what is decoded has the size that its header was read
to have; JPEG comes out as Pillow has it; and the process stays below MEMORY. Files are a function of seed, kind and
number: the number of a faulty one is printed, and `--only NUMBER` looks at it again and writes it to a file.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from benchmarks.photos import photo
from megapix.shards import pixels
from megapix.shards.decoding.formats import FORMATS, decoding

SECONDS = 20.0
"""In which a file must be answered."""
MEMORY = 3 << 30
"""Bytes of a process at most: seven copies of the largest image that is not refused, 89 million pixels."""
LARGE = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Numbers at which programs go wrong."""


class Fault(NamedTuple):
    """A file that was not answered as it should."""

    kind: str
    number: int
    what: str


def originals(kind: str) -> list[bytes]:
    """Small files of a kind, of as many sorts as Pillow (or the plug-in) writes."""
    return list(_originals(kind))


@lru_cache(maxsize=1)
def _everything() -> tuple[bytes, ...]:
    return tuple(data for kind in kinds_here() for data in _originals(kind))


@cache
def _originals(kind: str) -> tuple[bytes, ...]:
    image = photo(37, 53, 0)
    exif, grey = Image.Exif(), image.convert("L")
    exif[0x0112] = 6
    about: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": _profile()}
    frames = {"save_all": True, "append_images": [photo(37, 53, 1)]}
    clear = image.convert("RGBA")
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>', zip=True)
    text.add_text("comment", "x" * 300, zip=True)
    with_palette = image.quantize(16)
    sorts: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "png": [
            (image, about),
            (clear, {"pnginfo": text}),
            (with_palette, {"transparency": 3}),
            (deep, {}),
            (image, frames),
            (image.convert("1"), {}),
        ],
        "jpg": [
            (image, about),
            (image, {"progressive": True}),
            (image, {"subsampling": 0, "restart_marker_blocks": 2}),
            (grey, {}),
            (image.convert("CMYK"), {}),
            (image, {"xmp": b'<x tiff:Orientation="5"/>', "keep_rgb": True}),
        ],
        "webp": [(image, about), (clear, {"lossless": True}), (image, {"lossless": True, **frames})],
        "gif": [(with_palette, {}), (with_palette, {"transparency": 1}), (image, frames)],
        "bmp": [(image, {}), (grey, {}), (with_palette, {}), (clear, {}), (image.convert("1"), {})],
        "tif": [
            (image, {"tiffinfo": {0x0112: 7}, "icc_profile": _profile()}),
            *((image, {"compression": f"tiff_{name}"}) for name in ("lzw", "adobe_deflate", "jpeg")),
            (image.convert("1"), {"compression": "group4"}),
            (deep, {}),
            (grey.convert("F").point(lambda value: value / 255), {}),
            (image.convert("CMYK"), {}),
            (clear, {}),
            (image, frames),
        ],
        "avif": [(image, about), (clear, {}), (image, frames)],
        "jp2": [(image, {}), (clear, {}), (grey, {"no_jp2": True}), (deep, {}), (image, {"tile_size": (16, 16)})],
        "heic": [(image, about), (clear, {})],
        "jxl": [(image, about), (clear, {"lossless": True}), (grey, {"use_container": True})],
    }
    made = []
    with decoding():
        if kind == "heic":
            import pillow_heif

            pillow_heif.register_heif_opener()
        if kind == "jxl":
            import pillow_jxl  # noqa: F401
        for picture, options in sorts[kind]:
            out = io.BytesIO()
            picture.save(out, FORMATS[kind], **options)
            made.append(out.getvalue())
    return tuple(made)


def _profile() -> bytes:
    """A profile that asks for a conversion: littlecms's own of sRGB with a gamma of 1.5 instead of 2.4."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"\x00\x02\x66\x66", b"\x00\x01\x80\x00")


# ---------------------------------------------------------------------------------------------------------------------
# Mutations
# ---------------------------------------------------------------------------------------------------------------------

Look = Callable[[bytes], tuple[bool, str]]
Make = Callable[[str, int, int], bytes]
Mutation = Callable[[bytearray, np.random.Generator], bytearray]


def _piece(data: bytearray, generator: np.random.Generator, longest: int = 200) -> tuple[int, int]:
    start = int(generator.integers(len(data)))
    return start, min(len(data), start + 1 + int(generator.integers(longest)))


def _place(data: bytearray, generator: np.random.Generator) -> int:
    """Half of them in the first 200 bytes, where headers are."""
    end = min(len(data), 200) if generator.random() < 0.5 else len(data)
    return int(generator.integers(end))


def _bits(data: bytearray, generator: np.random.Generator) -> bytearray:
    for _ in range(1 + int(generator.integers(8))):
        data[_place(data, generator)] ^= 1 << int(generator.integers(8))
    return data


def _bytes(data: bytearray, generator: np.random.Generator) -> bytearray:
    for _ in range(1 + int(generator.integers(8))):
        data[_place(data, generator)] = int(generator.integers(256))
    return data


def _numbers(data: bytearray, generator: np.random.Generator) -> bytearray:
    at, width = _place(data, generator), int(generator.choice((1, 2, 4)))
    value = int(generator.choice(LARGE)) & (256**width - 1)
    order: Any = "little" if generator.random() < 0.5 else "big"
    data[at : at + width] = value.to_bytes(width, order)
    return data


def _cut(data: bytearray, generator: np.random.Generator) -> bytearray:
    return data[: int(generator.integers(len(data)))]


def _doubled(data: bytearray, generator: np.random.Generator) -> bytearray:
    start, stop = _piece(data, generator)
    return data[:stop] + data[start:stop] * (1 + int(generator.integers(3))) + data[stop:]


def _left_out(data: bytearray, generator: np.random.Generator) -> bytearray:
    start, stop = _piece(data, generator)
    return data[:start] + data[stop:]


def _spliced(data: bytearray, generator: np.random.Generator) -> bytearray:
    other = _everything()[int(generator.integers(len(_everything())))]
    if generator.random() < 0.5:
        return data[: int(generator.integers(len(data)))] + other[int(generator.integers(len(other))) :]
    start, stop = _piece(data, generator)
    at = int(generator.integers(len(other)))
    return data[:start] + other[at : at + stop - start] + data[stop:]


MUTATIONS: tuple[Mutation, ...] = (_bits, _bytes, _numbers, _cut, _doubled, _left_out, _spliced)


def mutated(kind: str, number: int, seed: int) -> bytes:
    """File `number` of a kind: one to three mutations of one of its originals."""
    generator = np.random.default_rng([seed, list(FORMATS).index(kind), number])
    sorts = _originals(kind)
    whole = mutation_of(sorts[int(generator.integers(len(sorts)))], generator)
    return _with_checksums(whole) if kind == "png" and generator.random() < 0.7 else whole


def mutation_of(original: bytes, generator: np.random.Generator) -> bytes:
    """One to three mutations of some bytes."""
    data = bytearray(original)
    for _ in range(1 + int(generator.integers(3))):
        if data:
            data = MUTATIONS[int(generator.integers(len(MUTATIONS)))](data, generator)
    return bytes(data)


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that what is wrong in them is looked at."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return out + data[at:]


# ---------------------------------------------------------------------------------------------------------------------
# Looking at them
# ---------------------------------------------------------------------------------------------------------------------


def fault_of(data: bytes) -> tuple[bool, str]:
    """Whether a file is decoded, and what is wrong with the answer; '' if nothing is."""
    start = time.monotonic()
    try:
        found = pixels.read(data).pixels
        size: tuple[int, int] | None = found.shape[:2]
    except ValueError:
        size = None
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}"
    try:
        said: tuple[int, int] | None = pixels.size_of(data)
    except ValueError:
        said = None
    except BaseException as error:
        return False, f"size_of: {type(error).__name__}: {error}"
    if (seconds := time.monotonic() - start) > SECONDS:
        return False, f"took {seconds:.1f} s"
    if size is None:
        return False, ""
    if said != size:
        return True, f"size_of is {said}, but its pixels are {size}"
    if pixels.kind_of(data) == "jpg":
        with mock.patch.object(pixels, "_simplejpeg", return_value=None):
            if not np.array_equal(pixels.read(data).pixels, found):
                return True, "simplejpeg's pixels are not Pillow's"
    return True, ""


def _child(look: Look, make: Make, kind: str, first: int, end: int, seed: int, answers: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C libraries print
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))
    for number in range(first, end):
        answers.send((number, *look(make(kind, number, seed))))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > MEMORY:
            answers.send((number, False, f"the process has taken {peak / 2**30:.2f} GiB"))
            return
    answers.send((end, False, ""))


def fuzz(
    kind: str, each: int, seed: int, until: float = float("inf"), look: Look = fault_of, make: Make = mutated
) -> Iterator[Fault | tuple[int, int]]:
    """Yield every fault, and at the end (files that were looked at, those that were decoded).

    Args:
        until: time (`time.monotonic`) at which it ends in any case.
        look: as `fault_of`.
        make: as `mutated`.
    """
    first, decoded = 0, 0
    context = get_context("spawn")
    while first < each and time.monotonic() < until:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(look, make, kind, first, each, seed, theirs), daemon=True)
        process.start()
        theirs.close()
        limit = 60 + SECONDS  # it has to import everything first
        while first < each:
            if time.monotonic() > until:
                break
            if not ours.poll(limit):
                yield Fault(kind, first, f"no answer within {limit:.0f} s")
                first += 1
                break
            limit = 2 * SECONDS
            try:
                number, whole, what = ours.recv()
            except EOFError:
                process.join()
                yield Fault(kind, first, f"the process died (exit code {process.exitcode})")
                first += 1
                break
            if number == each:
                break
            first, decoded = number + 1, decoded + whole
            if what:
                yield Fault(kind, number, what)
        process.kill()
        process.join()
    yield first, decoded


def kinds_here() -> list[str]:
    """Kinds whose reader is installed."""
    found = []
    for kind in FORMATS:
        try:
            _originals(kind)
        except (ValueError, ImportError):
            continue
        found.append(kind)
    return found


def options_of(what: str, kinds: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a fuzz, whose module says `what` it does."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20_000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(kinds))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each kind, at most")
    return parser


def fuzz_all(asked: argparse.Namespace, look_of: Callable[[str], Look], make: Make, done: str) -> int:
    """Print faults and counts of all kinds that are `asked` for; returns the exit code.

    Args:
        look_of: kind -> as `fault_of`.
        done: what files are of which the look says that they are whole.
    """
    faults = 0
    for kind in asked.kinds.split(","):
        start = time.monotonic()
        for found in fuzz(kind, asked.each, asked.seed, start + 60 * asked.minutes, look_of(kind), make):
            if isinstance(found, Fault):
                faults += 1
                print(f"FAULT {found.kind} {found.number}: {found.what}", flush=True)
            else:
                seen, whole = found
                print(f"{kind}: {seen:,} files, {whole:,} {done}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if faults else 0


def main(arguments: list[str]) -> int:
    """Print faults and counts; returns the exit code."""
    parser = options_of(__doc__, kinds_here())
    parser.add_argument("--only", type=int, help="look at this file of each of the kinds, and write it here")
    asked = parser.parse_args(arguments)
    if asked.only is None:
        return fuzz_all(asked, lambda _: fault_of, mutated, "decoded")
    for kind in asked.kinds.split(","):
        path = Path(f"fuzz-{asked.only}.{kind}")
        path.write_bytes(mutated(kind, asked.only, asked.seed))
        print(f"{path}: {fault_of(path.read_bytes())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

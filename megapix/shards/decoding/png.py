"""A PNG without what its pixels do not need, and with what they need before them.

Generators write megabytes of text into a PNG, which Pillow refuses; and EXIF data and XMP, which say how an image is
turned, may stand behind the pixels, where a look at the header does not find them.
"""

from __future__ import annotations

import struct
import zlib

LARGEST_TEXT = 16 << 20
"""Bytes of an ICC profile, or of a text that is needed, once they are decompressed."""
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
NEEDED = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
"""Texts in which Pillow looks for an orientation."""
UNREADABLE = b"profile\0\0"
"""An iCCP chunk's data that hold no profile: Pillow then says that there was one."""


def tidied(data: bytes) -> bytes:
    """The same image: texts that say nothing about it are left out, EXIF data and XMP stand before its pixels.

    Anything that is odd in a PNG is left as it is, for the decoder to judge. Equal to `data` for most.
    """
    kept: list[bytes | memoryview] = [data[:8]]
    late: list[bytes] = []
    view, at, pixels, changed = memoryview(data), 8, 0, False
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or (kind in (b"IEND", b"fcTL") and pixels):
            break  # Pillow, too, looks no further than the first frame
        chunk: bytes | memoryview | None = view[at:end]
        if kind == b"IDAT":
            pixels = pixels or len(kept)
        elif kind == b"iCCP" and _too_large(data[at + 8 : end - 4].partition(b"\0")[2][1:]):
            chunk = _chunk(kind, UNREADABLE)
        elif kind in TEXTS and not _needed(kind, data[at + 8 : end - 4]):
            chunk = None
        if pixels and kind in (*TEXTS, b"eXIf") and chunk is not None:
            late.append(_chunk(kind, data[at + 8 : end - 4]))
            chunk, changed = None, True
        changed |= chunk is None or isinstance(chunk, bytes)
        if chunk is not None:
            kept.append(chunk)
        at = end
    if not changed:
        return data
    first = pixels or len(kept)
    return b"".join([*kept[:first], *late, *kept[first:], view[at:]])


def _needed(kind: bytes, text: bytes) -> bool:
    key, _, rest = text.partition(b"\0")
    if key not in NEEDED:
        return False
    if kind == b"zTXt":
        return not _too_large(rest[1:])
    if kind == b"iTXt" and rest[:1] == b"\1":  # compressed: flag, method, language, translated key, text
        return not _too_large(rest[2:].split(b"\0", 2)[-1])
    return len(text) <= LARGEST_TEXT


def _too_large(compressed: bytes) -> bool:
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(compressed, LARGEST_TEXT)
    except zlib.error:
        return False
    return bool(inflate.unconsumed_tail)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

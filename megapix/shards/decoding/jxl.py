"""The size of a JPEG XL image, from its header (ISO/IEC 18181-1, SizeHeader; 18181-2 for the container)."""

from __future__ import annotations

import struct

CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
CODESTREAM = b"\xff\x0a"
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, for ratio numbers 1 to 7."""


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) before the image is turned upright.

    Raises:
        ValueError: there is no such header.
    """
    bits = _Bits(_codestream(data)[2:])
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    if ratio:
        across, down = RATIOS[ratio - 1]
        return height * across // down, height
    return _side(bits, small), height


class _Bits:
    """Reads numbers bit by bit, the lowest bit of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data[:16], "little"), 8 * min(16, len(data))

    def take(self, count: int) -> int:
        if count > self.left:
            raise ValueError("a JPEG XL image without a whole header")
        found = self.value & ((1 << count) - 1)
        self.value >>= count
        self.left -= count
        return found


def _side(bits: _Bits, small: int) -> int:
    if small:
        return 8 * (1 + bits.take(5))
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


def _codestream(data: bytes) -> bytes:
    """The first bytes of the codestream: the file itself, or its first box jxlc or jxlp."""
    if data.startswith(CODESTREAM):
        return data[:32]
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        inside = at + head + (4 if kind == b"jxlp" else 0)  # a part has its number first
        if kind in (b"jxlc", b"jxlp"):
            if data[inside : inside + 2] != CODESTREAM:
                break
            return data[inside : inside + 32]
        if size < head:  # 0 is 'to the end'
            break
        at += size
    raise ValueError("a JPEG XL image without a codestream")

"""ICC profiles, written by hand (ICC.1:2001-04), and what their colors are in sRGB by the published matrices."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

# To XYZ at D50, a column for each of red, green and blue: B. Lindbloom's tables, for Display P3 Apple's profile.
MATRICES = {
    "srgb": ((0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169), (0.0139322, 0.0971045, 0.7141733)),
    "display p3": ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)),
    "adobe rgb": (
        (0.6097559, 0.2052401, 0.1492240),
        (0.3111242, 0.6256560, 0.0632197),
        (0.0194811, 0.0608902, 0.7448387),
    ),
    "prophoto": ((0.7976749, 0.1351917, 0.0313534), (0.2880402, 0.7118741, 0.0000857), (0.0, 0.0, 0.8252100)),
}
GAMMAS = {"srgb": None, "display p3": None, "adobe rgb": 563 / 256, "prophoto": 1.8}
"""None is sRGB's own curve."""
D50 = (0.9642, 1.0, 0.8249)


def linear_of_srgb(encoded: NDArray[np.float64]) -> NDArray[np.float64]:
    """IEC 61966-2-1."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def srgb_of_linear(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """IEC 61966-2-1, clipped to what sRGB has."""
    clipped = np.clip(linear, 0, 1)
    return np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def in_srgb(pixels: NDArray[np.uint8], name: str) -> NDArray[np.float64]:
    """The colors [..., 3] of that space in sRGB, 0 to 255."""
    gamma, encoded = GAMMAS[name], pixels / 255
    linear = linear_of_srgb(encoded) if gamma is None else encoded**gamma
    xyz = linear @ np.array(MATRICES[name]).T
    return 255 * srgb_of_linear(xyz @ np.linalg.inv(np.array(MATRICES["srgb"])).T)


def grey_in_srgb(grey: NDArray[np.uint8], gamma: float) -> NDArray[np.float64]:
    """Grey of that gamma in sRGB, 0 to 255."""
    return 255 * srgb_of_linear((grey / 255) ** gamma)


def lab_in_srgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE Lab at D50 [..., 3] in sRGB, 0 to 255."""
    f_y = (lab[..., 0] + 16) / 116
    f = np.stack([f_y + lab[..., 1] / 500, f_y, f_y - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return 255 * srgb_of_linear(xyz @ np.linalg.inv(np.array(MATRICES["srgb"])).T)


def rgb_profile(name: str, called: str = "") -> bytes:
    """A matrix profile of a space in MATRICES, under any name."""
    matrix = MATRICES[name]
    tags = {tag: _xyz(*(row[n] for row in matrix)) for n, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curve = _curve(GAMMAS[name])
    return _profile(b"RGB ", b"XYZ ", tags | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}, called or name)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey with that gamma."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)}, "grey")


INKS = {
    (0, 0, 0, 0): (100, 0, 0),
    (1, 0, 0, 0): (60, -30, -40),
    (0, 1, 0, 0): (50, 60, 0),
    (0, 0, 1, 0): (90, -5, 70),
    (0, 0, 0, 1): (0, 0, 0),
}
"""Full inks -> Lab, of the profile of print; other corners are black."""


def cmyk_profile() -> bytes:
    """A profile of print: one table (lut8Type) whose 16 corners are INKS."""
    identity = bytes(range(256))
    corners = bytearray()
    for n in range(16):  # the last channel varies fastest
        lightness, a, b = INKS.get((n >> 3 & 1, n >> 2 & 1, n >> 1 & 1, n & 1), (0, 0, 0))
        corners += bytes((round(lightness * 2.55), a + 128, b + 128))
    head = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = head + 4 * identity + bytes(corners) + 3 * identity
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table}, "print", b"prtr")


def _profile(space: bytes, between: bytes, tags: dict[bytes, bytes], called: str, device: bytes = b"mntr") -> bytes:
    text = called.encode() + b"\0"
    described = struct.pack(">4s4xI", b"desc", len(text)) + text + bytes(78)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(*D50), **tags}
    at = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += struct.pack(">4sII", tag, at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    header = bytearray(128)
    header[8:12] = struct.pack(">I", 0x02400000)
    header[12:24] = device + space + between
    header[24:36] = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    header[36:40] = b"acsp"
    header[68:80] = _xyz(*D50)[8:]
    header[:4] = struct.pack(">I", at + len(data))
    return bytes(header) + table + data


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return struct.pack(">4s4xIH2x", b"curv", 1, round(256 * gamma))
    values = np.rint(65535 * linear_of_srgb(np.arange(1024) / 1023)).astype(int)
    return struct.pack(">4s4xI1024H", b"curv", 1024, *values.tolist())

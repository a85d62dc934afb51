"""Whether the beginning of a file decides about the size of its image, so that no more of it need be read."""

from __future__ import annotations

START, RESTARTS, END, SCAN, FURTHER = 0xD8, range(0xD0, 0xD8), 0xD9, 0xDA, 0xE2
"""JPEG's markers: its start, restarts, its end, the start of a scan, and what lists further pictures."""


def decides(head: bytes) -> bool:
    """Whether a JPEG's segments are there up to its first scan: size, orientation and profile, which Pillow takes from
    these alone. Of other kinds, and of a JPEG with further pictures (MPO), the whole file counts."""
    if not head.startswith(bytes([0xFF, START])):
        return False
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a byte to fill up
            at += 1
        elif marker in RESTARTS or marker == 0x01:  # without a segment
            at += 2
        elif marker == END:
            return False
        else:
            after = at + 2 + int.from_bytes(head[at + 2 : at + 4], "big")
            if marker == FURTHER and head.startswith(b"MPF\0", at + 4):
                return False
            if marker == SCAN:
                return after <= len(head)
            at = max(after, at + 4)
    return False

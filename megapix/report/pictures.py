"""Sample grids for a page: some of them over time, in files small enough to lie in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, UnidentifiedImageError

MOST = 12
"""Grids of a page, from the first to the newest."""
LARGEST = {True: 1024, False: 512}
"""Pixels on the longer side: of the newest grid, and of the others."""
SMALL = 360
"""Pixels up to which a grid is shown larger than it is, pixel by pixel."""
QUALITY = 82


def figures(pictures: Mapping[int, bytes], images_at: Callable[[int], int]) -> str:
    """The newest grid, and the way there.

    Args:
        pictures: step -> PNG file, not empty.
        images_at: images seen at a step.
    """
    *before, newest = spread(list(pictures))
    shown = "".join(_figure(pictures[step], step, images_at, False) for step in before)
    rest = f'<div class="grids">{shown}</div>' if shown else ""
    return _figure(pictures[newest], newest, images_at, True) + rest


def spread(steps: Sequence[int], most: int = MOST) -> list[int]:
    """At most `most` of the steps, as far apart as they go, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(n * (len(steps) - 1) / (most - 1))] for n in range(most)]


def _figure(png: bytes, step: int, images_at: Callable[[int], int], newest: bool) -> str:
    seen = f"{images_at(step):,} images seen"
    try:
        data, kind, width = _small(png, LARGEST[newest])
    except (UnidentifiedImageError, OSError):
        return f"<figure><figcaption>{seen}: the picture cannot be read</figcaption></figure>"
    fine = "" if width <= SMALL else ' class="fine"'
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    size = ' class="newest"' if newest else ""
    return f'<figure{size}><img{fine} alt="samples at {seen}" src="{source}"><figcaption>{seen}</figcaption></figure>'


def _small(png: bytes, largest: int) -> tuple[bytes, str, int]:
    """The picture as a file, its kind, and its width: a small one as it is, a large one as WebP."""
    with Image.open(io.BytesIO(png)) as image:
        if max(image.size) <= SMALL:
            return png, "png", image.width
        picture = image.convert("RGB")
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY)
    return file.getvalue(), "webp", picture.width

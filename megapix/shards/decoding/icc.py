"""ICC profiles: pixels of any colour space become sRGB's.

By littlecms, with the relative colorimetric intent and black point compensation: white stays white, colours that sRGB
has stay what they are, and darkness is kept. A profile that moves no colour by more than SAME of 255 is sRGB's own,
whatever it is called, and the image is left bit for bit. A grey image may have the profile of a colour one: then it is
one with three equal channels.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

CONVERTED, UNUSABLE = "icc converted", "icc unusable"
"""What is counted."""
SAME = 2
"""Difference of 8-bit values up to which a profile is sRGB's own: copies of it differ by their rounding."""
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> Pillow's mode."""
CLASSES = ("mntr", "scnr", "prtr", "spac")
"""Profiles of devices and colour spaces; not links, named colours and effects."""
COLOURED = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "YCbCr")
GREY = ("1", "L", "LA", "La")
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


class Conversion(NamedTuple):
    """What a profile asks for."""

    mode: str
    """Pillow's mode of the profile's colour space."""
    transform: ImageCms.ImageCmsTransform | None
    """To sRGB; None where that changes nothing."""


def asked(image: Image.Image) -> tuple[Conversion | None, str | None]:
    """The conversion that an opened image needs, if any, and what is to be counted.

    A profile that cannot be read, or is of another colour space than the image, is not used.
    """
    if "icc_profile" not in image.info:
        return None, None
    profile = image.info["icc_profile"]
    found = _conversion(profile) if isinstance(profile, bytes) and profile else None
    grey = image.mode in GREY or image.mode[0] in "IF"
    fits = {"RGB": grey or image.mode in COLOURED, "L": grey, "CMYK": image.mode == "CMYK"}
    if found is None or not fits[found.mode]:
        return None, UNUSABLE
    return (None, None) if found.transform is None else (found, CONVERTED)


def to_srgb(image: Image.Image, conversion: Conversion) -> Image.Image:
    """A decoded image with 8 bits a channel in sRGB: RGB, or RGBA if anything in it is transparent."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return _applied(image.convert(conversion.mode), conversion)
    rgba = image.convert("RGBA")
    converted = _applied(rgba.getchannel("R") if conversion.mode == "L" else rgba.convert("RGB"), conversion)
    converted.putalpha(rgba.getchannel("A"))
    return converted


def _applied(image: Image.Image, conversion: Conversion) -> Image.Image:
    assert conversion.transform
    if conversion.mode != "L":
        return conversion.transform.apply(image)
    table = conversion.transform.apply(Image.fromarray(np.arange(256, dtype=np.uint8)[None]))
    return Image.fromarray(np.asarray(table)[0][np.asarray(image)])


@lru_cache(maxsize=8)
def _conversion(data: bytes) -> Conversion | None:
    """None if the profile cannot be used."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space, device = profile.profile.xcolor_space.strip(), profile.profile.device_class.strip()
        if space not in MODES or device not in CLASSES:
            return None
        mode = MODES[space]
        transform = ImageCms.buildTransform(
            profile,
            _srgb(),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # What littlecms makes of a curve to be faster is off by 9 of 255 in the dark of linear grey. Exactly it is
            # slow, but for the 256 greys alone.
            ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0),
        )
        return Conversion(mode, None if mode != "CMYK" and _is_srgb(transform, mode) else transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it moves neither the greys nor a grid of colours."""
    greys = np.repeat(np.arange(256)[:, None], 3, axis=1)
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), -1).reshape(-1, 3)
    colours = (greys if mode == "L" else np.concatenate([greys, grid])).astype(np.uint8)
    probe = Image.fromarray(colours[None]).convert(mode)
    return bool(np.abs(np.asarray(transform.apply(probe))[0].astype(int) - colours).max() <= SAME)

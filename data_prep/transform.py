"""The image policy: any image in, 8-bit RGB of size × size pixels out. Pure functions of Pillow images."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that are opened; Pillow's other readers are never reached."""
ENCODERS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
BACKGROUND = (255, 255, 255)
"""Colour on which transparent images are composited."""


def decode(data: bytes) -> Image.Image:
    """Decode a whole PNG, JPEG or WebP image (the first frame of an animated one) to 8-bit RGB, upright.

    EXIF orientation is applied, transparency composited on white, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: not such an image, truncated, with broken EXIF data, or as large as a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(str(error).replace("<_io.BytesIO object at ", "<bytes ")) from error
    return _to_rgb(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255 instead of scaling
        image = image.convert("I").point(lambda value: value / 256 + 0.0).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop and resize as ADM does (Dhariwal and Nichol 2021): size × size pixels from the centre.

    The image is halved with a box filter while its shorter side is at least twice `size`, then scaled bicubically so
    that the shorter side is `size`, then cut.

    Raises:
        ValueError: so long and thin that scaling it up would pass Pillow's limit on pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:  # 1 × 50,000,000 pixels decode, but grow
        raise ValueError(f"scaled to {width}x{height} pixels it exceeds the limit of {Image.MAX_IMAGE_PIXELS}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def encode(image: Image.Image, extension: str, quality: int) -> bytes:
    """Encode as png, jpg (4:4:4) or webp; `quality` 1 to 100 is for the latter two. No metadata is written."""
    out = io.BytesIO()
    image.info = {}
    options = {"png": {}, "jpg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}[extension]
    image.save(out, ENCODERS[extension], **options)
    return out.getvalue()

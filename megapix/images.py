"""The image policy: any image in, 8-bit RGB of a known size out.

`data_prep write` applies it before it writes shards; the loader applies it to shards that were only indexed. It is
recorded in the index, so there is one place that says how the pixels came about.

    crop       size × size from the centre, as ADM does (Dhariwal and Nichol 2021): halved with a box filter while the
               shorter side is at least twice the size, scaled bicubically, cut
    buckets    one of several sizes of about equal area: the one nearest in aspect ratio is covered the same way, and
               what exceeds it is cut evenly from both sides
    untouched  left as it is

`fast` replaces the last, bicubic step by torch's antialiased one on 8-bit integers; results differ by rounding
(tests/test_images.py holds them to 50 dB). Decoding goes through Pillow, or for plain JPEG through simplejpeg where it
is installed: the same library underneath, and the same pixels.
"""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megapix.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that are opened; Pillow's other readers are never reached."""
ORIENTATION = 0x0112
"""EXIF tag: how the camera was held."""

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""
Mode = Literal["crop", "buckets", "untouched"]
MODES = ("crop", "buckets", "untouched")
LARGEST_SIDE = 16_384
"""Pixels on a side of what a policy makes."""
LARGEST_RATIO = 16.0
"""Of the sides of a bucket."""
LARGEST_STEP = 64
"""Pixels of the default step of the sides of buckets: at 1024, an eighth leaves areas 6 % off."""


@dataclass(frozen=True)
class Policy:
    """How images are made."""

    mode: Mode = "crop"
    size: int = 0
    """Side of the square in pixels; of buckets, the square root of their area; 0 for untouched."""
    fast: bool = False
    """Scale with torch's 8-bit bicubic instead of Pillow's."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB on which transparent images are composited."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are refused."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(height, width) of each size that comes out; none for untouched."""

    @staticmethod
    def make(mode: Mode, size: int, step: int = 0, ratio: float = 2.0, **rest: Any) -> Policy:
        """A policy with its sizes worked out.

        Args:
            step: sides of buckets are multiples of this; 0 takes `default_step`.
            ratio: largest ratio of the sides of a bucket.

        Raises:
            InputError: a value out of range.
        """
        if rest.get("min_side", 1) < 1:
            raise InputError(f"--min-side = {rest['min_side']}: expected at least 1")
        if mode == "untouched":
            return Policy(mode, **rest)
        if not 1 <= size <= LARGEST_SIDE:
            raise InputError(f"--size = {size}: expected 1 to {LARGEST_SIDE}")
        if mode == "crop":
            return Policy(mode, size, buckets=((size, size),), **rest)
        return Policy(mode, size, buckets=bucket_sizes(size, step or default_step(size), ratio), **rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "background": list(self.background), "buckets": [list(b) for b in self.buckets]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Policy:
        """The policy of an index.

        Raises:
            InputError: not such data.
        """
        try:
            red, green, blue = (int(value) for value in data["background"])
            buckets = tuple((int(height), int(width)) for height, width in data["buckets"])
            policy = Policy(
                data["mode"], int(data["size"]), bool(data["fast"]), (red, green, blue), int(data["min_side"]), buckets
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the index's image_policy is damaged: {error!r}") from error
        if policy.mode not in MODES or bool(buckets) == (policy.mode == "untouched"):
            raise InputError(f"the index's image_policy is damaged: mode {policy.mode!r} with sizes {list(buckets)}")
        if any(side < 1 or side > LARGEST_SIDE for bucket in buckets for side in bucket):
            raise InputError(f"the index's image_policy is damaged: sizes {list(buckets)}")
        return policy

    def bucket_of(self, height: int, width: int) -> int:
        """Number of the bucket for an image of that size: the nearest in aspect ratio, the first of equals."""
        if len(self.buckets) < 2:
            return 0
        aspect = math.log(width / height)
        return min(range(len(self.buckets)), key=lambda b: abs(aspect - _log_aspect(self.buckets[b])))

    def apply(self, pixels: Pixels, bucket: int) -> Pixels:
        """The image at the size of `bucket` (untouched: as it is).

        Raises:
            ValueError: smaller than `min_side`, or so long and thin that scaling it would pass the limit on pixels.
        """
        height, width = pixels.shape[:2]
        if min(height, width) < self.min_side:
            raise ValueError(f"{width}x{height} pixels, --min-side is {self.min_side}")
        return pixels if self.mode == "untouched" else cover(pixels, *self.buckets[bucket], self.fast)


def default_step(size: int) -> int:
    """The step of the sides of buckets: an eighth of the size; above 512 pixels 64, where 64 divides the size."""
    eighth = max(1, size // 8)
    return LARGEST_STEP if eighth > LARGEST_STEP and size % LARGEST_STEP == 0 else eighth


def bucket_sizes(size: int, step: int, ratio: float) -> tuple[tuple[int, int], ...]:
    """(height, width) of buckets of about size² pixels, from tall to wide.

    For each longer side that is a multiple of `step`, the shorter side is the multiple nearest to size² / longer,
    while their ratio is at most `ratio`.

    Raises:
        InputError: the step does not divide the size, or a ratio out of range.
    """
    if step < 1 or size % step:
        raise InputError(f"--bucket-step = {step}: expected a divisor of --size = {size}")
    if not 1 <= ratio <= LARGEST_RATIO:
        raise InputError(f"--bucket-ratio = {ratio}: expected 1 to {LARGEST_RATIO:g}")
    wide = {(size, size)}
    for longer in range(size + step, round(size * ratio) + 1, step):
        shorter = max(step, round(size * size / longer / step) * step)
        if longer / shorter <= ratio:
            wide.add((shorter, longer))
    return tuple(sorted(wide | {(b, a) for a, b in wide}, key=lambda hw: (_log_aspect(hw), hw)))


def _log_aspect(bucket: tuple[int, int]) -> float:
    return math.log(bucket[1] / bucket[0])


def kind_of(data: bytes) -> str | None:
    """The ending for encoded bytes (png, jpg or webp), from their first bytes; None if they are none of these."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image when it is upright, from its header.

    Raises:
        ValueError: not a PNG, JPEG or WebP image, or as large as a decompression bomb.
    """
    with _opened(data) as image, _decoding():
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))  # image.getexif() would decode a whole PNG
        turned = exif.get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def decode(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    """Decode a whole PNG, JPEG or WebP image (the first frame of an animated one) to 8-bit RGB, upright.

    EXIF orientation is applied, transparency composited on `background`, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: not such an image, truncated, with broken EXIF data, or as large as a decompression bomb.
    """
    with _opened(data) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L") and "exif" not in image.info:
            pixels = _plain_jpeg(data)
            if pixels is not None:
                return pixels
        with _decoding():
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_to_rgb(upright, background))


def decode_exactly(data: bytes, height: int, width: int) -> Pixels:
    """Decode an image that is already RGB of that size; its size is compared before any pixel is decoded.

    Raises:
        ValueError: another size, or what `decode` raises.
    """
    with _opened(data) as image:
        if image.size != (width, height):
            raise ValueError(f"image is {image.width}x{image.height} pixels, expected {width}x{height}")
    pixels = decode(data)
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"image is to be turned to {pixels.shape[1]}x{pixels.shape[0]} pixels (EXIF)")
    return pixels


def decode_indexed(data: bytes, policy: Policy, bucket: int, prepared: bool) -> Pixels:
    """Decode an image of an index: one that the policy has made already (`prepared`), or makes now.

    Raises:
        ValueError: not an image, damaged, of another size than prepared ones have, or refused by the policy.
    """
    if prepared and policy.mode != "untouched":
        return decode_exactly(data, *policy.buckets[bucket])
    return policy.apply(decode(data, policy.background), bucket)


def _opened(data: bytes) -> Image.Image:
    with _decoding():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder makes of damaged or hostile bytes is a ValueError: Pillow's parsers raise all kinds.

    An image that Pillow warns of as a bomb is refused; its other warnings (odd EXIF data) change nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError("not a PNG, JPEG or WebP image") from error
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


@lru_cache(maxsize=1)
def _simplejpeg() -> Any:
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    import simplejpeg

    return simplejpeg


def _plain_jpeg(data: bytes) -> Pixels | None:
    """The pixels through simplejpeg; None where it is not installed, or objects: Pillow then has the last word."""
    library = _simplejpeg()
    if library is None:
        return None
    try:
        return np.asarray(library.decode_jpeg(data, "RGB"))
    except ValueError:
        return None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255 instead of scaling
        values = np.asarray(image.convert("I"))
        pixels = np.repeat((values >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        pixels[values == image.info.get("transparency", -1)] = background
        return Image.fromarray(pixels)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def cover(pixels: Pixels, height: int, width: int, fast: bool = False) -> Pixels:
    """Scale an image so that it covers height × width, and cut that from its centre. A square is ADM's centre crop.

    Raises:
        ValueError: so long and thin that scaling it would pass Pillow's limit on pixels.
    """
    while pixels.shape[0] >= 2 * height and pixels.shape[1] >= 2 * width:
        half = pixels.shape[1] // 2, pixels.shape[0] // 2
        pixels = np.asarray(Image.fromarray(pixels).resize(half, Image.Resampling.BOX))
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    scaled = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    if Image.MAX_IMAGE_PIXELS and math.prod(scaled) > Image.MAX_IMAGE_PIXELS:  # 1 × 50,000,000 pixels decode, but grow
        raise ValueError(f"scaled to {scaled[1]}x{scaled[0]} pixels it exceeds the limit of {Image.MAX_IMAGE_PIXELS}")
    out = (_torch_bicubic if fast else _pillow_bicubic)(pixels, *scaled)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return out[top : top + height, left : left + width]


def _pillow_bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _torch_bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    import torch

    if pixels.shape[:2] == (height, width):
        return pixels
    with warnings.catch_warnings():  # Pillow's arrays are read-only; nothing is written to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()

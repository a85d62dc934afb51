"""The image policy: any image in, 8-bit RGB of a known size out.

`data_prep write` applies it before it writes shards; the loader applies it to shards that were only indexed. It is
recorded in the index, so there is one place that says how the pixels came about.

    crop       size × size from the centre, as ADM does (Dhariwal and Nichol 2021): halved with a box filter while the
               shorter side is at least twice the size, scaled bicubically, cut
    buckets    one of several sizes of about equal area: the one nearest in aspect ratio is covered the same way, and
               what exceeds it is cut evenly from both sides
    untouched  left as it is

How the pixels are decoded and scaled: `pixels.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megapix.errors import InputError
from megapix.shards.pixels import VERSION, Decoded, Pixels, cover, decode_exactly, header, read, scaled, size_of

Mode = Literal["crop", "buckets", "untouched"]
Icc = Literal["convert", "ignore"]
Resize = Literal["exact", "fast", "draft"]
UPSCALED = "upscaled"
"""Counted of images with fewer pixels on a side than their bucket has."""
MODES = ("crop", "buckets", "untouched")
LARGEST_SIDE = 16_384
"""Pixels on a side of what a policy makes."""
LARGEST_RATIO = 16.0
"""Of the sides of a bucket."""
LARGEST_STEP = 64
"""Pixels of the default step of the sides of buckets: at 1024, an eighth leaves areas 6 % off."""
DRAFT_VERSION = 3
"""Of policies that draft, and of no others: releases that know of no drafts refuse them."""


@dataclass(frozen=True)
class Policy:
    """How images are made."""

    mode: Mode = "crop"
    size: int = 0
    """Side of the square in pixels; of buckets, the square root of their area; 0 for untouched."""
    resize: Resize = "exact"
    """exact is Pillow's; fast has torch's 8-bit bicubic; draft decodes large JPEG at a reduced scale
    (`decoding.draft`)."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB on which transparent images are composited."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are refused."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(height, width) of each size that comes out; none for untouched."""
    version: int = VERSION
    """Of decoding (`pixels.py`), or DRAFT_VERSION; an index that does not say has 1."""
    icc: Icc = "convert"
    """What becomes of embedded ICC profiles: colours are converted to sRGB, or are left as they are stored."""

    @staticmethod
    def make(mode: Mode, size: int, step: int = 0, ratio: float = 2.0, resize: Resize = "exact", **rest: Any) -> Policy:
        """A policy with its sizes worked out.

        Args:
            step: sides of buckets are multiples of this; 0 takes `default_step`.
            ratio: largest ratio of the sides of a bucket.

        Raises:
            InputError: a value out of range.
        """
        if rest.get("min_side", 1) < 1:
            raise InputError(f"--min-side = {rest['min_side']}: expected at least 1")
        if resize == "draft":
            rest["version"] = DRAFT_VERSION
        if mode == "untouched":
            if resize == "draft":
                raise InputError("--resize draft has no meaning with --policy untouched")
            return Policy(mode, resize=resize, **rest)
        if not 1 <= size <= LARGEST_SIDE:
            raise InputError(f"--size = {size}: expected 1 to {LARGEST_SIDE}")
        if mode == "crop":
            return Policy(mode, size, resize, buckets=((size, size),), **rest)
        return Policy(mode, size, resize, buckets=bucket_sizes(size, step or default_step(size), ratio), **rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {"fast" if key == "resize" else key: value for key, value in asdict(self).items()}
        data |= {"background": list(self.background), "buckets": [list(b) for b in self.buckets]}
        data["fast"] = self.resize == "fast"
        if self.resize == "draft":
            data["draft"] = True
        if self.version == 1:
            del data["version"]
        if self.icc == "convert":
            del data["icc"]
        return data

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
                data["mode"],
                int(data["size"]),
                "draft" if data.get("draft") else "fast" if data["fast"] else "exact",
                (red, green, blue),
                int(data["min_side"]),
                buckets,
                int(data.get("version", 1)),
                data.get("icc", "convert"),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the index's image_policy is damaged: {error!r}") from error
        if not 1 <= policy.version <= DRAFT_VERSION:
            raise InputError(
                f"the index's image_policy has version {policy.version}, this release reads 1 to {DRAFT_VERSION}"
            )
        if (policy.version == DRAFT_VERSION) != (policy.resize == "draft"):
            raise InputError(
                f"the index's image_policy is damaged: version {policy.version} with draft {data.get('draft', False)}"
            )
        if policy.icc not in ("convert", "ignore"):
            raise InputError(f"the index's image_policy is damaged: icc {policy.icc!r}")
        if policy.mode == "untouched" and policy.resize == "draft":
            raise InputError("the index's image_policy is damaged: mode 'untouched' with draft True")
        if policy.mode not in MODES or bool(buckets) == (policy.mode == "untouched"):
            raise InputError(f"the index's image_policy is damaged: mode {policy.mode!r} with sizes {list(buckets)}")
        if any(side < 1 or side > LARGEST_SIDE for bucket in buckets for side in bucket):
            raise InputError(f"the index's image_policy is damaged: sizes {list(buckets)}")
        return policy

    def size_of(self, data: bytes) -> tuple[int, int]:
        """(height, width) that `read` gives an encoded image; only its header is read. ValueError as there."""
        return size_of(data, self.version)

    def header(self, data: bytes) -> tuple[tuple[int, int], tuple[str, ...]]:
        """`size_of`, and the notes that `read` gives; only the header is read. ValueError as there."""
        return header(data, self.version, self.icc == "convert")

    def read(self, data: bytes) -> Decoded:
        """Decode a whole image as this policy's version does.

        Raises:
            ValueError: not an image of a kind that is read, or damaged.
        """
        return read(data, self.background, self.version, self.icc == "convert")

    def render(self, data: bytes, bucket: int) -> Decoded:
        """Decode an image and bring it to the size of `bucket` (untouched: as it is), with all that is to be counted
        of it.

        Raises:
            ValueError: as `read`; smaller than `min_side`; or so long and thin that scaling it would pass the limit on
                pixels.
        """
        covered = self.buckets[bucket] if self.resize == "draft" else None
        pixels, size, own = read(data, self.background, self.version, self.icc == "convert", covered=covered)
        self.check_size(*size, bucket)
        return Decoded(self.apply(pixels, bucket), size, self.notes_of(size, own, bucket))

    def notes_of(self, size: tuple[int, int], own: tuple[str, ...], bucket: int) -> tuple[str, ...]:
        """What is to be counted of an image of that height and width: its own notes, and whether it is scaled up to
        cover `bucket`."""
        if self.mode == "untouched":
            return own
        (height, width), (high, wide) = size, self.buckets[bucket]
        return (*own, UPSCALED) if height < high or width < wide else own

    def bucket_of(self, height: int, width: int) -> int:
        """Number of the bucket for an image of that size: the nearest in aspect ratio, the first of equals."""
        if len(self.buckets) < 2:
            return 0
        aspect = math.log(width / height)
        return min(range(len(self.buckets)), key=lambda b: abs(aspect - _log_aspect(self.buckets[b])))

    def apart(self, bucket: int, other: int) -> float:
        """How far two buckets are from each other: the difference of the logarithms of their aspect ratios."""
        return abs(_log_aspect(self.buckets[bucket]) - _log_aspect(self.buckets[other]))

    def apply(self, pixels: Pixels, bucket: int) -> Pixels:
        """Pixels of any size at that of `bucket` (untouched: as they are). ValueError as `cover`."""
        return pixels if self.mode == "untouched" else cover(pixels, *self.buckets[bucket], self.resize == "fast")

    def check_size(self, height: int, width: int, bucket: int) -> None:
        """Raise the ValueError that `render` raises for an image of that size, without one."""
        if min(height, width) < self.min_side:
            raise ValueError(f"{width}x{height} pixels, --min-side is {self.min_side}")
        if self.mode != "untouched":
            scaled(height, width, *self.buckets[bucket])


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


def decode_indexed(data: bytes, policy: Policy, bucket: int, prepared: bool) -> Pixels:
    """Decode an image of an index: one that the policy has made already (`prepared`), or makes now.

    Raises:
        ValueError: not an image, damaged, of another size than prepared ones have, or refused by the policy.
    """
    if prepared and policy.mode != "untouched":
        return decode_exactly(data, *policy.buckets[bucket], policy.version)
    return policy.render(data, bucket).pixels

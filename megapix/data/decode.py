"""Encoded bytes -> pixels, as the image policy of the index says.

Shards may come from strangers. The stock webdataset decoders would unpickle `.pyd` and `.pth` members and decode an
image of any size; here nothing but the indexed image is read, and its size is known before its pixels are decoded.
"""

from __future__ import annotations

import numpy as np

from megapix.images import Pixels, Policy, decode, decode_exactly
from megapix.shards import Index


class Decoder:
    """Decodes the images of one index."""

    def __init__(self, index: Index) -> None:
        self.policy = Policy.from_dict(index.image_policy)
        self._prepared = index.image_policy["applied"] == "preparation"

    def __call__(self, data: bytes, bucket: int) -> Pixels:
        """The image: uint8 [3, H, W], of its bucket's size.

        Raises:
            ValueError: not an image, damaged, of another size than prepared ones have, or refused by the policy.
        """
        if self._prepared:
            pixels = decode_exactly(data, *self.policy.buckets[bucket])
        else:
            pixels = self.policy.apply(decode(data, self.policy.background), bucket)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

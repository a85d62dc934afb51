"""Encoded bytes -> pixels, as the image policy of the index says.

Shards may come from strangers. The stock webdataset decoders would unpickle `.pyd` and `.pth` members and decode an
image of any size; here nothing but the indexed image is read, and its size is known before its pixels are decoded.
"""

from __future__ import annotations

import numpy as np

from megapix.images import Pixels, Policy, decode_indexed
from megapix.shards import Index


class Decoder:
    """Decodes the images of one index."""

    def __init__(self, index: Index) -> None:
        self.policy = Policy.from_dict(index.image_policy)
        self._prepared = index.prepared

    def __call__(self, data: bytes, bucket: int) -> Pixels:
        """The image: uint8 [3, H, W], of its bucket's size.

        Raises:
            ValueError: not an image, damaged, of another size than prepared ones have, or refused by the policy.
        """
        pixels = decode_indexed(data, self.policy, bucket, self._prepared)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

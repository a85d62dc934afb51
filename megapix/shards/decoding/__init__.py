"""From encoded bytes to an image that Pillow has opened, upright and in sRGB: the parts of `megapix.shards.pixels`."""

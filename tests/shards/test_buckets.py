"""Which bucket an image goes to, with exact fractions."""

from __future__ import annotations

from fractions import Fraction

from megapix.shards.image_policy import Policy


def apart(a: Fraction, b: Fraction) -> Fraction:
    """How many times as wide the wider one is: the same whichever of the two it is, and if both are turned."""
    return max(a / b, b / a)


def test_the_nearest_bucket_is_so_by_the_logarithm_of_the_ratio() -> None:
    policy = Policy.make("buckets", 64, 16)
    aspects = [Fraction(width, height) for height, width in policy.buckets]
    by_ratio = by_turned = 0
    for height in range(31, 211, 7):
        for width in range(30, 211, 7):
            aspect = Fraction(width, height)
            distances = [apart(aspect, bucket) for bucket in aspects]
            if distances.count(nearest := min(distances)) > 1:
                continue
            expected = distances.index(nearest)
            assert policy.bucket_of(height, width) == expected, (height, width)
            by_ratio += min(range(len(aspects)), key=lambda b: abs(aspect - aspects[b])) != expected
            by_turned += min(range(len(aspects)), key=lambda b: abs(1 / aspect - 1 / aspects[b])) != expected
    assert min(by_ratio, by_turned) > 10, "there are images for which it matters"

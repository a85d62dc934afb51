"""How well a shuffle window mixes: shards in a batch, for ImageNet-sized data, against a perfect shuffle.

    python -m benchmarks.shuffle_quality

1,300 shards of 1,000 samples. For each window: the mean number of distinct shards in a batch of 256, over 200 batches
spread over an epoch, its share of what a perfect shuffle gives, and the shards that are read at a time, on all nodes.
"""

from __future__ import annotations

import numpy as np

from megapix.data.order import SampleOrder

SHARDS, SAMPLES, BATCH, BATCHES = 1300, 1000, 256, 200


def distinct_shards(window: int, groups: int) -> float:
    """Mean number of distinct shards in a batch."""
    order = SampleOrder(0, [SAMPLES] * SHARDS, window, groups)
    starts = np.linspace(0, SHARDS * SAMPLES - BATCH, BATCHES).astype(np.int64)
    return float(np.mean([len(set((order.at(np.arange(s, s + BATCH)) // SAMPLES).tolist())) for s in starts]))


def main() -> None:
    """Print a table."""
    perfect = distinct_shards(0, 1)
    print(
        f"{'window':>8} {'groups':>7} {'shards in a batch':>18} {'of a perfect shuffle':>21} {'shards at a time':>17}"
    )
    for groups, windows in ((1, (1, 4, 16, 64, 256, 0)), (64, (1, 2, 4, 0))):
        for window in windows:
            found = distinct_shards(window, groups)
            at_a_time = min(SHARDS, window * groups) if window else SHARDS
            print(f"{window or 'all':>8} {groups:7} {found:18.1f} {found / perfect:21.1%} {at_a_time:17,}")


if __name__ == "__main__":
    main()

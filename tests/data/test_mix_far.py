"""Sets of a mix that lie below a URL, and mixes of aspect buckets: read by real loaders on several topologies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.config import BatchLayout, DataConfig
from megapix.data.batch import Batch
from megapix.data.loader import batches
from megapix.data.mix.located import find
from megapix.errors import InputError
from megapix.shards.image_policy import Policy
from tests.data.test_mix_stored import again
from tests.support.servers import Faults, faulty
from tests.train.test_mix_run import mix_of

SIZES = ((16, 16), (12, 20), (20, 12))
BUCKETS = Options(Policy.make("buckets", 16, step=4, ratio=1.7), samples_per_shard=7)
TOPOLOGIES = ((1, 0), (2, 1), (3, 2), (1, 3), (3, 0), (2, 0))
"""(ranks, workers) of the steps, in turn."""
STEP = 6


def bucketed(root: Path, images: int, seed: int) -> Path:
    """Images of all three shapes, the squares twice as often as either of the others."""
    generator, source = np.random.default_rng(seed), root / "src" / "things"
    source.mkdir(parents=True)
    for number in range(images):
        pixels = generator.integers(0, 255, (*(SIZES[0], *SIZES)[number % 4], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    write(ImageFolder.open(root / "src"), root / "set", BUCKETS, workers=1, progress=False)
    return root / "set"


def steps(config: DataConfig, count: int, start: int = 0) -> Iterator[list[Batch]]:
    """The batches of all ranks at each step; ranks and workers change from step to step."""
    for step in range(start, start + count):
        ranks, workers = TOPOLOGIES[step % len(TOPOLOGIES)]
        data, asked = find(config), DataConfig(**{**vars(config), "workers": workers})
        layout = BatchLayout(STEP // ranks, 1, ranks)
        yield [next(batches(asked, data, 3, layout, rank, step * STEP, ())) for rank in range(ranks)]


@pytest.mark.parametrize("groups", [1, 3])
def test_buckets_groups_and_workers_together(groups: int, tmp_path: Path) -> None:
    """A step is of one shape. Every image of a shape of a set comes once before any comes again."""
    folders = [bucketed(tmp_path / name, images, seed) for name, images, seed in (("a", 44, 1), ("b", 20, 2))]
    shown = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, (1, 2), strict=True)]
    config = DataConfig(
        path=str(mix_of(tmp_path / "mix.json", *shown)), image_size=16, flip=False, reading_groups=groups
    )
    owner: dict[bytes, int] = {}
    for number, folder in enumerate(folders):
        for path in (folder.parent / "src").rglob("*.png"):
            owner[np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()] = number
    drawn, shapes = defaultdict[tuple[int, tuple[int, ...]], list[bytes]](list), Counter[tuple[int, ...]]()
    for ranks in steps(config, 36):
        found = {}
        for batch in ranks:
            for image, place in zip(batch.images, batch.positions.tolist(), strict=True):
                found[place] = image.numpy()
        assert len({image.shape for image in found.values()}) == 1
        for place in sorted(found):
            image = found[place]
            drawn[owner[image.tobytes()], image.shape[1:]].append(image.tobytes())
        shapes[image.shape[1:]] += 1
    assert shapes.keys() == set(SIZES)
    assert shapes[16, 16] == 18, "half of the images are squares, so half of the steps"
    for (number, shape), images in drawn.items():
        once = sum(
            1 for path in (folders[number].parent / "src").rglob("*.png") if Image.open(path).size == shape[::-1]
        )
        for epoch in range(len(images) // once):
            assert len(set(images[epoch * once : (epoch + 1) * once])) == once


def flat(ranks: list[Batch]) -> list[tuple[int, int, bytes]]:
    """(position, class, pixels) of a step, in order."""
    rows = [zip(b.positions.tolist(), b.labels.tolist(), b.images, strict=True) for b in ranks]
    return sorted((place, label, image.numpy().tobytes()) for row in rows for place, label, image in row)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_a_set_below_a_url(cache_gib: float, shards: Path, tmp_path: Path) -> None:
    """The order knows digests alone: with one set on a server it is that of two local ones."""
    pytest.importorskip("aiohttp")
    other = again(shards, tmp_path / "other")
    options: dict[str, Any] = {"image_size": 16, "cache": str(tmp_path / "cache"), "cache_gib": cache_gib}
    near = mix_of(tmp_path / "near.json", {"path": str(shards), "weight": 1}, {"path": str(other), "weight": 2})
    expected = [flat(ranks) for ranks in steps(DataConfig(path=str(near), **options), 6)]
    faults = Faults(breaks=2)
    with faulty(other, faults) as url:
        far = mix_of(tmp_path / "far.json", {"path": str(shards), "weight": 1}, {"path": url, "weight": 2})
        config = DataConfig(path=str(far), timeout=2.0, **options)
        assert [flat(ranks) for ranks in steps(config, 6)] == expected
        assert find(config).index.digest == find(DataConfig(path=str(near), image_size=16)).index.digest
    assert faults.breaks == 0
    with pytest.raises(InputError, match=r"remote: give a local folder for its index, --data\.cache"):
        find(DataConfig(path=str(far), image_size=16))

"""The blocks of an evaluation on disk: `batch` image numbers each, sampled together, so that neither the number of
ranks nor an interruption changes a bit of them.

WORK/manifest.json        what is evaluated; the folder's name holds its hash
WORK/block-00000000.npz   features, logits and the like of the first block
WORK/pixels-00000000.npy  its images, where --npz asks for them

A block counts once its .npz is there, which is written last. At the end `write_npz` puts all images into one file.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from megapix.evaluation.images import Images, Samples
from megapix.files import appearing, write_atomic


@dataclass(frozen=True)
class Blocks:
    """The files of an evaluation's images."""

    folder: Path
    images: Images
    with_pixels: bool
    """Whether a block needs its images, too."""
    png: Path | None
    """Folder where its images must be as PNG, if anywhere."""

    def done(self, block: int) -> bool:
        """Whether a block is there with everything that was requested."""
        return (
            self._scores(block).is_file()
            and (not self.with_pixels or self.pixels(block).is_file())
            and all(path.is_file() for path in self.pngs(block))
        )

    def images_done(self) -> int:
        """Images of all blocks that are there, of any rank."""
        there = {path.name for path in self.folder.glob("block-*.npz")}
        return sum(len(self.images.numbers(b)) for b in range(self.images.blocks) if self._scores(b).name in there)

    def pngs(self, block: int) -> list[Path]:
        """Paths of a block's PNG files, none where no folder was given."""
        if self.png is None:
            return []
        return [self.png / f"{n:06d}-{self.images.subject(n):04d}.png" for n in self.images.numbers(block)]

    def pixels(self, block: int) -> Path:
        """Path of a block's images, a uint8 array [B, H, W, 3]."""
        return self.folder / f"pixels-{block:08d}.npy"

    def write(self, block: int, samples: Samples) -> None:
        """Commit a block; may raise OSError."""
        data = io.BytesIO()
        np.savez(data, features=samples.features, logits=samples.logits, fit=samples.fit)
        write_atomic(self._scores(block), data.getvalue())

    def write_pixels(self, block: int, images: NDArray[np.uint8]) -> None:
        """Write a block's images [B, H, W, 3]; may raise OSError."""
        data = io.BytesIO()
        np.save(data, images)
        write_atomic(self.pixels(block), data.getvalue())

    def read(self, part: str) -> NDArray[np.float32]:
        """'features' [N, D], 'logits' [N, K] or 'fit' [N, E] of all images in the order of their numbers."""
        found = []
        for block in range(self.images.blocks):
            with np.load(self._scores(block), allow_pickle=False) as file:
                found.append(file[part])
        return np.concatenate(found)

    def _scores(self, block: int) -> Path:
        return self.folder / f"block-{block:08d}.npz"


def write_npz(path: Path, blocks: Blocks) -> None:
    """Write all images into one .npz, as ADM's evaluator reads them: arr_0, uint8 [N, height, width, 3].

    One block is in memory at a time; the file appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (blocks.images.count, *blocks.images.size, 3)}
    with appearing(path, "--npz") as temporary, open(temporary, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            for block in range(blocks.images.blocks):
                member.write(np.load(blocks.pixels(block), allow_pickle=False).tobytes())
        file.flush()
        os.fsync(file.fileno())

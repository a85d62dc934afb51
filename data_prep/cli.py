"""The command line: `data_prep write | demo`. Parses, calls, and turns bad input into one line and exit code 2."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megapix.errors import InputError

DESCRIPTION = """Make WebDataset tar shards, with an index, for `megapix train`."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How shards are written."""

    size: int
    """Height and width of the images in pixels."""
    format: Literal["png", "jpg", "webp"] = "png"
    """Image format in the shards; png is lossless."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    seed: int = 0
    """Seed of the order in which samples are laid into shards."""
    workers: int = os.cpu_count() or 1
    """Processes that read, resize and write."""


Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True, kw_only=True)
class Write(ShardOptions):
    """Shards from an image folder: one folder for each class, images (png, jpg, jpeg, webp) anywhere below it.

    Each image is cropped and resized as in ADM: halved with a box filter, scaled bicubically, cut from the centre.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of class folders."""
    out: Out
    """Folder to write; a finished one is left as it is."""


@dataclass(frozen=True, kw_only=True)
class Demo(ShardOptions):
    """Shards of an embedded image set: OpenMoji's colour artwork (CC BY-SA 4.0), drawn at any size on white."""

    name: tyro.conf.Positional[Literal["openmoji"]]
    """The set."""
    out: Out
    """Folder to write; a finished one is left as it is."""
    split: Literal["train", "heldout", "all"] = "train"
    """The nine tenths for training, the tenth held out for classifiers, or both."""


Command = (
    Annotated[Write, tyro.conf.subcommand("write", prefix_name=False)]
    | Annotated[Demo, tyro.conf.subcommand("demo", prefix_name=False)]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    command = tyro.cli(Command, args=argv, prog="data_prep", description=DESCRIPTION)
    try:
        return _run(command)
    except InputError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command starts over", file=sys.stderr)
        return 130


def _run(command: Write | Demo) -> int:
    from data_prep.demo import OpenMoji
    from data_prep.sources import ImageFolder, Source
    from data_prep.write import Options, write

    source: Source = ImageFolder.open(command.source) if isinstance(command, Write) else OpenMoji.open(command.split)
    options = Options(command.size, command.format, command.quality, command.samples_per_shard, command.seed)
    index, finished = write(source, command.out, options, command.workers)
    classes = ", ".join(f"{entry.name} {entry.samples}" for entry in index.classes[:8])
    more = f" and {len(index.classes) - 8} more" if len(index.classes) > 8 else ""
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(
        f"data_prep: {command.out} {'was finished already' if finished else 'is finished'}: {index.samples:,} images "
        f"of {index.image_size} pixels in {len(index.shards)} shards, {size:.1f} MB; {classes}{more}"
    )
    return 0

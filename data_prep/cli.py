"""The command line: `data_prep write | index | demo | verify | inspect | stats | features | embed-text`.

Bad input: one line, exit code 2.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megapix.errors import InputError

if TYPE_CHECKING:
    from megapix.images import Policy
    from megapix.shards import Index
    from megapix.storage import Access

DESCRIPTION = "Make and check WebDataset tar shards, with an index, for `megapix train`."
CPUS = os.cpu_count() or 1

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are made."""

    size: int = 0
    """Height and width of the images in pixels; of aspect buckets, the square root of their area. Needed unless the
    policy is untouched."""
    policy: Literal["crop", "buckets", "untouched"] = "crop"
    """ADM's centre crop to a square; the nearest of several sizes of equal area; or the image as it is."""
    resize: Literal["exact", "fast"] = "exact"
    """exact is Pillow's, bit for bit that of ADM's reference statistics; fast is torch's, within 50 dB of it."""
    bucket_step: int = 0
    """Sides of aspect buckets are multiples of this; 0 takes an eighth of the size, and above 512 pixels 64 where that
    divides it."""
    bucket_ratio: float = 2.0
    """Largest ratio of the sides of an aspect bucket."""
    background: str = "#ffffff"
    """Colour on which transparent images are composited."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are rejected."""
    max_rejected: float = 0.001
    """Largest share of samples that may be left out because they cannot be used; more stop the run."""
    workers: int = CPUS
    """Processes."""


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Where captions are."""

    captions: Annotated[str, tyro.conf.arg(metavar="KEY[=WEIGHT],…")] = ""
    """Parquet columns or JSON keys that hold the captions, such as 'long=0.7,short=0.3'; by default the usual ones."""


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How patient reads of remote shards are."""

    timeout: float = 30.0
    """Seconds without a byte after which a remote request is given up and tried again."""
    retries: int = 5
    """Further tries after a remote request that failed."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions(ImageOptions):
    """How shards are written."""

    format: Literal["png", "jpg", "webp", "original"] = "png"
    """Image format in the shards: png is lossless; original keeps the bytes, with --policy untouched."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    seed: int = 0
    """Seed of the order in which samples are laid into shards."""
    retry_rejected: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the shards that miss rejected samples again."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what would be written, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class Write(ShardOptions, CaptionOptions):
    """Shards from images: a folder of class folders, ImageNet's synset tars (in a folder or one tar), a zip in EDM2's
    layout, parquet files, images with a text beside each, existing WebDataset shards, or a flat set with a label file.

    The same command goes on after an interruption; samples that cannot be used are listed in OUT/rejected.jsonl.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder or file to read."""
    out: Out
    """Folder to write; what is finished in it is left as it is."""
    kind: Annotated[
        Literal["shards", "imagenet", "edm2-zip", "parquet", "image-text", "image-folder", "labelled"] | None,
        tyro.conf.arg(name="source"),
    ] = None
    """Kind of source; by default it is recognised."""
    labels: Path | None = None
    """For a flat folder or tar of images: a text file with a line LABEL or NAME LABEL for each."""


@dataclass(frozen=True, kw_only=True)
class Demo(ShardOptions):
    """Shards of an embedded image set: OpenMoji's colour artwork (CC BY-SA 4.0), drawn at any size on white."""

    name: tyro.conf.Positional[Literal["openmoji", "openmoji-text"]]
    """The set: 901 pictures of 5 classes, or with more kinds of them and what people do 2,261 of 10, for text."""
    out: Out
    """Folder to write; what is finished in it is left as it is."""
    split: Literal["train", "heldout", "all"] = "train"
    """Seven eighths of the pictures for training, the eighth held out for classifiers, or both."""


@dataclass(frozen=True, kw_only=True)
class MakeIndex(ImageOptions, CaptionOptions, RemoteOptions):
    """An index over WebDataset shards that exist already, local or remote, without rewriting a byte.

    Each tar file is read once: hashed, its images decoded, its classes (cls) or captions (txt, json) listed. The image
    policy is recorded and applied on loading. The same command goes on after an interruption.
    """

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder, URL (http, https, s3, gs) or braces such as 'https://host/train-{0000..1023}.tar'."""
    policy: Literal["crop", "buckets"] = "crop"
    """ADM's centre crop to a square, or the nearest of several sizes of equal area."""
    out: Annotated[Path, tyro.conf.arg(metavar="INDEX")]
    """Folder for the index; give it to `megapix train` as --data.path."""


@dataclass(frozen=True, kw_only=True)
class Verify(RemoteOptions):
    """Read a whole shard folder and compare it with its index: sizes, hashes, members, records, classes, decoding."""

    folder: Folder
    """Shard folder."""
    workers: int = CPUS
    """Processes."""


@dataclass(frozen=True, kw_only=True)
class Inspect(RemoteOptions):
    """Print counts, sizes, captions and the class histogram of a shard folder, and draw a contact sheet."""

    folder: Folder
    """Shard folder."""
    sheet: Path | None = None
    """PNG file for a contact sheet, a row for each class."""
    columns: int = 12
    """Images in a row of the sheet."""
    rows: int = 16
    """Classes on the sheet, at most."""


@dataclass(frozen=True, kw_only=True)
class Stats(RemoteOptions):
    """Reference statistics for `megapix evaluate`: mean and covariance of an extractor's features of all images, and
    the features of some of them. On a GPU where there is one."""

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """Shard folder, or index over shards."""
    out: Path
    """File to write, such as stats.npz."""
    extractor: Literal["effnet_lite0", "inception"] = "effnet_lite0"
    """EfficientNet-Lite0, whose weights are a package (extra evaluate), or FID's Inception (extra fid)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor inception."""
    features: int = 10_000
    """Images whose features are kept for KID, precision and recall, evenly spread."""
    batch: int = 64
    """Images that go through the extractor together."""
    workers: int = CPUS
    """Processes that read and decode."""


@dataclass(frozen=True, kw_only=True)
class MakeFeatures(RemoteOptions):
    """A frozen encoder's features of every image, for `megapix train --repa.features`. On a GPU where there is one.

    The same command goes on after an interruption: a file that is finished is not computed again.
    """

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """Shard folder, or index over shards."""
    encoder: str
    """Folder or Hugging Face hub name of a DINOv2 (or with registers, or DINOv3 ViT), as in repa.encoder."""
    out: Annotated[Path, tyro.conf.arg(metavar="FEATURES")]
    """Folder for the features; give it to `megapix train` as --repa.features."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format that the encoder computes in and its features are stored in; that of the run's repa.dtype."""
    flip: tyro.conf.FlagCreatePairsOff[bool] = True
    """Whether mirror images are computed too, for runs with data.flip; without them, half the time and disk."""
    batch: int = 64
    """Images that go through the encoder together."""
    workers: int = CPUS
    """Processes that read and decode."""


@dataclass(frozen=True, kw_only=True)
class EmbedText:
    """A frozen text encoder's features of every caption, stored with the shards. On a GPU where there is one.

    The same command goes on after an interruption: a file that is finished is not computed again.
    """

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """Shard folder, or index over shards; the features are written into it."""
    encoder: str
    """Folder or Hugging Face hub name of a text encoder, as in text.encoder."""
    max_tokens: int = 300
    """Tokens of a caption that are kept, as in text.max_tokens."""
    normalize: Literal["rms", "none"] = "rms"
    """'rms' divides the features of each token by their root mean square, as in text.normalize."""
    scale: float = 0.01
    """Factor of the features, after that, as in text.scale."""
    prefix: str = ""
    """Instruction before each caption that is not empty, as in text.prefix."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format that the encoder computes in, as in text.dtype; features are stored in bf16."""
    batch: int = 64
    """Captions that go through the encoder together."""
    replace: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove features of another encoder, other options or other shards that are stored there."""


Command = (
    Annotated[Write, tyro.conf.subcommand("write", prefix_name=False)]
    | Annotated[MakeIndex, tyro.conf.subcommand("index", prefix_name=False)]
    | Annotated[Demo, tyro.conf.subcommand("demo", prefix_name=False)]
    | Annotated[Verify, tyro.conf.subcommand("verify", prefix_name=False)]
    | Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
    | Annotated[Stats, tyro.conf.subcommand("stats", prefix_name=False)]
    | Annotated[MakeFeatures, tyro.conf.subcommand("features", prefix_name=False)]
    | Annotated[EmbedText, tyro.conf.subcommand("embed-text", prefix_name=False)]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    command = tyro.cli(Command, args=argv, prog="data_prep", description=DESCRIPTION)
    run: Any = {
        Write: _write,
        Demo: _write,
        MakeIndex: _index,
        Verify: _verify,
        Inspect: _inspect,
        Stats: _stats,
        MakeFeatures: _features,
        EmbedText: _embed_text,
    }[type(command)]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(run(command))
    except InputError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"data_prep: error: {str(error.filename or '')!r}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "starts anew" if isinstance(command, Stats) else "goes on from here"
        print(f"data_prep: interrupted; the same command {goes_on}", file=sys.stderr)
        return 130


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _write(command: Write | Demo) -> int:
    from data_prep import plan
    from data_prep.captions import parse_keys
    from data_prep.demo import OpenMoji
    from data_prep.source import Source
    from data_prep.sources import open_source
    from data_prep.write import write

    source: Source
    if isinstance(command, Demo):
        source = OpenMoji.open(command.split, command.name)
    else:
        if command.source.is_dir() and command.out.resolve().is_relative_to(command.source.resolve()):
            raise InputError(
                f"OUT {str(command.out)!r} lies inside SOURCE {str(command.source)!r}; give another folder"
            )
        source = open_source(command.source, command.kind, command.labels, parse_keys(command.captions))
    options = plan.Options(_policy(command), command.format, command.quality, command.samples_per_shard, command.seed)
    if command.dry_run:
        options.check()
        shards = -(-len(source.items) // options.samples_per_shard)
        about = "at least " if len(options.policy.buckets) > 1 else ""
        print(
            f"data_prep: would write {len(source.items):,} images of {_size(command.size)} ({source.about['kind']}, "
            f"{len(source.classes)} classes) in {about}{shards} shards to {command.out}"
        )
        return 0
    index, was_finished = write(
        source, command.out, options, command.workers, command.max_rejected, command.retry_rejected
    )
    _summary(command.out, index, was_finished)
    return 0


def _index(command: MakeIndex) -> int:
    from data_prep.captions import parse_keys
    from data_prep.index import index

    made, was_finished = index(
        command.shards,
        command.out,
        _policy(command),
        command.workers,
        command.max_rejected,
        _access(command),
        keys=parse_keys(command.captions),
    )
    _summary(command.out, made, was_finished)
    return 0


def _policy(command: ImageOptions) -> Policy:
    from megapix.images import Policy

    match = re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", command.background)
    if not match:
        raise InputError(f"--background = {command.background!r}: expected a colour such as '#ffffff'")
    if command.policy == "untouched" and command.size:
        raise InputError(f"--size = {command.size} has no meaning with --policy untouched")
    red, green, blue = (int(part, 16) for part in match.groups())
    return Policy.make(
        command.policy,
        command.size,
        command.bucket_step,
        command.bucket_ratio,
        fast=command.resize == "fast",
        background=(red, green, blue),
        min_side=command.min_side,
    )


def _access(command: RemoteOptions) -> Access:
    from megapix.storage import Access

    if not 0 < command.timeout < float("inf") or command.retries < 0:
        raise InputError(f"--timeout = {command.timeout}, --retries = {command.retries}: expected above 0, 0 or more")
    return Access(command.timeout, command.retries)


def _size(size: int) -> str:
    return f"{size} pixels" if size else "any size"


def _summary(out: Path, index: Index, was_finished: bool) -> None:
    classes = ", ".join(f"{entry.name} {entry.samples}" for entry in index.classes[:8])
    more = f" and {len(index.classes) - 8} more" if len(index.classes) > 8 else ""
    size = sum(shard.bytes for shard in index.files) / 1e6
    print(
        f"data_prep: {out} {'was finished already' if was_finished else 'is finished'}: {index.samples:,} "
        f"images of {_size(index.image_policy['size'])} in {len(index.files)} shards, {size:.1f} MB; {classes}{more}"
    )
    if index.rejected:
        print(f"data_prep: {index.rejected} samples were rejected; {out / 'rejected.jsonl'} says why")


def _verify(command: Verify) -> int:
    from data_prep.verify import verify

    faults = 0
    for fault in verify(command.folder, command.workers, _access(command)):
        print(f"data_prep: fault: {fault}", file=sys.stderr)
        faults += 1
    print(f"data_prep: {command.folder}: {f'{faults} faults' if faults else 'everything is as the index says'}")
    return 2 if faults else 0


def _inspect(command: Inspect) -> int:
    from data_prep.inspect import contact_sheet, report

    if min(command.columns, command.rows) < 1:
        raise InputError(f"--columns = {command.columns}, --rows = {command.rows}: expected at least 1")
    for line in report(command.folder):
        print(line)
    if command.sheet:
        shown = contact_sheet(command.folder, command.sheet, command.columns, command.rows, _access(command))
        print(f"data_prep: {command.sheet}: {shown} images")
    return 0


def _stats(command: Stats) -> int:
    from data_prep.stats import stats

    made = stats(
        command.shards,
        command.out,
        command.extractor,
        command.extractor_weights,
        command.features,
        command.batch,
        command.workers,
        _access(command),
    )
    print(
        f"data_prep: {command.out}: {made.extractor} of {made.moments.count:,} images, "
        f"with the features of {len(made.features):,}"
    )
    return 0


def _features(command: MakeFeatures) -> int:
    from data_prep.features import features

    made, was_finished = features(
        command.shards,
        command.encoder,
        command.out,
        command.dtype,
        command.flip,
        command.batch,
        command.workers,
        _access(command),
    )
    samples, size = sum(file.samples for file in made.files), sum(map(made.bytes_of, made.files)) / 1e6
    print(
        f"data_prep: {command.out} {'was finished already' if was_finished else 'is finished'}: features of "
        f"{samples:,} images{' and their mirror images' if made.flip else ''}, width {made.width}, {made.dtype}, "
        f"in {len(made.files)} files, {size:.1f} MB"
    )
    return 0


def _embed_text(command: EmbedText) -> int:
    from data_prep.embed_text import embed_text
    from megapix.text_features import Recipe

    c = command
    recipe = Recipe(max_tokens=c.max_tokens, normalize=c.normalize, scale=c.scale, prefix=c.prefix, dtype=c.dtype)
    made, was_finished, first_cut = embed_text(c.shards, c.encoder, recipe, c.batch, c.replace)
    if first_cut:
        print(f"data_prep: {first_cut}")
    captions, tokens, cut = (sum(getattr(file, key) for file in made.files) for key in ("captions", "tokens", "cut"))
    size = sum(map(made.bytes_of, made.all_files))
    print(
        f"data_prep: {c.shards} {'was finished already' if was_finished else 'is finished'}: text features of "
        f"{captions:,} captions, {tokens:,} tokens of width {made.recipe.width}, {size:,} bytes; {cut:,} captions were "
        f"cut at {made.recipe.max_tokens} tokens"
    )
    return 0

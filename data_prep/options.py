"""The options of `data_prep`: a dataclass for each command, and for what several of them share.

Their docstrings are the commands' `--help`; what each command does with its options is in `cli.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.filters.options import FilterOptions

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
    resize: Literal["exact", "fast", "draft"] = "exact"
    """exact is Pillow's, bit for bit that of ADM's reference statistics; fast is torch's, within 50 dB of it; draft
    decodes JPEG of four times the size and more at 1/2, 1/4 or 1/8, never below twice the size."""
    bucket_step: int = 0
    """Sides of aspect buckets are multiples of this; 0 takes an eighth of the size, and above 512 pixels 64 where that
    divides it."""
    bucket_ratio: float = 2.0
    """Largest ratio of the sides of an aspect bucket."""
    bucket_min: int = 0
    """Aspect buckets with fewer samples are merged into the nearest that has as many: give a run's global batch, since
    each of its steps holds one bucket. 0 leaves them."""
    icc: Literal["convert", "ignore"] = "convert"
    """Embedded ICC profiles: convert the colours to sRGB, or leave them as they are stored."""
    background: str = "#ffffff"
    """Colour on which transparent images are composited."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are filtered."""
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
class TarOptions:
    """What becomes of damaged tar files."""

    max_rejected_tars: float = 0.01
    """Largest share of tar files that may be left out because they cannot be read; above 0, one may always be."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What is a sample, and its class."""

    classes: Annotated[str, tyro.conf.arg(metavar="FILE|none")] = ""
    """Classes: a file of names in order (one a line), a JSON list of them, or a JSON object name -> number or number ->
    name; 'none' makes everything one class. By default labels that are numbers are the class numbers, and names are put
    in order."""
    image_key: Annotated[str, tyro.conf.arg(metavar="KIND[,KIND]…")] = ""
    """Which member of a tar file is a sample's image: what follows the first dot of its name, such as image.jpg; of
    several the first that is there."""
    split: Annotated[str, tyro.conf.arg(metavar="NAME|all")] = ""
    """Of splits that lie in one folder (train-*, validation-*, test-*) the one to take, or all together; by default
    train."""
    hold_out: Annotated[str, tyro.conf.arg(metavar="N|SHARE")] = ""
    """Samples that go into a second folder, OUT-held-out, and not into OUT: a number such as 5000 or a share such as
    0.01; chosen by a hash of their names."""


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How patient reads of remote shards are."""

    timeout: float = 30.0
    """Seconds without a byte after which a remote request is given up and tried again."""
    outage_minutes: float = 10.0
    """Minutes for which shards that cannot be read now are waited for."""
    retries: int | None = None
    """Has no effect any more: outage-minutes takes its place."""


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """One output by many machines."""

    part: Annotated[str, tyro.conf.arg(metavar="I/N|auto|auto/N")] = ""
    """The share of the work that this process does, I from 0 to N - 1; N of them, on as many machines, make one output
    in a folder that all of them see. auto takes I and N from SLURM's array, auto/N takes I from it or from a Kubernetes
    Job."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions(ImageOptions):
    """How shards are written."""

    format: Literal["png", "jpg", "webp", "original"] = "png"
    """Image format in the shards: png is lossless; original keeps the bytes of PNG, JPEG and WebP, with --policy
    untouched, and makes PNG of others."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    seed: int = 0
    """Seed of the order in which samples are laid into shards."""
    rehash: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compare the hash of every shard that is there, whatever its size and time of modification say."""
    retry_rejected: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the shards that miss rejected samples again."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what would be written and what each filter takes, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class Write(ShardOptions, CaptionOptions, LabelOptions, FilterOptions, TarOptions, PartOptions):
    """Shards from images: a folder of class folders, ImageNet's synset tars (in a folder or one tar), a zip in EDM2's
    layout, parquet files, images with a text beside each or with a metadata file, existing WebDataset shards, or a flat
    set with a label file.

    The same command resumes after an interruption; samples that cannot be used are listed in OUT/rejected.jsonl.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder or file to read."""
    out: Out
    """Folder to write; what is finished in it is left as it is."""
    kind: Annotated[
        Literal["shards", "imagenet", "edm2-zip", "metadata", "parquet", "image-text", "image-folder", "labelled"]
        | None,
        tyro.conf.arg(name="source"),
    ] = None
    """Kind of source; by default it is recognised."""
    labels: Path | None = None
    """For a flat folder or tar of images: a text file with a line LABEL or NAME LABEL for each, CSV, TSV or JSON."""
    class_order: Literal["name", "number"] | None = None
    """Order of class folders; by default that of their numbers if all are numbers, else of their names."""
    keep: Annotated[str, tyro.conf.arg(metavar="COLUMN,…")] = ""
    """JSON keys or parquet columns that are kept in the samples' JSON, such as aesthetic,similarity."""


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
class MakeIndex(ImageOptions, CaptionOptions, LabelOptions, FilterOptions, TarOptions, RemoteOptions, PartOptions):
    """An index over WebDataset shards that exist already, local or remote, without rewriting a byte.

    Each tar file is read once: hashed, its images decoded, its classes (cls) or captions (txt, json) listed. The image
    policy is recorded and applied on loading. The same command resumes after an interruption.
    """

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder, URL (http, https, s3, gs) or braces such as 'https://host/train-{0000..1023}.tar'."""
    policy: Literal["crop", "buckets"] = "crop"
    """ADM's centre crop to a square, or the nearest of several sizes of equal area."""
    out: Annotated[Path, tyro.conf.arg(metavar="INDEX")]
    """Folder for the index; give it to `megapix train` as --data.path."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what each filter takes of local tar files, and write nothing."""
    check: Literal["decode", "headers", "none"] = "decode"
    """How closely images are looked at: every one is decoded, its header alone is read, or it is trusted. What a later
    command asks more of is read again."""
    rehash: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read every tar file again and compare its hash, whatever its size and time of modification say."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One index over folders that were prepared apart, by the names of their classes; their tar files stay as they are.

    The parts have the same image policy. Their order is the order of the samples.
    """

    parts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PART…")]
    """Folders that `write` or `index` has made."""
    out: Annotated[Path, tyro.conf.arg(metavar="INDEX")]
    """Folder for the index; give it to `megapix train` as --data.path."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A mix file: sets that `megapix train` mixes by weight, each with epochs of its own.

    The sets have the same image policy; their classes are joined by name.
    """

    sets: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SET=WEIGHT…")]
    """Shard folders, indexes or their URLs, each with the share of samples that is taken from it, such as 0.7."""
    out: Annotated[Path, tyro.conf.arg(metavar="MIX.json")]
    """File to write, .json or .yaml; give it to `megapix train` as --data.path."""


@dataclass(frozen=True, kw_only=True)
class Verify(RemoteOptions, PartOptions):
    """Read a whole shard folder and compare it with its index: sizes, hashes, members, records, classes, decoding."""

    folder: Folder
    """Shard folder."""
    out: Path | None = None
    """File for the faults, a line each; parts need one, in which all of theirs come together."""
    workers: int = CPUS
    """Processes."""


@dataclass(frozen=True, kw_only=True)
class Inspect(RemoteOptions):
    """Print counts, sizes, captions and the class histogram of a shard folder, and draw a contact sheet."""

    folder: Folder
    """Shard folder, or mix file."""
    sheet: Path | None = None
    """PNG file for a contact sheet, a row for each class."""
    columns: int = 12
    """Images in a row of the sheet."""
    rows: int = 16
    """Classes on the sheet, at most."""


@dataclass(frozen=True, kw_only=True)
class Stats(RemoteOptions, PartOptions):
    """Reference statistics for `megapix evaluate`: mean and covariance of an extractor's features of all images, and
    the features of some of them. On a GPU where there is one.

    The same command resumes after an interruption: a block of images that is finished is not computed again.
    """

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
class MakeFeatures(RemoteOptions, PartOptions):
    """A frozen encoder's features of every image, for `megapix train --repa.features`. On a GPU where there is one.

    The same command resumes after an interruption: a file that is finished is not computed again.
    """

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """Shard folder, or index over shards."""
    encoder: str
    """Folder or Hugging Face hub name of a DINOv2 (or with registers, or DINOv3 ViT), as in repa.encoder."""
    out: Annotated[Path, tyro.conf.arg(metavar="FEATURES")]
    """Folder for the features; give it to `megapix train` as --repa.features."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype that the encoder computes in and its features are stored in; that of the run's repa.dtype."""
    flip: tyro.conf.FlagCreatePairsOff[bool] = True
    """Whether mirror images are computed too, for runs with data.flip; without them, half the time and disk."""
    batch: int = 64
    """Images that go through the encoder together."""
    workers: int = CPUS
    """Processes that read and decode."""


@dataclass(frozen=True, kw_only=True)
class EmbedText(PartOptions):
    """A frozen text encoder's features of every caption, stored with the shards. On a GPU where there is one.

    The same command resumes after an interruption: a file that is finished is not computed again.
    """

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """Shard folder, or index over shards; the features are written into it."""
    encoder: str
    """Folder or Hugging Face hub name of a text encoder, as in text.encoder."""
    max_tokens: int = 300
    """Tokens of a caption that are kept, as in text.max_tokens."""
    normalize: Literal["rms", "none"] = "none"
    """'rms' divides the features of each token by their root mean square, as in text.normalize."""
    scale: float = 1.0
    """Factor of the features, after that, as in text.scale."""
    prefix: str | None = None
    """Instruction before each caption that is not empty, as in text.prefix; by default that of the presets t2i-512 to
    t2i-1024-ms, and "" is none, as t2i-tiny has it."""
    padding: Literal["attended", "masked"] = "attended"
    """'attended' stores max_tokens of each caption, with what the encoder gives at tokens of padding; 'masked' the
    caption's own, as in text.padding."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype that the encoder computes in, as in text.dtype; features are stored in bf16."""
    batch: int = 64
    """Captions that go through the encoder together."""
    replace: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove features of another encoder, other options or other shards that are stored there."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Put together what all parts of a command (--part) have made. The last part does so by itself; this is for when it
    was killed then, and says which parts are missing."""

    out: Out
    """What the parts make: OUT, INDEX, FEATURES or SHARDS, or the file of statistics or faults."""


COMMANDS: dict[str, type] = {
    "write": Write,
    "index": MakeIndex,
    "merge": Merge,
    "mix": Mix,
    "demo": Demo,
    "verify": Verify,
    "inspect": Inspect,
    "stats": Stats,
    "features": MakeFeatures,
    "embed-text": EmbedText,
    "finish": Finish,
}
"""Name -> its options."""
Command = (
    Annotated[Write, tyro.conf.subcommand("write", prefix_name=False)]
    | Annotated[MakeIndex, tyro.conf.subcommand("index", prefix_name=False)]
    | Annotated[Merge, tyro.conf.subcommand("merge", prefix_name=False)]
    | Annotated[Mix, tyro.conf.subcommand("mix", prefix_name=False)]
    | Annotated[Demo, tyro.conf.subcommand("demo", prefix_name=False)]
    | Annotated[Verify, tyro.conf.subcommand("verify", prefix_name=False)]
    | Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
    | Annotated[Stats, tyro.conf.subcommand("stats", prefix_name=False)]
    | Annotated[MakeFeatures, tyro.conf.subcommand("features", prefix_name=False)]
    | Annotated[EmbedText, tyro.conf.subcommand("embed-text", prefix_name=False)]
    | Annotated[Finish, tyro.conf.subcommand("finish", prefix_name=False)]
)

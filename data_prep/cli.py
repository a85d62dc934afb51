"""The command line: `data_prep write | index | demo | verify | inspect | stats | features | embed-text`.

Bad input: one line, exit code 2.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import tyro

from data_prep.options import (
    Command,
    Demo,
    EmbedText,
    ImageOptions,
    Inspect,
    MakeFeatures,
    MakeIndex,
    RemoteOptions,
    Stats,
    Verify,
    Write,
)
from megapix import __version__, outage
from megapix.errors import InputError, StorageError

if TYPE_CHECKING:
    from megapix.shards.image_policy import Policy
    from megapix.shards.index import Index
    from megapix.shards.storage import Access

DESCRIPTION = "Make and check WebDataset tar shards, with an index, for `megapix train`."


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(f"data_prep {__version__}")
        return 0
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
    except StorageError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"data_prep: error: {str(error.filename or '')!r}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        after = "starts again" if isinstance(command, Stats) else "resumes from here"
        print(f"data_prep: interrupted; the same command {after}", file=sys.stderr)
        return 130


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _write(command: Write | Demo) -> int:
    from data_prep.sources import open_source
    from data_prep.sources.base import Source
    from data_prep.sources.captions import parse_keys
    from data_prep.sources.openmoji import OpenMoji
    from data_prep.sources.reading import Reading
    from data_prep.writing.plan import Options
    from data_prep.writing.write import write

    source: Source
    if isinstance(command, Demo):
        source = OpenMoji.open(command.split, command.name)
    else:
        if command.source.is_dir() and command.out.resolve().is_relative_to(command.source.resolve()):
            raise InputError(
                f"OUT {str(command.out)!r} lies inside SOURCE {str(command.source)!r}; give another folder"
            )
        source = open_source(command.source, command.kind, Reading(parse_keys(command.captions), command.labels))
    options = Options(_policy(command), command.format, command.quality, command.samples_per_shard, command.seed)
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
    from data_prep.sources.captions import parse_keys
    from data_prep.sources.reading import Reading
    from data_prep.writing.index import index

    made, was_finished = index(
        command.shards,
        command.out,
        _policy(command),
        command.workers,
        command.max_rejected,
        _access(command),
        reading=Reading(parse_keys(command.captions)),
    )
    _summary(command.out, made, was_finished)
    return 0


def _policy(command: ImageOptions) -> Policy:
    from megapix.shards.image_policy import Policy

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
    from megapix.shards.storage import Access

    endless = float("inf")
    if not 0 < command.timeout < endless or not 0 <= command.outage_minutes < endless:
        raise InputError(
            f"--timeout = {command.timeout}, --outage-minutes = {command.outage_minutes}: expected above 0, 0 or more"
        )
    if command.retries is not None:
        print("data_prep: warning: --retries has no effect any more: --outage-minutes takes its place", file=sys.stderr)
    outage.wait_at_most(command.outage_minutes)
    return Access(command.timeout, command.outage_minutes)


def _size(size: int) -> str:
    return f"{size} pixels" if size else "any size"


def _summary(out: Path, index: Index, was_finished: bool) -> None:
    from data_prep.writing import account

    classes = ", ".join(f"{entry.name} {entry.samples}" for entry in index.classes[:8])
    more = f" and {len(index.classes) - 8} more" if len(index.classes) > 8 else ""
    size = sum(shard.bytes for shard in index.files) / 1e6
    print(
        f"data_prep: {out} {'was finished already' if was_finished else 'is finished'}: {index.samples:,} "
        f"images of {_size(index.image_policy['size'])} in {len(index.files)} shards, {size:.1f} MB; {classes}{more}"
    )
    if counted := account.load(out):
        print(f"data_prep: of {counted.listed:,} entries: {counted}")
    if index.rejected:
        print(f"data_prep: {index.rejected} samples were rejected; {out / 'rejected.jsonl'} says why")


def _verify(command: Verify) -> int:
    from data_prep.passes.verify import verify

    faults = 0
    for fault in verify(command.folder, command.workers, _access(command)):
        print(f"data_prep: fault: {fault}", file=sys.stderr)
        faults += 1
    print(f"data_prep: {command.folder}: {f'{faults} faults' if faults else 'everything is as the index says'}")
    return 2 if faults else 0


def _inspect(command: Inspect) -> int:
    from data_prep.passes.inspect import contact_sheet, report

    if min(command.columns, command.rows) < 1:
        raise InputError(f"--columns = {command.columns}, --rows = {command.rows}: expected at least 1")
    for line in report(command.folder):
        print(line)
    if command.sheet:
        shown = contact_sheet(command.folder, command.sheet, command.columns, command.rows, _access(command))
        print(f"data_prep: {command.sheet}: {shown} images")
    return 0


def _stats(command: Stats) -> int:
    from data_prep.passes.statistics import stats

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
    from data_prep.passes.image_features import features

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
    from data_prep.passes.text_features import embed_text
    from megapix.shards.text_recipe import Recipe

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

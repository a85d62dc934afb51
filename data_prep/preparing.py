"""What `write`, `demo`, `index` and `merge` do with their options, and what they print."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.options import Demo, Finish, ImageOptions, MakeIndex, Merge, PartOptions, RemoteOptions, Write
from data_prep.parts.part import WHOLE, Part, parse_part
from megapix import outage
from megapix.errors import InputError

if TYPE_CHECKING:
    from data_prep.listing.base import Source
    from data_prep.listing.reading import Reading
    from data_prep.writing.plan import Options
    from megapix.shards.image_policy import Policy
    from megapix.shards.index import Index
    from megapix.shards.statistics import Reference
    from megapix.shards.storage import Access


def write_shards(command: Write | Demo) -> int:
    """Write shards of a source, or say what would be written; returns the exit code."""
    from data_prep.filters.options import filters_of, kept_columns
    from data_prep.filters.rules import NO_FILTERS
    from data_prep.listing.archives import UNPACKED
    from data_prep.parts.folder import PartDone
    from data_prep.sources import open_source
    from data_prep.sources.openmoji import OpenMoji
    from data_prep.writing.held_out import folder_beside, folders_of, parse_hold_out
    from data_prep.writing.plan import Options
    from data_prep.writing.write import write

    source: Source
    unpacked, was_there = command.out / UNPACKED, command.out.exists()
    hold, part = None, WHOLE if isinstance(command, Demo) else part_of(command)
    policy = _policy(command)
    filters, keep = (NO_FILTERS, ()) if isinstance(command, Demo) else (filters_of(command), kept_columns(command.keep))
    options = Options(
        policy,
        command.format,
        command.quality,
        command.samples_per_shard,
        command.seed,
        command.bucket_min,
        filters,
        keep,
    )
    options.check()
    if isinstance(command, Demo):
        source = OpenMoji.open(command.split, command.name)
    else:
        hold = parse_hold_out(command.hold_out)
        for out in (command.out, *([folder_beside(command.out)] if hold else [])):
            if command.source.is_dir() and out.resolve().is_relative_to(command.source.resolve()):
                raise InputError(f"OUT {str(out)!r} lies inside SOURCE {str(command.source)!r}; give another folder")
        source = open_source(command.source, command.kind, _reading(command, (*filters.columns, *keep)))
    for line in (*source.entries.remarks, *source.entries.losses):
        _say(line)
    folders = folders_of(source, command.out, hold)
    if command.dry_run:
        for some, out in folders:
            _dry_run(some, out, options, command.workers)
        shutil.rmtree(unpacked, ignore_errors=True)
        if not was_there:
            with suppress(FileNotFoundError):
                command.out.rmdir()
        return 0
    made, waiting = [], list[str]()
    for some, out in folders:
        args = some, out, options, command.workers, command.max_rejected, command.retry_rejected
        try:
            made.append((out, *write(*args, of=len(source.items), part=part, rehash=command.rehash)))
        except PartDone as done:
            waiting.append(str(done))
    if part.whole:
        shutil.rmtree(unpacked, ignore_errors=True)
    for out, index, was_finished in made:
        _summary(out, index, was_finished, source.entries.remarks)
    for line in waiting:
        _say(line)
    return 0


def _dry_run(source: Source, out: Path, options: Options, workers: int) -> None:
    from data_prep.filters.dry_run import of_source
    from data_prep.listing.captions import lacking

    filters = options.filters.with_least_side(options.policy.min_side)
    counted = of_source(source, replace(options, filters=filters), workers)
    for line in counted.table(filters.options) if filters.options else ():
        print(line)
    shards = -(-counted.left // options.samples_per_shard)
    about = "at least " if len(options.policy.buckets) > 1 else ""
    _say(
        f"would write {counted.left:,} images of {_size(options.policy.size)} ({source.about['kind']}, "
        f"{len(source.classes)} classes) in {about}{shards} shards to {out}"
    )
    without = sum(not item.caption for item in source.items)
    for line in lacking(without, len(source.items), source.entries.captioned):
        _say(line)


def make_index(command: MakeIndex) -> int:
    """Index tar files, or say what filters would take; returns the exit code."""
    from data_prep.filters.options import filters_of
    from data_prep.listing.tar_set import without_secrets
    from data_prep.writing.held_out import folder_beside, parse_hold_out
    from data_prep.writing.index import index
    from megapix.shards.index import read_index
    from megapix.shards.storage import QUERY

    hold, part = parse_hold_out(command.hold_out), part_of(command)
    said = list[str]()

    def say(line: str) -> None:
        said.append(line)
        _say(line)

    policy, filters = _policy(command), filters_of(command)
    reading = _reading(command, filters.columns)
    shards, query = without_secrets(command.shards)
    access = access_of(command)
    if query:
        access = replace(access, query=query)
        print(f"data_prep: the query is not recorded: what reads the index needs it in {QUERY}", file=sys.stderr)
    if command.dry_run:
        from data_prep.filters.dry_run import of_shards

        filters = filters.with_least_side(policy.min_side)
        counted = of_shards(shards, policy, reading, filters, command.workers, access)
        for line in counted.table(filters.options):
            print(line)
        for name, reason in counted.tars.items():
            _say(f"tar file {name!r} cannot be read: {reason}")
        _say(f"would index {counted.left:,} images of {_size(command.size)} in {command.out}")
        return 0
    made, was_finished = index(
        shards,
        command.out,
        policy,
        command.workers,
        command.max_rejected,
        access,
        reading=reading,
        rehash=command.rehash,
        hold=hold,
        bucket_min=command.bucket_min,
        filters=filters,
        check=command.check,
        say=say,
        part=part,
    )
    if hold:
        held = folder_beside(command.out)
        _summary(held, read_index(held), was_finished, said)
    _summary(command.out, made, was_finished, said)
    return 0


def merge_parts(command: Merge) -> int:
    """One index over prepared folders; returns the exit code."""
    from data_prep.passes.merge import merge

    _summary(command.out, *merge(command.parts, command.out))
    return 0


def part_of(command: PartOptions) -> Part:
    """The share of the work that is this process's own.

    Raises:
        InputError: --part has no meaning, or none beside another option.
    """
    part = parse_part(command.part)
    for option in ("dry_run", "retry_rejected", "replace") if not part.whole else ():
        if getattr(command, option, False):
            raise InputError(f"--part {part}: expected without --{option.replace('_', '-')}, which is for one machine")
    return part


def finish_parts(command: Finish) -> int:
    """Put together what parts have made; returns the exit code."""
    from data_prep.parts import indexed
    from data_prep.parts.folder import parts_of
    from data_prep.passes import image_features, text_features, verify
    from data_prep.writing import write
    from data_prep.writing.held_out import folder_beside
    from megapix.shards.index import read_index

    parts = parts_of(command.out)
    if parts is None:
        raise InputError(f"no parts are at work on {str(command.out)!r}: it is finished, or was not begun with --part")
    match parts.command:
        case "write":
            _summary(parts.out, parts.finish(write.close), False)
        case "index":
            made = parts.finish(partial(indexed.close, say=_say))
            if made.source.get("hold_out"):
                held = folder_beside(parts.out)
                _summary(held, read_index(held), False)
            _summary(parts.out, made, False)
        case "features":
            made_features = parts.finish(image_features.close)
            _say(f"{parts.out} is finished: features in {len(made_features.files)} files")
        case "stats":
            from data_prep.passes import statistics  # loads torch

            report_statistics(parts.out, parts.finish(statistics.close), False)
        case "verify":
            return report_faults(str(parts.out), parts.finish(verify.close))
        case "embed-text":
            made_text = parts.finish(text_features.close)
            _say(f"{parts.out} is finished: text features in {len(made_text.files) + 1} files")
    return 0


def report_statistics(out: Path, made: Reference, was_finished: bool) -> None:
    """Print what statistics are of."""
    _say(
        f"{out} {'was finished already' if was_finished else 'is finished'}: {made.extractor} of "
        f"{made.moments.count:,} images, with the features of {len(made.features):,}"
    )


def report_faults(shown: str, faults: Sequence[str]) -> int:
    """Print how many faults there are; returns the exit code."""
    _say(f"{shown}: {f'{len(faults)} faults' if faults else 'everything is as the index says'}")
    return 2 if faults else 0


def _reading(command: Write | MakeIndex, columns: Sequence[str]) -> Reading:
    from data_prep.listing.archives import UNPACKED
    from data_prep.listing.captions import parse_keys
    from data_prep.listing.classes import parse_classes
    from data_prep.listing.reading import Reading, parse_image_keys
    from data_prep.listing.splits import check_split
    from data_prep.lists.tar_lists import folder_in

    return Reading(
        parse_keys(command.captions),
        command.labels if isinstance(command, Write) else None,
        tuple(dict.fromkeys(columns)),
        classes=parse_classes(command.classes),
        class_order=command.class_order if isinstance(command, Write) else None,
        image_keys=parse_image_keys(command.image_key),
        split=check_split(command.split),
        unpacked=command.out / UNPACKED if isinstance(command, Write) else None,
        lists=folder_in(command.out) if isinstance(command, Write) and not command.dry_run else None,
        workers=command.workers,
        max_rejected_tars=command.max_rejected_tars,
    )


def _say(line: str) -> None:
    print(f"data_prep: {line}", flush=True)


def _policy(command: ImageOptions) -> Policy:
    from megapix.shards.image_policy import Policy

    match = re.fullmatch(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", command.background)
    if not match:
        raise InputError(f"--background = {command.background!r}: expected a colour such as '#ffffff'")
    if command.policy == "untouched" and command.size:
        raise InputError(f"--size = {command.size} has no meaning with --policy untouched")
    if command.policy != "untouched" and not command.size:
        raise InputError(
            "--size is needed: height and width of the images in pixels, of aspect buckets the square root of their "
            f"area, such as: {_typed(command)} --size 256"
        )
    red, green, blue = (int(part, 16) for part in match.groups())
    return Policy.make(
        command.policy,
        command.size,
        command.bucket_step,
        command.bucket_ratio,
        command.resize,
        background=(red, green, blue),
        min_side=command.min_side,
        icc=command.icc,
    )


def _typed(command: ImageOptions) -> str:
    """The command in short, to be completed by who reads it; without the queries of signed URLs."""
    from megapix.shards.storage import shown

    match command:
        case Write():
            words = ["write", str(command.source), str(command.out)]
        case Demo():
            words = ["demo", command.name, str(command.out)]
        case MakeIndex():
            words = ["index", shown(command.shards), "--out", str(command.out)]
        case _:
            words = []
    return shlex.join(["data_prep", *words])


def access_of(command: RemoteOptions) -> Access:
    """How remote shards are read.

    Raises:
        InputError: a number of seconds or minutes that has no meaning.
    """
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


def _summary(out: Path, index: Index, was_finished: bool, said: Sequence[str] = ()) -> None:
    """The closing lines, without the remarks that are `said` already."""
    from data_prep.passes.inspect import rare_buckets
    from data_prep.writing import account

    classes = ", ".join(f"{entry.name} {entry.samples}" for entry in index.classes[:8])
    more = f" and {len(index.classes) - 8} more" if len(index.classes) > 8 else ""
    size = int(index.table.file_bytes.sum()) / 1e6
    _say(
        f"{out} {'was finished already' if was_finished else 'is finished'}: {index.samples:,} "
        f"images of {_size(index.image_policy['size'])} in {len(index.files)} shards, {size:.1f} MB; {classes}{more}"
    )
    if counted := account.load(out):
        _say(f"of {counted.listed:,} entries: {counted}")
        for remark in counted.remarks:
            if remark not in said:
                _say(remark)
        for line in counted.noted(index.image_policy["size"]):
            _say(line)
    for line in rare_buckets(index):
        _say(line)
    if index.rejected:
        _say(f"{index.rejected} samples were rejected; {out / 'rejected.jsonl'} says why")
    if tars := index.source.get("rejected_tars"):
        then = "give the same command" if index.base else "prepare them in a second folder for data_prep merge"
        _say(f"{tars} of these are tar files that cannot be read; mend them and {then}")

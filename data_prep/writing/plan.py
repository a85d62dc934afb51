"""The plan of an output folder: which sample goes where, a function of the source's list and the options alone.

It is recorded in `plan.json` (and, with aspect buckets, `buckets.bin`: the bucket of each sample) before the first
shard is written. The same command finds it and resumes; a command with another source or other options is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.filters.rules import NO_FILTERS, Filters
from data_prep.listing.archives import UNPACKED
from data_prep.listing.base import Item, Source
from data_prep.lists.order import Order, check_unique
from data_prep.lists.tar_lists import LISTS, PLAN_NAME
from data_prep.parts.part import WHOLE, Part
from megapix.errors import InputError
from megapix.files import write_atomic, write_new
from megapix.shards.image_policy import Policy

VERSION_KEY = "policy_version"
"""Key of the plan for the policy's version; no key for 1."""
LIST_KEYS = ("classes", "samples", "list_sha256")
"""Keys that say what the source holds."""
MERGE = "data_prep merge FOLDER SECOND --out INDEX"


@dataclass(frozen=True)
class Options:
    """What the written bytes depend on, beside the source."""

    policy: Policy
    format: Literal["png", "jpg", "webp", "original"] = "png"
    quality: int = 95
    samples_per_shard: int = 1000
    seed: int = 0
    bucket_min: int = 0
    """Aspect buckets with fewer samples are merged into others; 0 leaves them."""
    filters: Filters = NO_FILTERS
    keep: tuple[str, ...] = ()
    """Columns of the metadata that go into the samples' JSON."""

    def check(self) -> None:
        """Raise InputError for a value out of range, or a combination that has no meaning."""
        if self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard = {self.samples_per_shard}: expected at least 1")
        check_bucket_min(self.bucket_min, self.policy)
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality = {self.quality}: expected 1 to 100")
        if self.format == "original" and self.policy.mode != "untouched":
            raise InputError(f"--format original keeps the bytes, but --policy {self.policy.mode} changes the image")


def check_bucket_min(least: int, policy: Policy) -> None:
    """Raise InputError for a value of --bucket-min out of range, or where there are no buckets."""
    if least < 0 or (least and policy.mode != "buckets"):
        raise InputError(f"--bucket-min = {least}: expected 0 or more, with --policy buckets")


class Job(NamedTuple):
    """One shard to write; its samples are numbered from `first`."""

    number: int
    first: int
    bucket: int
    items: tuple[Item, ...]


def jobs(
    items: Sequence[Item], options: Options, buckets: Sequence[int] | None = None, part: Part = WHOLE
) -> Iterator[Job]:
    """Sort by bucket, shuffle each by seed (in the order of a hash of seed and name, the same everywhere), and cut; the
    jobs of a part alone."""
    number, first, order = 0, 0, Order.of(items, options.seed)
    of = np.zeros(len(items), np.uint16) if buckets is None else np.asarray(buckets, np.uint16)
    for bucket in np.unique(of).tolist():
        shuffled = order.shuffled(np.flatnonzero(of == bucket), options.samples_per_shard)
        for start in range(0, len(shuffled), options.samples_per_shard):
            chosen = shuffled[start : start + options.samples_per_shard].tolist()
            if number % part.of == part.number:
                yield Job(number, first, bucket, tuple(items[n] for n in chosen))
            number, first = number + 1, first + len(chosen)


def shards(samples: int, options: Options, buckets: Sequence[int] | None = None) -> int:
    """How many jobs there are."""
    counts = [samples] if buckets is None else Counter(buckets).values()
    return sum(-(-count // options.samples_per_shard) for count in counts)


def describe(source: Source, options: Options) -> dict[str, Any]:
    """What is recorded of source and options; equal records mean equal bytes.

    Raises:
        InputError: two samples of the same name, or a name that is not UTF-8.
    """
    digest, hashes = hashlib.sha256(), array("q")
    for item in source.items:
        hashes.append(hash(item.name))
        try:
            digest.update(f"{item.name}\t{item.label}\t{item.caption}\n".encode())
            if item.about:
                digest.update(f"{item.about}\n".encode())
        except UnicodeEncodeError as error:
            raise InputError(f"image {item.name!a} has a name or caption that is not UTF-8") from error
    check_unique(np.asarray(hashes, np.int64), source.items)
    return {
        **source.about,
        **of_policy(options.policy, options.bucket_min),
        "format": options.format,
        "quality": options.quality,
        "samples_per_shard": options.samples_per_shard,
        "seed": options.seed,
        "classes": list(source.classes),
        "samples": len(source.items),
        "list_sha256": digest.hexdigest(),
        **chosen(options),
    }


def chosen(options: Options) -> dict[str, Any]:
    """What plan and index record of the samples and columns that are wanted; nothing without such options."""
    return options.filters.recorded() | ({"keep": list(options.keep)} if options.keep else {})


def of_policy(policy: Policy, bucket_min: int = 0) -> dict[str, Any]:
    """The policy under the names of the options that set it; those that change nothing are left out."""
    recorded: dict[str, Any] = {
        "policy": policy.mode,
        "size": policy.size,
        "resize": policy.resize,
        "background": "#" + bytes(policy.background).hex(),
        "min_side": policy.min_side,
        "buckets": [list(bucket) for bucket in policy.buckets],
    }
    if policy.version > 1:
        recorded[VERSION_KEY] = policy.version
    if policy.icc != "convert":
        recorded["icc"] = policy.icc
    if bucket_min:
        recorded["bucket_min"] = bucket_min
    return recorded


def begun(out: Path) -> dict[str, Any]:
    """The plan in a folder; an empty one if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = out / PLAN_NAME
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def as_begun(out: Path, policy: Policy) -> Policy:
    """The policy; in a folder that an older version began, which decoded as version 1 does, with that version.

    Raises:
        InputError: its plan is damaged.
    """
    there = begun(out)
    if VERSION_KEY in there or "policy" not in there:  # a new folder, or one that `settle` refuses
        return policy
    print(
        f"data_prep: {out} was begun by an older version: images are decoded as it did, without ICC profiles (image "
        "policy 1); a new folder has the new way"
    )
    return replace(policy, version=1)


def settle(out: Path, plan: dict[str, Any], free: Collection[str] = ()) -> None:
    """Write the plan into a new folder, or find the same one there.

    Args:
        free: keys that may have other values than those in the folder, such as the list's where a set may grow; the
            plan there stays as it is until `record` writes the new one.

    Raises:
        InputError: the folder was begun with another plan (names the first difference and both values), or holds
            something else.
    """
    path = out / PLAN_NAME
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is not a folder")
    if not path.is_file():
        strangers = sorted(entry.name for entry in out.iterdir() if not _temporary(entry.name)) if out.exists() else []
        if strangers and not path.is_file():  # else another part has begun the folder just now
            raise InputError(f"{str(out)!r} holds {strangers[0]!r}, which is not ours; give an empty or new folder")
        out.mkdir(parents=True, exist_ok=True)
        if write_new(path, _as_recorded(plan)):
            return
    there = begun(out)
    # In the order of the plan, but first the options that only one of the two has: the rest may follow from them.
    for key in sorted(plan | there, key=lambda key: key in plan and key in there):
        if there.get(key) != plan.get(key) and key not in free:
            more = f", or prepare what is new in a second one and join them: {MERGE}" if key in LIST_KEYS else ""
            raise InputError(
                f"{str(out)!r} was begun with {_difference(key, there.get(key), plan.get(key))}; "
                f"give another folder, or the old value{more}"
            )


def record(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, unless it is there."""
    path, data = out / PLAN_NAME, _as_recorded(plan)
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)


def _as_recorded(plan: dict[str, Any]) -> bytes:
    return (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode()


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "list_sha256":
        return "another list of samples (names, classes or captions)"
    if key == "classes" and isinstance(before, list) and isinstance(now, list):
        gone, new = [c for c in before if c not in now], [c for c in now if c not in before]
        what = [f"without class {new[0]!r}"] * bool(new) + [f"with class {gone[0]!r}"] * bool(gone)
        return f"other classes: {' and '.join(what) or 'in another order'} ({len(before)} then, {len(now)} now)"
    if key == "class_order":
        return (
            f"class folders in the order of their {before or 'name'}s, this command has that of their {now or 'name'}s "
            f"(--class-order {before or 'name'} is the old value)"
        )
    if key == "labels":
        return "another --classes"
    return f"{key} = {before!r}, this command has {now!r}"


def _temporary(name: str) -> bool:
    """Whether it is a temporary file of `write_atomic` for the plan itself, or the folder of unpacked tar files: all
    that can be there before the plan."""
    temporary = re.fullmatch(rf"\.{re.escape(PLAN_NAME)}\.[\d-]+[0-9a-f]*\.tmp", name)
    return name in (UNPACKED, LISTS) or temporary is not None

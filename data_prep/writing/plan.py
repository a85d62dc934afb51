"""The plan of an output folder: which sample goes where, a function of the source's list and the options alone.

It is recorded in `plan.json` (and, with aspect buckets, `buckets.bin`: the bucket of each sample) before the first
shard is written. The same command finds it and resumes; a command with another source or other options is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.sources.base import Item, Source
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.shards.image_policy import Policy

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Options:
    """What the written bytes depend on, beside the source."""

    policy: Policy
    format: Literal["png", "jpg", "webp", "original"] = "png"
    quality: int = 95
    samples_per_shard: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a value out of range, or a combination that has no meaning."""
        if self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard = {self.samples_per_shard}: expected at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality = {self.quality}: expected 1 to 100")
        if self.format == "original" and self.policy.mode != "untouched":
            raise InputError(f"--format original keeps the bytes, but --policy {self.policy.mode} changes the image")


class Job(NamedTuple):
    """One shard to write; its samples are numbered from `first`."""

    number: int
    first: int
    bucket: int
    items: tuple[Item, ...]


def jobs(items: Sequence[Item], options: Options, buckets: Sequence[int] | None = None) -> Iterator[Job]:
    """Sort by bucket, shuffle each by seed (in the order of a hash of seed and name, the same everywhere), and cut."""
    number, first = 0, 0
    for bucket in sorted(set(buckets)) if buckets is not None else (0,):
        shuffled = _shuffled([n for n in range(len(items)) if buckets is None or buckets[n] == bucket], items, options)
        for start in range(0, len(shuffled), options.samples_per_shard):
            part = shuffled[start : start + options.samples_per_shard]
            yield Job(number, first, bucket, tuple(items[n] for n in part))
            number, first = number + 1, first + len(part)


def _shuffled(chosen: list[int], items: Sequence[Item], options: Options) -> list[int]:
    """Shuffle the samples; where they lie in chunks, the chunks, and the samples of as many of them as fill a shard:
    a shard then reads from few."""

    def place(text: str) -> bytes:
        return hashlib.sha256(f"{options.seed}/{text}".encode()).digest()[:16]

    chunks: dict[str, list[int]] = defaultdict(list)
    for n in chosen:
        chunks[items[n].chunk].append(n)
    out: list[int] = []
    window: list[int] = []
    for chunk in sorted(chunks, key=place):
        window += chunks[chunk]
        if len(window) >= options.samples_per_shard:
            out += sorted(window, key=lambda n: place(items[n].name))
            window = []
    return out + sorted(window, key=lambda n: place(items[n].name))


def describe(source: Source, options: Options) -> dict[str, Any]:
    """What is recorded of source and options; equal records mean equal bytes.

    Raises:
        InputError: two samples of the same name, or a name that is not UTF-8.
    """
    digest, seen = hashlib.sha256(), set()
    for item in source.items:
        if item.name in seen:
            raise InputError(f"the source holds {item.name!r} twice; names must be unique")
        seen.add(item.name)
        try:
            digest.update(f"{item.name}\t{item.label}\t{item.caption}\n".encode())
        except UnicodeEncodeError as error:
            raise InputError(f"image {item.name!a} has a name or caption that is not UTF-8") from error
    return {
        **source.about,
        **of_policy(options.policy),
        "format": options.format,
        "quality": options.quality,
        "samples_per_shard": options.samples_per_shard,
        "seed": options.seed,
        "classes": list(source.classes),
        "samples": len(source.items),
        "list_sha256": digest.hexdigest(),
    }


def of_policy(policy: Policy) -> dict[str, Any]:
    """The policy under the names of the options that set it."""
    return {
        "policy": policy.mode,
        "size": policy.size,
        "resize": "fast" if policy.fast else "exact",
        "background": "#" + bytes(policy.background).hex(),
        "min_side": policy.min_side,
        "buckets": [list(bucket) for bucket in policy.buckets],
    }


def settle(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan into a new folder, or find the same one there.

    Raises:
        InputError: the folder was begun with another plan (names the first difference and both values), or holds
            something else.
    """
    path = out / PLAN_NAME
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is not a folder")
    if not path.is_file():
        if out.exists() and (strangers := sorted(entry.name for entry in out.iterdir() if not _temporary(entry.name))):
            raise InputError(f"{str(out)!r} holds {strangers[0]!r}, which is not ours; give an empty or new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    for key in plan | there:  # in the order of the plan
        if there.get(key) != plan.get(key):
            raise InputError(
                f"{str(out)!r} was begun with {_difference(key, there.get(key), plan.get(key))}; "
                "give another folder, or the old value"
            )


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "list_sha256":
        return "another list of samples (names, classes or captions)"
    if key == "classes" and isinstance(before, list) and isinstance(now, list):
        gone, new = [c for c in before if c not in now], [c for c in now if c not in before]
        what = [f"without class {new[0]!r}"] * bool(new) + [f"with class {gone[0]!r}"] * bool(gone)
        return f"other classes: {' and '.join(what) or 'in another order'} ({len(before)} then, {len(now)} now)"
    return f"{key} = {before!r}, this command has {now!r}"


def _temporary(name: str) -> bool:
    """Whether it is a temporary file of `write_atomic` for the plan itself: all that can be there before the plan."""
    return re.fullmatch(rf"\.{re.escape(PLAN_NAME)}\.\d+\.tmp", name) is not None

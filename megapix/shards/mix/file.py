"""The mix file: data sets that a run mixes, JSON or YAML; `data_prep mix` writes one, and people edit it.

    {"format": "megapix-mix", "version": 1, "sets": [
        {"path": "photos", "weight": 0.7},
        {"path": "https://host/art", "weight": 0.3, "name": "art", "repeat": 4,
         "classes": {"tabby": "cat"}, "captions": "first"}]}

Local paths are relative to the file's folder. Of a set, `path` and `weight` are needed; `name` is what the set is
called in logs, `repeat` the epochs after which it leaves, `classes` new names for some of its classes, `captions` which
of a sample's captions are shown.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from megapix.errors import InputError, one_of
from megapix.files import read_bytes, size_of, write_atomic
from megapix.shards.storage import is_url, shown
from megapix.text import text_of

FORMAT = "megapix-mix"
VERSION = 1
ENDINGS = (".json", ".yaml", ".yml")
CAPTIONS = ("weighted", "first", "none")
"""Which captions of a set are shown: all by their weights, the first of each sample, or the empty one."""
KEYS = ("path", "weight", "name", "repeat", "classes", "captions")


@dataclass(frozen=True)
class MixedSet:
    """A set of a mix, as its file describes it."""

    path: str
    """Shard folder or index, or its URL."""
    weight: float
    """0 or more; those of all sets together need no sum."""
    name: str = ""
    repeat: float | None = None
    """Epochs of the set after which it leaves the run; None is never."""
    classes: dict[str, str] = field(default_factory=dict)
    """Class of the set -> its name in the mix; others keep theirs."""
    captions: str = "weighted"
    """One of CAPTIONS."""

    @property
    def share(self) -> Fraction:
        """The weight, as it is written."""
        return Fraction(str(self.weight))


def is_mix(path: str) -> bool:
    """Whether a data path names a mix file, and no folder or URL of one set."""
    return not is_url(path) and path.endswith(ENDINGS) and not os.path.isdir(path)


def read_mix(path: str) -> tuple[MixedSet, ...]:
    """The sets of a mix file, with whole paths and names.

    Raises:
        InputError: no such file, or something in it that is wrong: names the set, the key and the value.
        StorageError: it cannot be read now.
    """
    if size_of(Path(path)) is None:
        raise InputError(f"mix file {path!r} does not exist; make one with 'data_prep mix A=0.7 B=0.3 --out {path}'")
    try:
        text = text_of(read_bytes(Path(path)))
        data = json.loads(text) if path.endswith(".json") else _yaml(text)
    except (OSError, ValueError) as error:
        raise InputError(f"mix file {path!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"mix file {path!r}: format is {found!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise InputError(f"mix file {path!r}: version is {data.get('version')!r}, this release reads version {VERSION}")
    if unknown := sorted(set(data) - {"format", "version", "sets"}):
        raise InputError(f"mix file {path!r}: unknown key {unknown[0]!r}{one_of(unknown[0], ['sets'])}")
    if not isinstance(data.get("sets"), list) or not data["sets"]:
        raise InputError(f"mix file {path!r}: sets = {data.get('sets')!r}: expected a list of data sets")
    return checked([_set(entry, path, number) for number, entry in enumerate(data["sets"], 1)], f"mix file {path!r}")


def checked(sets: Sequence[MixedSet], where: str) -> tuple[MixedSet, ...]:
    """The sets with a name each; `where` begins the message of an error.

    Raises:
        InputError: a path or name that is there twice, or no weight above 0.
    """
    there: dict[str, str] = {}
    for one in sets:
        real = one.path.rstrip("/") if is_url(one.path) else os.path.realpath(one.path)
        if real in there:
            raise InputError(f"{where}: {shown(one.path)!r} is there twice; give each set once, with one weight")
        there[real] = one.path
    if not any(one.weight for one in sets):
        raise InputError(f"{where}: all weights are 0; expected one above 0")
    names = _names(sets)
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f'{where}: two sets have the name {name!r}; give one of them another "name"')
    return tuple(
        MixedSet(one.path, one.weight, name, one.repeat, one.classes, one.captions)
        for one, name in zip(sets, names, strict=True)
    )


def write_mix(path: Path, sets: Sequence[MixedSet]) -> None:
    """Write a mix file; sets in its own folder are named relative to it, so that both can be moved.

    Raises:
        OSError: it cannot be written.
    """
    entries = []
    for one in sets:
        entry: dict[str, Any] = {"path": _recorded(one.path, path), "weight": one.weight}
        for key in KEYS[2:]:
            if (value := getattr(one, key)) not in ("", None, {}, "weighted"):
                entry[key] = value
        entries.append(entry)
    data = {"format": FORMAT, "version": VERSION, "sets": entries}
    write_atomic(path, (json.dumps(data, indent=1) if path.suffix == ".json" else _as_yaml(data)).encode() + b"\n")


def weight_of(value: Any) -> float | None:
    """A weight, a finite number of 0 or more; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        return None
    return value


def _set(entry: Any, path: str, number: int) -> MixedSet:
    where = f"mix file {path!r}: set {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; expected a table with path and weight")
    if unknown := sorted(set(map(str, entry)) - set(KEYS)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}{one_of(unknown[0], KEYS)}")
    if not isinstance(place := entry.get("path"), str) or not place:
        raise InputError(f"{where}: path = {place!r}: expected a shard folder or its URL")
    where = f"{where} ({shown(place)!r})"
    if (weight := weight_of(entry.get("weight"))) is None:
        raise InputError(f"{where}: weight = {entry.get('weight')!r}: expected a number, 0 or more")
    if (repeat := entry.get("repeat")) is not None and not weight_of(repeat):
        raise InputError(f"{where}: repeat = {repeat!r}: expected epochs, a number above 0")
    name, classes, captions = entry.get("name", ""), entry.get("classes", {}), entry.get("captions", "weighted")
    if not isinstance(name, str) or len(name.split()) != (name != ""):
        raise InputError(f"{where}: name = {name!r}: expected a word")
    texts = isinstance(classes, dict) and all(isinstance(text, str) for pair in classes.items() for text in pair)
    if not texts:
        raise InputError(f"{where}: classes = {classes!r}: expected a table, name in the set -> name in the mix")
    if captions not in CAPTIONS:
        raise InputError(f"{where}: captions = {captions!r}{one_of(str(captions), CAPTIONS)}")
    if not is_url(place):
        place = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(place)))
    return MixedSet(place, weight, name, repeat, classes, captions)


def _names(sets: Sequence[MixedSet]) -> list[str]:
    """Those given, and for the others the ends of their paths, as long as it takes to tell them apart."""
    tails = [one.path.rstrip("/").replace(" ", "_").split("/") for one in sets]
    for length in range(1, max(map(len, tails)) + 1):
        names = [one.name or "/".join(tail[-length:]) for one, tail in zip(sets, tails, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def _recorded(place: str, file: Path) -> str:
    folder, whole = os.path.abspath(file.parent), os.path.abspath(place)
    if is_url(place):
        return place
    return os.path.relpath(whole, folder) if whole.startswith(f"{folder}/") else whole


def _yaml(text: str) -> Any:
    import yaml  # late: only such files need it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _as_yaml(data: dict[str, Any]) -> str:
    import yaml  # late: only such files need it

    return str(yaml.safe_dump(data, sort_keys=False))

"""Configurations as data: dotted keys, dictionaries for JSON and back, and what resume compares."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from megapix.config import old
from megapix.config.marks import T
from megapix.config.options import Config
from megapix.errors import InputError, one_of


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every option as (dotted key, value, mark)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata["mark"]


def get(config: Any, key: str) -> Any:
    """Value at a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def replace(config: T, key: str, value: Any) -> T:
    """A copy with one dotted key changed."""
    name, _, rest = key.partition(".")
    inner = replace(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Build `kind` from a nested dictionary; missing keys take their defaults, old names are passed over (`old`).

    Raises:
        InputError: an unknown key (with the nearest right one) or a value of the wrong type; `where` names the file.
    """
    import pydantic  # late: only files need it

    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if old.dropped(kind, key, value, where):
            continue
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{one_of(key, sorted(known))}")
        default = getattr(kind(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} = {value!r}: expected a table of options")
            values[key] = from_dict(type(default), value, f"{where}: {key}")
            continue
        try:
            pydantic.TypeAdapter(typing.get_type_hints(kind)[key]).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            why = " or ".join(dict.fromkeys(e["msg"].lower() for e in error.errors()))
            raise InputError(f"{where}: {key} = {value!r}: {why}") from error
        values[key] = value
    return kind(**values)


def compare(saved: Config, now: Config, where: str) -> list[str]:
    """Compare a checkpoint's resolved configuration with this run's; return the schedule changes, one line each.

    Raises:
        InputError: identity options differ; each is named with both values.
    """
    old = {key: value for key, value, _ in leaves(saved)}
    different = [(key, old[key], value, mark) for key, value, mark in leaves(now) if old[key] != value]
    clashes = [
        f"{key} is {before!r} there and {after!r} here" for key, before, after, mark in different if mark == "identity"
    ]
    if clashes:
        raise InputError(
            f"{where} belongs to another run: {'; '.join(clashes)}. Use another --out, or the old values, "
            f"which --config {now.out}/config.json gives"
        )
    return [f"{key}: {before!r} -> {after!r}" for key, before, after, mark in different if mark == "schedule"]

"""Options that earlier releases had: where they are still written, they are passed over with a warning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megapix.config.training import DataConfig
from megapix.dist import warn_once

OLD: dict[type, dict[str, tuple[str, object]]] = {DataConfig: {"retries": ("data.outage_minutes", 5)}}
"""Section -> old name -> (the option in its place, the old default)."""
OPTIONS = {"--data.retries": "data.outage_minutes"}
"""Old options of the command line, and those in their place."""


def dropped(kind: type, key: str, value: object, where: str) -> bool:
    """Whether a key of a file's section is an old one. Its default stands in each file that a run has written, where
    nobody has chosen it: only another value is warned of."""
    if key not in (names := OLD.get(kind, {})):
        return False
    new, default = names[key]
    if value != default:
        warn_once(f"{where}: {key} = {value!r} has no effect any more: {new} takes its place")
    return True


def without(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line without old options."""
    return list(_kept(iter(arguments)))


def _kept(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if new := OPTIONS.get(option.replace("_", "-")):
            warn_once(f"{option} has no effect any more: --{new.replace('_', '-')} takes its place")
            if not equals:
                next(arguments, None)
        else:
            yield argument

"""From arguments to options: `PRESET [OPTIONS]` or `--config FILE [OPTIONS]`."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from megapix import config, console
from megapix.bench.options import StepOptions, check_batch
from megapix.config import PRESETS, Config, old
from megapix.dist import World
from megapix.errors import InputError, one_of
from megapix.text import text_of

T = TypeVar("T")


def print_usage(usage: str, arguments: list[str]) -> int:
    """Print the usage with all presets: to stdout on --help, to stderr (and return 2) without arguments."""
    width = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:{width}} {about}" for name, (_, about) in PRESETS.items())
    print(usage.format(presets=presets), end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2


def parse_run(arguments: list[str], world: World, command: str = "train") -> Config:
    """A configuration from `PRESET [OPTIONS]` or `--config FILE [OPTIONS]`; only rank 0 prints tyro's messages.

    Raises:
        InputError: unknown preset, or a file that cannot be read or holds an unknown key.
        SystemExit: an option that tyro refuses (code 2), or --help (code 0).
    """
    default, name, rest = named_config(arguments)
    return parse(Config, default, f"megapix {command} {name}", rest, world)


def gives_classes(arguments: list[str]) -> bool:
    """Whether arguments that `parse_run` has read set model.num_classes, themselves or in their --config FILE."""
    if any(argument.partition("=")[0].replace("_", "-") == "--model.num-classes" for argument in arguments):
        return True
    return arguments[0] == "--config" and "num_classes" in _json_of(Path(arguments[1])).get("model", {})


def parse_step(arguments: list[str], world: World, command: str = "megapix bench step") -> StepOptions:
    """The options of a benchmark of a step, from `PRESET [OPTIONS]` or `--config FILE [OPTIONS]`; as `parse_run`.

    Raises:
        InputError: as `parse_run`, or a batch that is set twice.
        SystemExit: as `parse_run`.
    """
    run, name, rest = named_config(arguments)
    default = StepOptions.of(run)
    options = parse(StepOptions, default, f"{command} {name}", rest, world)
    check_batch(options, default)
    return options


def named_config(arguments: list[str]) -> tuple[Config, str, list[str]]:
    """The configuration that PRESET or --config FILE names, how it is named, and the arguments that follow."""
    first, rest = arguments[0], arguments[1:]
    if first == "--config":
        if not rest:
            raise InputError("--config needs a JSON file")
        return _read_config(Path(rest[0])), f"--config {rest[0]}", rest[1:]
    if first.startswith("-"):
        raise InputError(
            f"the first argument is {first!r}: expected a preset{one_of(first, list(PRESETS))} or --config FILE"
        )
    return config.preset(first), first, rest


def parse(kind: type[T], default: T, command: str, arguments: list[str], world: World) -> T:
    """Options of `kind` from arguments over `default`; only rank 0 prints tyro's messages."""
    written = _spelled_out(old.without(arguments), set(_switches(kind)))
    parsed: T = console.parse(kind, written, command, world.main, default=default)
    return parsed


def _switches(kind: type, prefix: str = "--") -> Iterator[str]:
    """Options that are on, off, or a word such as 'auto'."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        option = prefix + name.replace("_", "-")
        if typing.get_origin(hint) is typing.Annotated:  # a section without a name of its own (`cli/tools.py`)
            yield from _switches(typing.get_args(hint)[0], prefix)
        elif dataclasses.is_dataclass(hint):
            yield from _switches(typing.cast(type, hint), f"{option}.")
        elif bool in typing.get_args(hint):
            yield option


WORDS = {"true": "True", "false": "False"}


def _spelled_out(arguments: list[str], switches: set[str]) -> list[str]:
    """The arguments with a value after each switch, which may be a flag: --x, --no-x, --x true, --x=auto."""
    written, bare = list[str](), False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        option = option.replace("_", "-")
        if option in switches:
            written += [option, WORDS.get(value.lower(), value) if equals else "True"]
        elif option.replace(".no-", ".") in switches:
            written += [option.replace(".no-", "."), "False"]
        elif bare and not argument.startswith("-"):
            written[-1] = WORDS.get(argument.lower(), argument)
        else:
            written.append(argument)
        bare = option in switches and not equals
    return written


def _read_config(path: Path) -> Config:
    return config.from_dict(Config, _json_of(path), str(path))


def _json_of(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text_of(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"--config {path}: expected a table of options, found {type(data).__name__}")
    return data

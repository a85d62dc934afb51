"""From arguments to options: `PRESET [--config FILE] [OPTIONS]` or `--config FILE [OPTIONS]`."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from megapix import config, console
from megapix.bench.options import StepOptions, check_batch
from megapix.cli import config_file
from megapix.cli.names import nearest
from megapix.config import PRESETS, Config, old
from megapix.dist import World
from megapix.errors import InputError, one_of

T = TypeVar("T")


def print_usage(usage: str, arguments: list[str]) -> int:
    """Print the usage with all presets: to stdout on --help, to stderr (and return 2) without arguments."""
    width = max(map(len, PRESETS))
    presets = "\n".join(f"  {name:{width}} {about}" for name, (_, about) in PRESETS.items())
    print(usage.format(presets=presets), end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2


class Named(NamedTuple):
    """What PRESET and --config FILE name."""

    config: Config
    name: str
    """The words themselves, for messages."""
    rest: list[str]
    """The arguments that follow."""
    keys: frozenset[str]
    """Options that the file gives, as dotted keys."""


def parse_run(arguments: list[str], world: World, command: str = "train") -> Config:
    """A configuration from `PRESET [--config FILE] [OPTIONS]`; only rank 0 prints tyro's messages.

    Raises:
        InputError: an unknown preset or option, or a file that cannot be read or holds an unknown key.
        SystemExit: a value that tyro refuses (code 2), or --help (code 0).
    """
    named = named_config(arguments)
    return parse(Config, named.config, f"megapix {command} {named.name}", named.rest, world)


def gives_classes(arguments: list[str]) -> bool:
    """Whether arguments that `parse_run` has read set model.num_classes, themselves or in their --config FILE."""
    if any(argument.partition("=")[0].replace("_", "-") == "--model.num-classes" for argument in arguments):
        return True
    return "model.num_classes" in named_config(arguments).keys


def left_to_defaults(arguments: list[str]) -> str:
    """A line about what a file without a preset leaves to defaults, which are those of PixelDiT-XL and not of whichever
    network the file has in mind; empty if it leaves nothing."""
    named = named_config(arguments)
    every = [key for key, _, _ in config.leaves(Config())]
    lacking = [key for key in every if key not in named.keys and key not in ("out", "data.path")]
    if not named.name.startswith("--config") or not lacking:
        return ""
    first = ", ".join(lacking[:3]) + ", …" * (len(lacking) > 3)
    return (
        f"{named.name} leaves {len(lacking)} of {len(every)} options to their defaults ({first}), which are those of "
        "PixelDiT-XL at 256 pixels; a preset before --config gives others"
    )


def parse_step(arguments: list[str], world: World, command: str = "megapix bench step") -> StepOptions:
    """The options of a benchmark of a step, from the same arguments as `parse_run`.

    Raises:
        InputError: as `parse_run`, or a batch that is set twice.
        SystemExit: as `parse_run`.
    """
    named = named_config(arguments)
    default = StepOptions.of(named.config)
    options = parse(StepOptions, default, f"{command} {named.name}", named.rest, world)
    check_batch(options, default)
    return options


def named_config(arguments: list[str]) -> Named:
    """What PRESET and --config FILE name, together or one of them: a file's options go over the preset's.

    Without a preset they go over the defaults of each option, as they always have (`left_to_defaults`).

    Raises:
        InputError: an unknown preset, or a file that cannot be read or holds an unknown key.
    """
    path, rest = _file_of(arguments)
    base, name = Config(), ""
    if rest and not rest[0].startswith("-"):
        base, name, rest = config.preset(rest[0]), rest[0], rest[1:]
    elif path is None:
        first = rest[0] if rest else ""
        raise InputError(
            f"the first argument is {first!r}: expected a preset{one_of(first, list(PRESETS))} or --config FILE"
        )
    if path is None:
        return Named(base, name, rest, frozenset())
    data = config_file.read(path)
    found, keys = config_file.over(base, data, path), frozenset(config_file.keys_of(data))
    return Named(found, f"{name} --config {path}".strip(), rest, keys)


def _file_of(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The value of --config, and the other arguments."""
    path, rest, words = None, list[str](), iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise InputError("--config needs a YAML or JSON file")
        if path:
            raise InputError(f"--config is there twice, with {str(path)!r} and {value!r}: expected one file")
        path = Path(value)
    return path, rest


def parse(kind: type[T], default: T, command: str, arguments: list[str], world: World) -> T:
    """Options of `kind` from arguments over `default`; only rank 0 prints tyro's messages.

    Raises:
        InputError: an option that does not exist, with the nearest that does.
        SystemExit: as `console.parse`.
    """
    arguments = old.without(arguments)
    _check_names(kind, arguments, command)
    written = _spelled_out(arguments, set(_options(kind, switches=True)))
    parsed: T = console.parse(kind, written, command, world.main, default=default)
    return parsed


def _check_names(kind: type, arguments: list[str], command: str) -> None:
    known = [option[2:] for option in _options(kind)]
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        plain = name.replace(".no-", ".").removeprefix("--no-").removeprefix("--")
        if not name.startswith("--") or plain in known or name == "--help":
            continue
        near = nearest(plain, [key.replace("-", "_") for key in known]).replace("_", "-").replace("mean '", "mean '--")
        raise InputError(
            f"option {argument.partition('=')[0]!r} does not exist{near}; '{command} --help' lists the options"
        )


def _options(kind: type, prefix: str = "--", switches: bool = False) -> Iterator[str]:
    """Every option; with `switches` those that are on, off, or a word such as 'auto'."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        option = prefix + name.replace("_", "-")
        if typing.get_origin(hint) is typing.Annotated:  # a section without a name of its own (`cli/tools.py`)
            yield from _options(typing.get_args(hint)[0], prefix, switches)
        elif dataclasses.is_dataclass(hint):
            yield from _options(typing.cast(type, hint), f"{option}.", switches)
        elif not switches or bool in typing.get_args(hint):
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

"""Configuration files, JSON or YAML: read over a preset, and printed as YAML that is read back.

YAML is read by the core schema of YAML 1.2, whose words mean what they seem to mean: `1e-4` is a number, and `off`,
`no` and `1:20` are texts, which PyYAML by itself reads by YAML 1.1 as a text, false, false and 80.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megapix import config
from megapix.cli.names import nearest
from megapix.config import Config, old
from megapix.errors import InputError
from megapix.text import text_of

CORE = {
    "null": r"null|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""Plain words that are no texts (YAML 1.2.2, section 10.3.2, without its 0o7 and 0xf)."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads the core schema, and refuses a key that is there twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise ValueError(f"{key!r} is there twice, in line {node.value[number][0].start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes the texts that the loader would not read as texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _kind in (_Loader, _Dumper):
    for _tag, _words in CORE.items():
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_words})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def as_yaml(c: Config) -> str:
    """A configuration as --config reads it back."""
    return yaml.dump(config.to_dict(c), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def over(base: Config, data: dict[str, Any], path: Path) -> Config:
    """`base` with the options of a file in place of its own; `path` is for messages.

    Raises:
        InputError: an option that does not exist, with the nearest that does, or a value of the wrong type.
    """
    known = [key for key, _, _ in config.leaves(base)]
    for key in keys_of(data):
        if key not in known and f"--{key}" not in old.OPTIONS:
            section = next((name for name in known if name.startswith(f"{key}.")), "")
            wrong = "expected a table of options" if section else f"no such option{nearest(key, known)}"
            raise InputError(f"--config {path}: {key}: {wrong}")
    return config.from_dict(Config, _merged(config.to_dict(base), data), f"--config {path}")


def keys_of(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Every option that a file gives, as a dotted key."""
    found = list[str]()
    for key, value in data.items():
        found += keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def read(path: Path) -> dict[str, Any]:
    """The table in a file: YAML if its name ends with .yaml or .yml, else JSON.

    Raises:
        InputError: it cannot be read, or holds no table.
    """
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        text = text_of(path.read_bytes())
        data = yaml.load(text, _Loader) if kind == "YAML" else json.loads(text, object_pairs_hook=_once)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as {kind}: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"--config {path}: expected a table of options, found {type(data).__name__}")
    return _nested(data, path)


def _nested(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table with `optim.lr` as lr in the table optim."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        *sections, name = str(key).split(".")
        table = found
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise InputError(f"--config {path}: {section} = {table!r}: expected a table of options")
        value = _nested(value, path) if isinstance(value, dict) else value
        if isinstance(table.get(name), dict) and isinstance(value, dict):
            value = table[name] | value
        table[name] = value
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _merged(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value)
        for key, value in data.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | data | both

"""Pages of the docs site that are made when it is built: README and its neighbours, the options, and the commands.

A hook of mkdocs (`mkdocs.yml`). The options come from the dataclasses and their docstrings, the commands from their own
--help, so neither can differ from the program.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from data_prep import options as data_prep
from megapix.bench.options import StepOptions
from megapix.cli import weights
from megapix.config import PRESETS, Config, leaves, preset
from megapix.costs.assumptions import PlanOptions
from megapix.evaluation.options import EvaluateOptions
from megapix.sample.options import SampleOptions

ROOT = Path(__file__).resolve().parents[2]
MARKS = {
    "identity": "defines the run; a resume must have the same value",
    "schedule": "may change on resume; the change is logged",
    "machine": "where and how the run executes; may change freely",
}
COMMANDS = {
    "megapix sample": SampleOptions,
    "megapix export": weights.ExportOptions,
    "megapix import": weights.ImportOptions,
    "megapix reshard": weights.ReshardOptions,
    "megapix evaluate": EvaluateOptions,
    "megapix bench step": StepOptions,
    "megapix plan": PlanOptions,
    **{f"data_prep {name}": kind for name, kind in data_prep.COMMANDS.items()},
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    made = {
        "index.md": (ROOT / "README.md").read_text(),
        "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(),
        "options.md": "\n".join(options_page()),
        "commands.md": "\n".join(commands_page()),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, files: Files, **_: Any) -> str:
    """Links between README, its neighbours and docs/, which are one folder in the site."""
    markdown = re.sub(r"\]\((?:\.\./|docs/)+(?=[\w./-]+)", "](", markdown)
    markdown = re.sub(r"\]\(README\.md", "](index.md", markdown)
    there = {file.src_uri for file in files}

    def local(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        outside = target and "://" not in target and target not in there
        return match[1] if outside else match[0]  # a file of the repository that is no page keeps its name alone

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", local, markdown)


def options_page() -> Iterator[str]:
    """Every option of a run, and what each preset sets."""
    yield from ("# Options of a run", "", "Set an option of `megapix train` (and of `launch`, `doctor`, `plan`) with")
    yield from ("`--SECTION.OPTION VALUE`, or in the file of `--config`. Marks, for resume:", "")
    yield from (f"- *{mark}*: {meaning}" for mark, meaning in MARKS.items())
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        if dataclasses.is_dataclass(kind):
            yield from ("", f"## {section.name}", "", _first_line(kind), "")
            yield from _table(kind, f"{section.name}.", marks=True)
    top = [field for field in dataclasses.fields(Config) if "mark" in field.metadata]
    if top:
        yield from ("", "## Other options", "")
        yield from _table(Config, "", marks=True)
    yield from ("", "## Presets", "", "What each preset changes from the defaults above.", "")
    defaults = {option: value for option, value, _ in leaves(Config())}
    for name, (_, about) in PRESETS.items():
        yield from ("", f"### {name}", "", f"{about}.", "", "| option | value |", "|---|---|")
        for option, value, _ in leaves(preset(name)):
            if value != defaults[option]:
                yield f"| `{option}` | {_code(value)} |"


def commands_page() -> Iterator[str]:
    """The options of the other commands."""
    yield from ("# Commands", "", "Options of the commands besides `megapix train`; positional arguments first.")
    for name, kind in COMMANDS.items():
        yield from ("", f"## {name}", "", _first_line(kind), "")
        yield from _table(kind, "", marks=False)


def _table(kind: Any, prefix: str, marks: bool) -> Iterator[str]:
    yield "| option | default | mark | |" if marks else "| option | default | |"
    yield "|---|---|---|---|" if marks else "|---|---|---|"
    texts = _docstrings(kind)
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind, include_extras=True)[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(inner):
            continue
        place = "Positional" in repr(hint)
        name = field.name.upper() if place else f"--{prefix}{field.name}".replace("_", "-")
        cells = [f"`{name}`", _default(field)]
        if marks:
            if "mark" not in field.metadata:
                continue
            cells.append(str(field.metadata["mark"]))
        yield "| " + " | ".join(_cell(cell) for cell in (*cells, texts.get(field.name, ""))) + " |"


def _docstrings(kind: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        members = _source(base.__module__)[base.__qualname__].members
        found |= {name: member.docstring.value for name, member in members.items() if member.docstring}
    return found


@functools.cache
def _source(module: str) -> Any:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return griffe.visit(module, path, path.read_text())


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "needed"
    return "" if value in ("", None, ()) else _code(value)


def _code(value: Any) -> str:
    """A value in a cell; of a long text the first words."""
    return f"`{textwrap.shorten(str(value), 80, placeholder=' …')}`"


def _first_line(kind: Any) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

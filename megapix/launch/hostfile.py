"""Hostfiles as people have them, and as DeepSpeed reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megapix.errors import InputError
from megapix.text import text_of


@dataclass(frozen=True)
class Node:
    """A node that ssh knows as `host`, and how many ranks it gets."""

    host: str
    slots: int


def read(path: str) -> list[Node]:
    """The nodes in their order. Line ends, a byte-order mark, comments, blank lines and outer blanks do not matter.

    Raises:
        InputError: the file cannot be read, a line is none of 'HOST slots=RANKS', or a host is named twice.
    """
    try:
        text = text_of(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"--hostfile {path}: cannot be read: {reason}") from error
    nodes, seen = list[Node](), dict[str, int]()
    for number, line in enumerate(text.split("\n"), 1):
        if not (entry := line.partition("#")[0].strip()):
            continue
        # What pdsh would expand (node[01-04]) or a shell would read is no name.
        found = re.fullmatch(r"([\w.:@-]+)\s+slots=([1-9][0-9]*)", entry, re.ASCII)
        if not found or entry.startswith("-"):
            raise InputError(f"--hostfile {path}: line {entry!r}: expected 'HOST slots=RANKS', a line for each host")
        host = found[1].rpartition("@")[2]
        if host in seen:
            raise InputError(
                f"--hostfile {path}: lines {seen[host]} and {number} name {host!r}: expected one, with all its slots"
            )
        seen[host] = number
        nodes.append(Node(found[1], int(found[2])))
    if not nodes:
        raise InputError(f"--hostfile {path} names no host")
    return nodes


def write(path: Path, nodes: list[Node]) -> Path:
    """Write them for DeepSpeed, and return the path."""
    path.write_text("".join(f"{node.host} slots={node.slots}\n" for node in nodes))
    return path

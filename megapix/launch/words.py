"""Arguments on their way over ssh, where a shell on the other node and pdsh (%h, %n, %u) would read them."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

QUOTED = "MEGAPIX_QUOTED"
"""Set for ranks whose arguments have been quoted."""
PLAIN = re.compile(r"[\w@+=:,./-]+")
"""A word that no shell changes."""


def quoted(arguments: list[str]) -> list[str]:
    """The arguments with percent-encoded bytes wherever a shell could read more than a plain word; none is empty."""
    return [quote(os.fsencode(argument), safe="@+=:,/").replace("~", "%7E") or "%00" for argument in arguments]


def unquoted(arguments: list[str]) -> list[str]:
    """What `quoted` has got. No argument of a process can hold the zero byte, so it stands for an empty one."""
    return [unquote(argument, errors="surrogateescape").replace("\0", "") for argument in arguments]

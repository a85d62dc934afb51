"""What a URL may be, and where the tar files of an index lie."""

from __future__ import annotations

import os
import posixpath
import re

from megapix.errors import InputError

HEADERS = "MEGAPIX_HTTP_HEADERS"
"""Environment variable: a JSON object of request headers."""
PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "aiohttp"}
"""Protocol -> the package that fsspec needs for it."""


def is_url(path: str) -> bool:
    """Whether it is no local path. `pipe:command` is not one either, and is refused by `open_storage`."""
    return "://" in path or path.startswith("pipe:")


def tars_of(base: str, place: str, name: str) -> str:
    """Folder or URL of the tar files of an index.

    Args:
        base: what the index says; a relative one counts from where the index lies, so that both can be moved together.
        place: folder or URL where the index lies.
        name: of one of the tar files.

    Raises:
        InputError: a relative base that leads out of the URL's host.
    """
    if not base or is_url(base) or base.startswith("/"):
        return base or place
    if is_url(place):
        protocol, _, rest = place.partition("://")
        host, _, folder = rest.partition("/")
        found = posixpath.normpath(posixpath.join(folder, base))
        if found.startswith(".."):
            raise InputError(f"{place}: the base {base!r} of its index leads out of {protocol}://{host}")
        return f"{protocol}://{host}/{found}" if found != "." else f"{protocol}://{host}"
    plain = os.path.normpath(os.path.join(os.path.abspath(place), base))
    linked = os.path.join(place, base)  # where the index's folder is a symbolic link, they may lie beside its target
    here = os.path.exists(os.path.join(plain, name)) or not os.path.exists(os.path.join(linked, name))
    return plain if here else linked


def shown(text: str) -> str:
    """A text with the queries of its URLs left out: that of a signed URL is a secret."""
    return re.sub(r"(?<=[^\s?])\?[^\s'\"]+", "?…", text)


def protocol_of(url: str) -> str:
    """The protocol of a URL.

    Raises:
        InputError: not one that is read, or a URL with a password.
    """
    protocol = url.partition(":")[0]
    if protocol not in PROTOCOLS or not url.startswith(f"{protocol}://"):
        raise InputError(f"{shown(url)!r}: {protocol!r} is not read; expected a local path or {', '.join(PROTOCOLS)}")
    if "@" in url.split("/")[2]:
        host = url.split("/")[2].rpartition("@")[2]
        raise InputError(f"{protocol}://…@{host}: a password would be recorded; give it in a netrc, or {HEADERS}")
    return protocol

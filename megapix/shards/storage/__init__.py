"""Where bytes lie: a local folder, or a URL read through fsspec with time-outs and checked lengths.

    Local     pread on open files; the least recently used is closed
    Remote    http(s), s3 and gs: byte ranges of remote files, many in flight together (`begin`)

Both answer `read(name, offset, size)`, `size(name)`, `names()` and `where(name)`, and try again what may succeed later
(`outage.py`). A URL's protocol comes from a short list: an index or a command never names a program to run, as
webdataset's `pipe:` does.

Secrets come from the environment or a netrc and are written nowhere: headers of requests (MEGAPIX_HTTP_HEADERS), the
query of signed URLs (MEGAPIX_HTTP_QUERY), and HF_TOKEN for hf:// and its host.
"""

from __future__ import annotations

from pathlib import Path

from megapix.shards.storage.answers import Refused
from megapix.shards.storage.local import Local
from megapix.shards.storage.protocols import QUERY, Access
from megapix.shards.storage.remote import PART, Remote
from megapix.shards.storage.urls import HEADERS, is_url, protocol_of, shown, tars_of

__all__ = [
    "HEADERS",
    "PART",
    "QUERY",
    "Access",
    "Local",
    "Refused",
    "Remote",
    "Storage",
    "is_url",
    "open_storage",
    "protocol_of",
    "shown",
    "tars_of",
]

Storage = Local | Remote


def open_storage(base: str, access: Access) -> Storage:
    """The files below a local folder or a URL.

    Raises:
        InputError: a protocol that is not read, or whose package is not installed.
    """
    return Remote(base, access) if is_url(base) else Local(Path(base))

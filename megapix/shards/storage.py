"""Where bytes lie: a local folder, or a URL read through fsspec with time-outs and checked lengths.

    Local     pread on open files; the least recently used is closed
    Remote    http(s), s3 and gs: byte ranges of remote files

Both answer `read(name, offset, size)`, `size(name)`, `names()` and `where(name)`, and try again what may succeed later
(`outage.py`). A URL's protocol comes from a short list: an index or a command never names a program to run, as
webdataset's `pipe:` does.

Secrets come from the environment or a netrc and are written nowhere: headers of requests (MEGAPIX_HTTP_HEADERS), the
query of signed URLs (MEGAPIX_HTTP_QUERY), and HF_TOKEN for hf:// and its host.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import netrc
import os
import posixpath
import re
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from megapix.errors import InputError
from megapix.outage import persist

PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "aiohttp"}
"""Protocol -> the package that fsspec needs for it."""
EXTRAS = {"aiohttp": "http", "s3fs": "s3", "gcsfs": "gs"}
HEADERS, QUERY = "MEGAPIX_HTTP_HEADERS", "MEGAPIX_HTTP_QUERY"
"""Environment variables: a JSON object of request headers, and what is added to each URL, such as 'sig=…'."""
HUB = "https://huggingface.co"
HF = re.compile(r"hf://datasets/(?P<name>[^/@?]+/[^/@?]+)(?:@(?P<revision>[^/?]+))?(?:/(?P<path>[^?]*))?")
MAX_OPEN = 64
"""Open files of one process."""
STATES = ("ETag", "etag", "Last-Modified", "LastModified", "updated")
"""What fsspec's file systems call that which changes with a file's content."""
PART = 8 << 20
"""Bytes of one request while a whole file is fetched: what a broken connection costs."""

T = TypeVar("T")


class Refused(InputError):
    """What a server answers for good: it has no such file, or does not give it away. Says nothing about its content."""


@dataclass(frozen=True)
class Access:
    """How patient remote reads are."""

    timeout: float
    """Seconds without a byte after which a request is given up, and tried again."""
    outage_minutes: float
    """How long a server that is away is waited for."""
    query: str = field(default_factory=lambda: os.environ.get(QUERY, "").removeprefix("?"), repr=False)
    """Of signed URLs: a secret that is added to every http request."""


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


class Local:
    """Files below a folder."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._files: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def where(self, name: str) -> str:
        """What to call a file in messages."""
        return str(self.base / name)

    def names(self) -> list[str]:
        """Files of the folder, in order; StorageError, OSError."""
        return persist(self.base, lambda: sorted(entry.name for entry in os.scandir(self.base) if entry.is_file()))

    def size(self, name: str) -> int:
        """Bytes of a file; StorageError, OSError."""
        return self.state(name)[0]

    def state(self, name: str) -> tuple[int, str]:
        """(bytes, what changes with the content: time of modification in ns); StorageError, OSError."""
        found = persist(self.base / name, lambda: os.stat(self.base / name))
        return found.st_size, str(found.st_mtime_ns)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Those bytes, or fewer where the file ends.

        Raises:
            StorageError: they cannot be read now. OSError: the file is not there, or may not be read.
        """
        return persist(self.base / name, lambda: self._read(name, offset, size))

    def _read(self, name: str, offset: int, size: int) -> bytes:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[name] = os.open(self.base / name, os.O_RDONLY)
        try:
            return os.pread(self._files[name], size, offset)
        except OSError:
            os.close(self._files.pop(name))  # a stale handle stays so: the next try opens the file again
            raise


class Remote:
    """Files below a URL."""

    def __init__(self, base: str, access: Access) -> None:
        self.base, self.access = base.rstrip("/"), access
        self._root = _root(self.base)
        self._query = access.query if self._root.startswith("http") else ""
        self._fs = _filesystem(self._root, access.timeout, bool(self._query))

    def where(self, name: str) -> str:
        """What to call a file in messages: its URL, without a query."""
        return shown(f"{self.base}/{name}")

    def _url(self, name: str) -> str:
        """What is asked for."""
        if not self._query:
            return f"{self._root}/{name}"
        path, _, own = name.partition("?")
        return f"{self._root}/{quote(path)}?{own}{'&' if own else ''}{self._query}"

    def names(self) -> list[str]:
        """Files directly below the URL, in order; over http, those that the server's listing links to."""
        found = self._try("", self._hub_names if HF.match(self.base) else self._linked)
        return sorted(path.partition("?")[0].rstrip("/").rpartition("/")[2] for path in found)

    def _linked(self) -> list[str]:
        query = f"?{self._query}" if self._query else ""  # fsspec puts the names behind it
        return [str(path).replace(query, "") for path in self._fs.ls(self._url(""), detail=False)]

    def _hub_names(self) -> list[str]:
        """Files of a folder of a data set on the hub, page by page."""
        from fsspec.asyn import sync

        async def page(url: str) -> tuple[Any, str]:
            session = await self._fs.set_session()
            async with session.get(url) as answer:
                answer.raise_for_status()
                return await answer.json(), str(answer.links.get("next", {}).get("url", ""))

        api, _, path = self._root.replace("/datasets/", "/api/datasets/", 1).partition("/resolve/")
        found, url = list[str](), f"{api}/tree/{path}"
        while url:
            entries, url = sync(self._fs.loop, page, url)
            found += [entry["path"] for entry in entries if entry["type"] == "file"]
        return found

    def size(self, name: str) -> int:
        """Bytes of a file; errors as in `read`."""
        return self.state(name)[0]

    def state(self, name: str) -> tuple[int, str]:
        """(bytes, what changes with the content: ETag or time of modification, empty if the server says neither);
        errors as in `read`."""
        about = self._try(name, lambda: self._fs.info(self._url(name)))
        if not isinstance(about["size"], int):
            raise Refused(f"{self.where(name)}: the server does not say how many bytes it has (Content-Length)")
        return about["size"], next((str(about[key]) for key in STATES if about.get(key)), "")

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly those bytes.

        Raises:
            StorageError: they cannot be read now. Refused: the server says that it has none, or gives none.
        """

        def once() -> bytes:
            data: bytes = self._fs.cat_file(self._url(name), start=offset, end=offset + size)
            if len(data) > size:
                raise Refused(
                    f"{self.where(name)}: asked for {size} bytes, got {len(data)}: the server ignores byte ranges"
                )
            if len(data) < size:
                there = self._fs.info(self._url(name))["size"]
                if isinstance(there, int) and there < offset + size:
                    raise Refused(
                        f"{self.where(name)}: it has {there} bytes, but {size} from byte {offset} on are asked"
                    )
                raise ConnectionError(f"got {len(data)} of {size} bytes from byte {offset} on")
            return data

        return self._try(name, once) if size else b""

    def fetch(self, name: str, path: Path, size: int) -> str:
        """Download a file of `size` bytes to `path` and sync it; return its SHA-256.

        Raises:
            StorageError, Refused: as `read`. OSError: it cannot be written.
        """
        digest = hashlib.sha256()
        with open(path, "r+b" if path.exists() else "wb") as file:
            for offset in range(0, size, PART):
                data = self.read(name, offset, min(PART, size - offset))
                digest.update(data)
                file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _try(self, name: str, once: Callable[[], T]) -> T:
        try:
            return persist(self.where(name), once, _passes, _reason, self.access.outage_minutes)
        except Exception as error:
            if not _of_transport(error):
                raise
            raise Refused(f"{self.where(name)}: {_reason(error)}") from error


Storage = Local | Remote


def open_storage(base: str, access: Access) -> Storage:
    """The files below a local folder or a URL.

    Raises:
        InputError: a protocol that is not read, or whose package is not installed.
    """
    return Remote(base, access) if is_url(base) else Local(Path(base))


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


def _root(base: str) -> str:
    """Where the files of a base are asked for: itself, or for hf:// the hub, or HF_ENDPOINT in its place."""
    if protocol_of(base) != "hf":
        return base
    if not (match := HF.fullmatch(base)):
        raise InputError(f"{shown(base)!r}: expected hf://datasets/OWNER/NAME[@REVISION]/FOLDER")
    where = f"{match['name']}/resolve/{match['revision'] or 'main'}/{match['path'] or ''}"
    return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/datasets/{where}".rstrip("/")


def _headers(base: str) -> dict[str, str]:
    """What is sent with every http request: MEGAPIX_HTTP_HEADERS, and HF_TOKEN to the hub. A netrc is aiohttp's."""
    try:
        given = json.loads(os.environ.get(HEADERS) or "{}")
        headers = {str(name): given[name].strip() for name in given}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{HEADERS}: expected a JSON object of texts, such as '{{\"Authorization\": …}}'") from error
    host = urlsplit(base).hostname
    named = "authorization" in {name.lower() for name in headers}
    if not named and os.environ.get("HF_TOKEN") and host == urlsplit(os.environ.get("HF_ENDPOINT", HUB)).hostname:
        headers["Authorization"], named = f"Bearer {os.environ['HF_TOKEN'].strip()}", True
    if named and _in_netrc(host or ""):
        raise InputError(f"{host}: the netrc has a password, and {HEADERS} or HF_TOKEN another; expected one of them")
    return headers


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _filesystem(base: str, timeout: float, encoded: bool) -> Any:
    protocol = protocol_of(base)
    package = PROTOCOLS[protocol]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{base!r} needs {package}: pip install 'megapix[{EXTRAS[package]}]'")
    import fsspec

    if package == "aiohttp":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        # http_proxy, https_proxy, no_proxy and a netrc count
        client = {"timeout": limits, "trust_env": True, "headers": _headers(base)}
        options = {"client_kwargs": client, "use_listings_cache": False, "encoded": encoded, **_certificates()}
        return fsspec.filesystem(protocol, **options)
    if package == "s3fs":
        config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
        return fsspec.filesystem(protocol, config_kwargs=config, use_listings_cache=False)
    return fsspec.filesystem(protocol, requests_timeout=timeout, use_listings_cache=False)


def _certificates() -> dict[str, Any]:
    """How requests are checked, where a variable that curl and `requests` read names certificates; OpenSSL itself reads
    SSL_CERT_FILE and SSL_CERT_DIR."""
    path = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not path or os.environ.get("SSL_CERT_FILE"):
        return {}
    try:
        return {"ssl": ssl.create_default_context(cafile=path)}
    except OSError as error:
        raise InputError(f"REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE = {path!r}: {error.strerror or error}") from error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, where there is one."""
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if status is None and isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None and error.__cause__ is not None:
        return _status(error.__cause__)
    return status if isinstance(status, int) else None


def _cause(error: BaseException) -> BaseException:
    """What is behind an error: fsspec's http calls whatever keeps it from a file's size FileNotFoundError."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_transport(error: BaseException) -> bool:
    """Whether an error comes from the connection or the server; each protocol's library has types of its own."""
    if isinstance(error, OSError | TimeoutError | asyncio.TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "fsspec")


def _passes(error: BaseException) -> bool:
    """Whether trying again can help: not for what the server refuses or does not have, nor if it is not trusted."""
    error = _cause(error)
    definite = FileNotFoundError | PermissionError | ssl.SSLCertVerificationError
    if not _of_transport(error) or isinstance(error, definite):
        return False
    status = _status(error)
    return status is None or status in (408, 425, 429) or status >= 500


def _reason(error: BaseException) -> str:
    error = _cause(error)
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "not found (status 404)"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access refused (status {status or 403})"
    if status is not None:
        return f"the server answered with status {status}"
    return shown(f"{type(error).__name__}: {error}".rstrip(": "))

"""How each protocol is spoken: fsspec's file system for a URL, with time-outs, secrets and certificates."""

from __future__ import annotations

import base64
import importlib.util
import json
import netrc
import os
import re
import ssl
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from megapix.errors import InputError
from megapix.shards.storage.urls import HEADERS, PROTOCOLS, protocol_of, shown

EXTRAS = {"aiohttp": "http", "s3fs": "s3", "gcsfs": "gs"}
QUERY = "MEGAPIX_HTTP_QUERY"
"""Environment variable: what is added to each URL, such as 'sig=…'."""
HUB = "https://huggingface.co"
HF = re.compile(r"hf://datasets/(?P<name>[^/@?]+/[^/@?]+)(?:@(?P<revision>[^/?]+))?(?:/(?P<path>[^?]*))?")


@dataclass(frozen=True)
class Access:
    """How patient remote reads are."""

    timeout: float
    """Seconds without a byte after which a request is given up, and tried again."""
    outage_minutes: float
    """How long a server that is away is waited for."""
    query: str = field(default_factory=lambda: os.environ.get(QUERY, "").removeprefix("?"), repr=False)
    """Of signed URLs: a secret that is added to every http request."""
    in_flight: int = 32
    """Requests of one process in flight together, at most: at 100 ms each they bring 320 answers a second."""


def root_of(base: str) -> str:
    """Where the files of a base are asked for: itself, or for hf:// the hub, or HF_ENDPOINT in its place."""
    if protocol_of(base) != "hf":
        return base
    if not (match := HF.fullmatch(base)):
        raise InputError(f"{shown(base)!r}: expected hf://datasets/OWNER/NAME[@REVISION]/FOLDER")
    where = f"{match['name']}/resolve/{match['revision'] or 'main'}/{match['path'] or ''}"
    return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/datasets/{where}".rstrip("/")


def _headers(base: str) -> dict[str, str]:
    """What is sent with every http request: MEGAPIX_HTTP_HEADERS, HF_TOKEN to the hub, or a password of the netrc.
    A redirect to another host takes no `Authorization` along."""
    try:
        given = json.loads(os.environ.get(HEADERS) or "{}")
        headers = {str(name): given[name].strip() for name in given}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{HEADERS}: expected a JSON object of texts, such as '{{\"Authorization\": …}}'") from error
    host = urlsplit(base).hostname
    named = "authorization" in {name.lower() for name in headers}
    if not named and os.environ.get("HF_TOKEN") and host == urlsplit(os.environ.get("HF_ENDPOINT", HUB)).hostname:
        headers["Authorization"], named = f"Bearer {os.environ['HF_TOKEN'].strip()}", True
    if password := _in_netrc(host or ""):
        if named:
            raise InputError(f"{host}: the netrc has a password, {HEADERS} or HF_TOKEN another; expected one of them")
        headers["Authorization"] = _basic(*password)
    return headers


def _in_netrc(host: str) -> tuple[str, str] | None:
    """Name and password for a host: in the file NETRC, or ~/.netrc, where there is one.

    Raises:
        InputError: NETRC names a file that is none.
    """
    named = os.environ.get("NETRC")
    try:
        found = netrc.netrc(named or os.path.expanduser("~/.netrc")).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        if named and not isinstance(error, FileNotFoundError):
            raise InputError(f"NETRC = {named!r}: cannot be read: {type(error).__name__}") from error
        return None
    return (found[0] or found[1] or "", found[2] or "") if found else None


def _basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def _proxy(base: str) -> dict[str, str]:
    """The proxy of a URL's requests, with its password, where http_proxy, https_proxy and no_proxy name one.

    Raises:
        InputError: it is not one that speaks http.
    """
    parts = urlsplit(base)
    named = getproxies().get(parts.scheme, "")
    proxy = urlsplit(named if "://" in named else f"http://{named}")  # as curl takes it
    if not proxy.hostname or proxy_bypass(parts.netloc):
        return {}
    try:
        spoken = proxy.scheme in ("http", "https") and proxy.port != 0
    except ValueError:  # the port is no number
        spoken = False
    if not spoken:
        shown_as = f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"
        raise InputError(f"{parts.scheme}_proxy = {shown_as!r}: expected a proxy that speaks http, http://HOST:PORT")
    if not proxy.username and (password := _in_netrc(proxy.hostname)):
        proxy = proxy._replace(netloc=":".join(map(quote, password)) + "@" + proxy.netloc)
    return {"proxy": proxy.geturl()}


async def _session(in_flight: int, **options: Any) -> Any:
    """aiohttp's session for a file system. Of itself it keeps 100 connections, and asks the environment and the netrc
    again at each request, in a thread: a third of what a read costs."""
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight), **options)


def filesystem(base: str, access: Access, encoded: bool) -> Any:
    """fsspec's file system for a URL."""
    protocol = protocol_of(base)
    package = PROTOCOLS[protocol]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{base!r} needs {package}: pip install 'megapix[{EXTRAS[package]}]'")
    import fsspec

    timeout = access.timeout
    if package == "aiohttp":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options = {"client_kwargs": {"timeout": limits, "headers": _headers(base)}, "encoded": encoded}
        options |= {"get_client": partial(_session, access.in_flight), "use_listings_cache": False}
        return fsspec.filesystem(protocol, **options, **_certificates(), **_proxy(base))
    if package == "s3fs":
        patience = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
        config = {**patience, "max_pool_connections": access.in_flight}
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

"""What a server or a connection answers in place of bytes: whether it passes, and how it is said."""

from __future__ import annotations

import asyncio
import ssl

from megapix.errors import InputError
from megapix.shards.storage.urls import shown


class Refused(InputError):
    """What a server answers for good: it has no such file, or does not give it away. Says nothing about its content."""


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


def of_transport(error: BaseException) -> bool:
    """Whether an error comes from the connection or the server; each protocol's library has types of its own."""
    if isinstance(error, OSError | TimeoutError | asyncio.TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "fsspec")


def passes(error: BaseException) -> bool:
    """Whether trying again can help: not for what the server refuses or does not have, nor if it is not trusted."""
    error = _cause(error)
    definite = FileNotFoundError | PermissionError | ssl.SSLCertVerificationError
    if not of_transport(error) or isinstance(error, definite):
        return False
    status = _status(error)
    return status is None or status in (408, 425, 429) or status >= 500


def reason(error: BaseException) -> str:
    """An error in words, without secrets."""
    error = _cause(error)
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "not found (status 404)"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access refused (status {status or 403})"
    if status is not None:
        return f"the server answered with status {status}"
    return shown(f"{type(error).__name__}: {error}".rstrip(": "))

"""Byte ranges of files below a URL, one at a time or many in flight together."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

from megapix.outage import persist
from megapix.shards.storage.answers import Refused, of_transport, passes, reason
from megapix.shards.storage.protocols import HF, Access, filesystem, root_of
from megapix.shards.storage.urls import shown

STATES = ("ETag", "etag", "Last-Modified", "LastModified", "updated")
"""What fsspec's file systems call that which changes with a file's content."""
PART = 8 << 20
"""Bytes of one request while a whole file is fetched: what a broken connection costs."""
PARTS = 3
"""Such requests of one file in flight together."""

Range: TypeAlias = tuple[str, int, int]
"""Name of a file, offset, and bytes from there on."""
T = TypeVar("T")


class Remote:
    """Files below a URL."""

    def __init__(self, base: str, access: Access) -> None:
        self.base, self.access = base.rstrip("/"), access
        self._root = root_of(self.base)
        self._query = access.query if self._root.startswith("http") else ""
        self._fs = filesystem(self._root, access, bool(self._query))
        self._slots: asyncio.Semaphore | None = None
        self._trusted = False
        """Whether the server has given a range."""
        self._asked: set[asyncio.Task[None]] = set()

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

    def read(self, name: str, offset: int, size: int, begun: Future[bytes] | None = None) -> bytes:
        """Exactly those bytes.

        Args:
            begun: the answer of `begin` for this range, which is the first try.

        Raises:
            StorageError: they cannot be read now. Refused: the server says that it has none, or gives none.
        """

        def once() -> bytes:
            nonlocal begun
            answer, begun = begun, None
            url = self._url(name)
            data: bytes = answer.result() if answer else self._fs.cat_file(url, start=offset, end=offset + size)
            if len(data) > size:
                raise Refused(
                    f"{self.where(name)}: asked for {size} bytes, got {len(data)}: the server ignores byte ranges"
                )
            if len(data) < size:
                there = self._fs.info(url)["size"]
                if isinstance(there, int) and there < offset + size:
                    raise Refused(
                        f"{self.where(name)}: it has {there} bytes, but {size} from byte {offset} on are asked"
                    )
                raise ConnectionError(f"got {len(data)} of {size} bytes from byte {offset} on")
            return data

        return self._try(name, once) if size else b""

    def begin(self, ranges: Sequence[Range]) -> list[Future[bytes]]:
        """Ask for ranges without waiting, in order, `Access.in_flight` at a time; the answers are for `read`, which
        checks them, and tries again where one has failed."""
        answers = [Future[bytes]() for _ in ranges]
        self._fs.loop.call_soon_threadsafe(self._ask, list(zip(ranges, answers, strict=True)))
        return answers

    def _ask(self, asked: list[tuple[Range, Future[bytes]]]) -> None:
        """In the thread of the event loop, which answers while the process decodes."""
        self._slots = self._slots or asyncio.Semaphore(1)
        for where, answer in asked:
            task = self._fs.loop.create_task(self._answer(*where, answer, self._slots))
            self._asked.add(task)  # the loop itself holds no task
            task.add_done_callback(self._asked.discard)

    async def _answer(self, name: str, offset: int, size: int, answer: Future[bytes], slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                data = await self._fs._cat_file(self._url(name), start=offset, end=offset + size)
            except BaseException as error:
                answer.set_exception(error)
                return
        answer.set_result(data)
        # One request goes ahead of all others: of a server that ignores ranges many would bring as many whole files.
        if not self._trusted and len(data) <= size:
            self._trusted = True
            for _ in range(self.access.in_flight - 1):
                slots.release()

    def fetch(self, name: str, path: Path, size: int) -> str:
        """Download a file of `size` bytes to `path` and sync it; return its SHA-256.

        Raises:
            StorageError, Refused: as `read`. OSError: it cannot be written.
        """
        digest = hashlib.sha256()
        parts = deque((name, offset, min(PART, size - offset)) for offset in range(0, size, PART))
        begun = deque[tuple[Range, Future[bytes]]]()
        with open(path, "r+b" if path.exists() else "wb") as file:
            while parts or begun:
                while parts and len(begun) < PARTS:
                    part = parts.popleft()
                    begun.append((part, self.begin([part])[0]))
                part, answer = begun.popleft()
                data = self.read(*part, answer)
                digest.update(data)
                file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _try(self, name: str, once: Callable[[], T]) -> T:
        try:
            return persist(self.where(name), once, passes, reason, self.access.outage_minutes)
        except Exception as error:
            if not of_transport(error):
                raise
            raise Refused(f"{self.where(name)}: {reason(error)}") from error

"""A web server that is far away: nginx over a folder, and before it a proxy that brings every request late.

    python -m benchmarks.latency LISTEN TARGET SECONDS

What a client sends reaches the server SECONDS later, as over a long line, on each connection by itself: any number of
them may be on their way. Opening a connection costs a round trip too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

CONF = """
{user}daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
  log_format main '$bytes_sent'; access_log {folder}/access.log main; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class _Back(asyncio.Protocol):
    """The server's side: its bytes go to the client at once."""

    def __init__(self, client: asyncio.Transport) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.close()


class _Late(asyncio.Protocol):
    """The client's side: its bytes go to the server `seconds` later, in order."""

    def __init__(self, target: int, seconds: float) -> None:
        self._target, self._seconds, self._server = target, seconds, asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._opening = self._loop.create_task(self._open(cast(asyncio.Transport, transport)))

    async def _open(self, client: asyncio.Transport) -> None:
        await asyncio.sleep(self._seconds)
        server, _ = await self._loop.create_connection(lambda: _Back(client), "127.0.0.1", self._target)
        client.set_write_buffer_limits(high=4 << 20)
        self._server.set_result(server)

    def data_received(self, data: bytes) -> None:
        self._loop.call_later(self._seconds, self._hand_on, data)

    def _hand_on(self, data: bytes) -> None:
        if self._server.done():
            self._server.result().write(data)
        else:
            self._server.add_done_callback(lambda server: server.result().write(data))

    def connection_lost(self, error: Exception | None) -> None:
        if self._server.done():
            self._server.result().close()

    def pause_writing(self) -> None:
        if self._server.done():
            self._server.result().pause_reading()

    def resume_writing(self) -> None:
        if self._server.done():
            self._server.result().resume_reading()


async def _serve(listen: int, target: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Late(target, seconds), "127.0.0.1", listen, backlog=1024)
    async with server:
        await server.serve_forever()


@dataclass
class Far:
    """A running server."""

    url: str
    log: Path

    def sent(self) -> tuple[int, int]:
        """(requests, bytes) that nginx has answered with so far, headers included."""
        lines = self.log.read_text().split()
        return len(lines), sum(map(int, lines))


@contextmanager
def far(root: Path, folder: Path, seconds: float, port: int) -> Iterator[Far]:
    """nginx over `root`, `seconds` away; on `port`, and with a proxy on the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    user = "user root; " if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(CONF.format(folder=folder, root=root, port=port, user=user))
    (folder / "access.log").unlink(missing_ok=True)
    commands = [["nginx", "-c", str(folder / "nginx.conf")]]
    if seconds:
        commands.append([sys.executable, "-m", "benchmarks.latency", str(port + 1), str(port), str(seconds)])
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    found = Far(f"http://127.0.0.1:{port + bool(seconds)}", folder / "access.log")
    try:
        _wait(found.url, processes)
        found.log.write_text("")
        yield found
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _wait(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    while all(process.poll() is None for process in processes):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("nginx or the proxy has ended: is nginx installed, and the port free?")


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

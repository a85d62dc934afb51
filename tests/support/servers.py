"""Servers for remote shards: nginx, moto's S3, and one that breaks off or stalls in the middle of an answer."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError

from tests.support.launch import free_port

NGINX = """
{user}daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  log_format main '$request_method $uri $http_range';
  access_log {folder}/access.log main;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port}; root {root}; autoindex on;
    location /forbidden/ {{ return 403; }}
    location /broken/ {{ return 500; }}
    location /slow/ {{ alias {root}/; limit_rate 8k; }}
  }}
}}
"""


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except HTTPError:
            return
        except (URLError, ConnectionError):
            continue
    raise RuntimeError(f"the server ended with code {process.returncode}")


class _ManyAtOnce(ThreadingHTTPServer):
    """With room for as many connections at once as a process of ours opens; Python's own has 5."""

    request_queue_size = 128
    daemon_threads = True


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server on this machine that answers by `handler`, with TLS if there is a context for it."""
    server = _ManyAtOnce(("127.0.0.1", 0), handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Nginx:
    """A running nginx."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ["nginx", "-c", str(self.folder / "nginx.conf")]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _wait_for(f"{self.url}/", self.process)

    def stop(self) -> None:
        """End it, if it is at work."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def requests(self, ending: str = ".tar") -> list[tuple[str, str]]:
        """(path, range) of each GET for a file with that ending so far."""
        lines = [line.split(" ", 2) for line in (self.folder / "access.log").read_text().splitlines()]
        return [(path, ranges) for method, path, ranges in lines if method == "GET" and path.endswith(ending)]


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[Nginx]:
    """nginx serving `root`, with /forbidden/ (403), /broken/ (500) and /slow/ (the files, at 8 KiB a second)."""
    port = free_port()
    user = "user root; " if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, root=root, port=port, user=user))
    server = Nginx(f"http://127.0.0.1:{port}", folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def s3() -> Iterator[str]:
    """moto's S3 server; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@dataclass
class Faults:
    """What the faulty server does with its next answers to GET."""

    after: int = 0
    """Answers that are whole before the first fault."""
    breaks: int = 0
    """Answers that end in the middle."""
    stalls: int = 0
    """Answers that stop in the middle and wait."""
    ignores_ranges: bool = False
    seen: int = 0
    """GET requests so far."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, offset, bytes) of what was sent of each answer so far."""
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def faulty(root: Path, faults: Faults) -> Iterator[str]:
    """An HTTP server with ranges over `root` that does what `faults` says; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            faults.seen += 1
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            data = (root / self.path.lstrip("/")).read_bytes()
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(match[1]) : int(match[2]) + 1] if match and not faults.ignores_ranges else data
            self.send_response(206 if len(part) < len(data) else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            if len(part) < len(data) and match:
                self.send_header("Content-Range", f"bytes {match[1]}-{match[2]}/{len(data)}")
            self.end_headers()
            if not body:
                return
            start, half = int(match[1]) if match else 0, part[: len(part) // 2]
            whole = faults.seen <= faults.after or not (faults.breaks or faults.stalls)
            faults.sent.append((self.path.lstrip("/"), start, len(part if whole else half)))
            if whole:
                self.wfile.write(part)
            elif faults.breaks:
                faults.breaks -= 1
                self.wfile.write(half)
                self.close_connection = True
            else:
                faults.stalls -= 1
                self.wfile.write(half)
                self.wfile.flush()
                faults.over.wait(60)
                self.close_connection = True

    with answering(Handler) as url:
        try:
            yield url
        finally:
            faults.over.set()

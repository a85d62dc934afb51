"""A stand-in for the Hugging Face hub: repositories in memory, as far as uploading a folder and downloading it ask."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One revision of each repository: name -> path -> content."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self._body()
        self.server.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_good":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            self.server.repos.setdefault(name, {})
            self.server.private[name] = bool(told.get("private")) or told.get("visibility") == "private"
            self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main.*", self.path):
            for line in body.decode().splitlines():
                value = json.loads(line)
                if value["key"] == "file":
                    file = value["value"]
                    self.server.repos[match[1]][file["path"]] = base64.b64decode(file["content"])
            self._answer({"commitUrl": f"{self.server.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/paths-info/" in self.path:
            self._answer([])
        else:
            self._answer({"error": f"what is {self.path}"}, 404)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(/.*)?", path)
        name, rest = (match[1], match[2] or "") if match else ("", "")
        repo = self.server.repos.get(name)
        if repo is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models") and rest.startswith("/tree/"):
            oids = {file: hashlib.sha1(data).hexdigest() for file, data in repo.items()}
            self._answer(
                [{"type": "file", "path": file, "size": len(repo[file]), "oid": oid} for file, oid in oids.items()]
            )
        elif path.startswith("/api/models"):
            self._answer(
                {"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": file} for file in repo]}
            )
        elif found := re.fullmatch(r"/resolve/[^/]+/(.+)", rest):
            if found[1] not in repo:
                self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            data = repo[found[1]]
            self._answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer({"error": f"what is {self.path}"}, 404)

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub while this lasts."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

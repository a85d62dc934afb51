"""Signed URLs, request headers, a netrc and the hub: secrets reach the server, and nothing else."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from data_prep.listing.base import Entries
from data_prep.listing.tar_set import tar_files, without_secrets
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.shards.storage import Access, Refused, Remote, shown
from tests.data_prep.test_index import index_of
from tests.support.foreign_shards import make
from tests.support.servers import answering

pytest.importorskip("aiohttp")

SECRET = "s3cr3t/+%2B"
QUERY = "sv=2026&sig=s3cr3t%2F%2B%252B"
VARIABLES = ("MEGAPIX_HTTP_HEADERS", "MEGAPIX_HTTP_QUERY", "HF_TOKEN", "HF_ENDPOINT", "NETRC", "HOME")


@contextmanager
def guarded(root: Path, header: str = "", signature: str = "") -> Iterator[tuple[str, list[str]]]:
    """A server of the files below `root` that answers 403 without this Authorization header, or signature; it lists
    folders as web servers do, and data sets (DATASETS/OWNER/NAME) as the hub does, two files a page."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            asked.append(self.path)
            right = not header or self.headers.get("Authorization") == header
            if not right or (signature and query.get("sig") != [signature]):
                return self._send(403, b"")
            if match := re.fullmatch(r"/api/datasets/(\w+/\w+)/tree/([\w.%]+)/?(.*)", url.path):
                return self._tree(root / match[1] / unquote(match[2]) / match[3], int(query.get("at", ["0"])[0]))
            path = re.sub(r"^/datasets/(\w+/\w+)/resolve/", r"/\1/", url.path)
            place = root / unquote(path).lstrip("/")
            if place.is_dir():
                links = "".join(f'<a href="{one.name}">{one.name}</a>' for one in place.iterdir())
                return self._send(200, links.encode())
            if not place.is_file():
                return self._send(404, b"")
            data, ranges = place.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not ranges:
                return self._send(200, data, body)
            first, last = int(ranges[1]), min(int(ranges[2]), len(data) - 1)
            self._send(206, data[first : last + 1], body, [("Content-Range", f"bytes {first}-{last}/{len(data)}")])

        def _tree(self, folder: Path, at: int) -> None:
            found = sorted(folder.iterdir())
            entries = [
                {"type": "directory" if one.is_dir() else "file", "path": one.name} for one in found[at : at + 2]
            ]
            url = f"http://{self.headers['Host']}{self.path.partition('?')[0]}?at={at + 2}"
            more = [("Link", f'<{url}>; rel="next"')] if at + 2 < len(found) else []
            self._send(200, json.dumps(entries).encode(), True, [("Content-Type", "application/json"), *more])

        def _send(
            self, code: int, data: bytes, body: bool = True, headers: list[tuple[str, str]] | None = None
        ) -> None:
            self.send_response(code)
            for name, value in (("Content-Length", str(len(data))), ("Accept-Ranges", "bytes"), *(headers or [])):
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    with answering(Handler) as url:
        yield url, asked


@pytest.fixture(autouse=True)
def _without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def data_prep(*arguments: object, code: int = 0) -> str:
    """What a process says; it must end with that code, and without the secret."""
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def nowhere(folder: Path) -> None:
    """The secret is in no file below the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]


def test_a_signed_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent as it was given, recorded nowhere, and asked for when the index is read."""
    make(tmp_path / "theirs", 2)
    index_of(tmp_path / "theirs", tmp_path / "local")
    with guarded(tmp_path / "theirs", signature=SECRET) as (url, asked):
        pattern, out = f"{url}/0000{{0..1}}.tar?{QUERY}", tmp_path / "index"
        said = data_prep("index", pattern, "--out", out, "--size", 16, "--workers", 1)
        assert "the query is not recorded: what reads the index needs it in MEGAPIX_HTTP_QUERY" in said
        assert all(QUERY in path for path in asked)
        nowhere(out)
        index = read_index(out)
        assert (index.base, index.table_sha256) == (url, read_index(tmp_path / "local").table_sha256)
        assert "00000.tar: access refused (status 403)" in data_prep("verify", out, "--workers", 1, code=2)
        monkeypatch.setenv("MEGAPIX_HTTP_QUERY", QUERY)
        data_prep("verify", out, "--workers", 1)
        listed = Remote(url, Access(5.0, 0.001))
        assert listed.names() == ["00000.tar", "00001.tar"]
        with pytest.raises(Refused) as caught:
            listed.read("none.tar", 0, 5)
        assert str(caught.value) == f"{url}/none.tar: not found (status 404)"


def test_what_a_query_may_be(tmp_path: Path) -> None:
    url = "https://host/set"
    assert without_secrets(f"{url}/{{0..1}}.tar?download=true") == (f"{url}/{{0..1}}.tar?download=true", "")
    assert without_secrets(f"{url}/{{0..1}}.tar?{QUERY}") == (f"{url}/{{0..1}}.tar", QUERY)
    assert without_secrets(str(tmp_path / "what?.tar")) == (str(tmp_path / "what?.tar"), "")
    found = tar_files(f"{url}/{{0..1}}.tar?download=true", Access(1, 0), Entries())
    assert found == (url, ["0.tar?download=true", "1.tar?download=true"])
    for pattern, words in (
        (f"{url}/{{0.tar?sig=s3cr3t1,1.tar?sig=s3cr3t2}}", r"each tar file has a signature of its own"),
        (f"https://me:s3cr3t@host/0.tar?{QUERY}", r"https://…@host: a password would be recorded; give it in a netrc"),
        (f"ftp://host/0.tar?{QUERY}", "'ftp' is not read"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            tar_files(without_secrets(pattern)[0], Access(1, 0), Entries())
        assert "s3cr3t" not in str(caught.value)
    for pattern, words in (
        (f"{url}/{{0.tar?dl=0,0.tar?dl=1}}", "names a tar file twice"),
        (f"{url}?dl=1", "expected the URL of a tar file, or of a folder without a query"),
        (f"{url}/0.tar.gz?dl=1", "is compressed"),
    ):
        with pytest.raises(InputError, match=words):
            tar_files(pattern, Access(1, 0), Entries())
    with pytest.raises(InputError, match=r"'https://host/set\?…': a URL's query would be recorded; set it in"):
        locate(DataConfig(path=f"{url}?{QUERY}", cache=str(tmp_path)))
    assert shown(f"{url}/0.tar?{QUERY}: refused") == f"{url}/0.tar?… refused"
    assert "s3cr3t" not in repr(Access(1.0, 0.0, QUERY))


def test_a_harmless_query_is_recorded(tmp_path: Path) -> None:
    make(tmp_path / "theirs", 1)
    with guarded(tmp_path / "theirs") as (url, asked):
        data_prep("index", f"{url}/00000.tar?download=true", "--out", tmp_path / "index", "--size", 16, "--workers", 1)
        assert [entry.name for entry in read_index(tmp_path / "index").files] == ["00000.tar?download=true"]
        data_prep("verify", tmp_path / "index", "--workers", 1)
        assert set(asked) == {"/00000.tar?download=true"}


@pytest.mark.parametrize("way", ["headers", "netrc", "netrc at home"])
def test_passwords(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "0.tar").write_bytes(b"content")
    header = f"Basic {base64.b64encode(b'me:s3cr3t').decode()}"
    with guarded(tmp_path / "served", header=header) as (url, _):
        with pytest.raises(Refused, match=r"0.tar: access refused \(status 403\)"):
            Remote(url, Access(5.0, 0.001)).size("0.tar")
        if way == "headers":
            monkeypatch.setenv("MEGAPIX_HTTP_HEADERS", json.dumps({"Authorization": header}))
        else:
            path = tmp_path / (".netrc" if "home" in way else "passwords")
            path.write_text("machine 127.0.0.1 login me password s3cr3t\n")
            path.chmod(0o600)
            if "home" not in way:
                monkeypatch.setenv("NETRC", str(path))
        allowed = Remote(url, Access(5.0, 0.001))
        assert (allowed.size("0.tar"), allowed.read("0.tar", 1, 4), allowed.names()) == (7, b"onte", ["0.tar"])


@pytest.mark.parametrize("way", ["headers", "netrc"])
def test_a_redirect_takes_no_password_along(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub's to its storage; within one host the password goes along."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            to = {"/near/0.tar": "/there/0.tar", "/far/0.tar": f"{elsewhere}/there/0.tar"}.get(self.path)
            self.send_response(302 if to else 206)
            for name, value in (("Location", to),) if to else (("Content-Range", "bytes 0-2/3"),):
                self.send_header(name, str(value))
            self.send_header("Content-Length", "0" if to else "3")
            self.end_headers()
            self.wfile.write(b"" if to else b"abc")

    header = f"Basic {base64.b64encode(b'me:s3cr3t').decode()}"
    if way == "headers":
        monkeypatch.setenv("MEGAPIX_HTTP_HEADERS", json.dumps({"Authorization": header}))
    else:
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password s3cr3t\n")
    with answering(Handler) as url, answering(Handler) as elsewhere:
        for where in ("near", "far"):
            assert Remote(f"{url}/{where}", Access(5.0, 0.001)).read("0.tar", 0, 3) == b"abc"
    assert seen == [("/near/0.tar", header), ("/there/0.tar", header), ("/far/0.tar", header), ("/there/0.tar", None)]


def test_a_netrc_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passwords").write_text("machine host s3cr3t password\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "passwords"))
    with pytest.raises(InputError, match=r"NETRC = '.*passwords': cannot be read: NetrcParseError$"):
        Remote("https://host/set", Access(1.0, 0.0))


def test_headers_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("Authorization: s3cr3t", '["s3cr3t"]', '{"Authorization": 5}'):
        monkeypatch.setenv("MEGAPIX_HTTP_HEADERS", text)
        with pytest.raises(InputError, match="MEGAPIX_HTTP_HEADERS: expected a JSON object of texts") as caught:
            Remote("https://host/set", Access(1.0, 0.0))
        assert "s3cr3t" not in str(caught.value)
    monkeypatch.setenv("MEGAPIX_HTTP_HEADERS", '{"authorization": "s3cr3t"}')
    (tmp_path / "passwords").write_text("default login me password s3cr3t\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "passwords"))
    with pytest.raises(InputError, match="host: the netrc has a password, MEGAPIX_HTTP_HEADERS or"):
        Remote("https://host/set", Access(1.0, 0.0))


def test_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, behind HF_ENDPOINT: listed page by page, read by ranges, with HF_TOKEN."""
    folder = tmp_path / "hub" / "owner" / "name" / "v1" / "train"
    make(folder, 5, samples=2)
    (folder / "more").mkdir()
    make(tmp_path / "hub" / "owner" / "name" / "main", 1)
    with guarded(tmp_path / "hub", header="Bearer s3cr3t") as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "s3cr3t")
        out = tmp_path / "index"
        data_prep("index", "hf://datasets/owner/name@v1/train", "--out", out, "--size", 16, "--workers", 1)
        index = read_index(out)
        assert index.base == "hf://datasets/owner/name@v1/train"
        assert [entry.name for entry in index.files] == [f"{n:05d}.tar" for n in range(5)]
        assert "/datasets/owner/name/resolve/v1/train/00004.tar" in asked
        nowhere(out)
        data = (folder / "00004.tar").read_bytes()
        assert Remote(index.base, Access(5.0, 0.001)).read("00004.tar", 600, 900) == data[600:1500]
        main = Remote("hf://datasets/owner/name", Access(5.0, 0.001))
        assert (main.names(), main.where("0.tar")) == (["00000.tar"], "hf://datasets/owner/name/0.tar")
        for base in ("hf://models/owner/name", "hf://datasets/owner"):
            with pytest.raises(InputError, match=r"expected hf://datasets/OWNER/NAME\[@REVISION\]/FOLDER"):
                Remote(base, Access(5.0, 0.001))
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(Refused, match=r"hf://datasets/owner/name/: access refused \(status 403\)"):
            Remote("hf://datasets/owner/name", Access(5.0, 0.001)).names()

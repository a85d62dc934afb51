"""Shards behind a proxy, and on a server whose certificate the system does not know."""

from __future__ import annotations

import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlparse

import pytest

from megapix.errors import InputError, StorageError
from megapix.shards.storage import Access, Remote
from tests.support.programs import needs
from tests.support.servers import answering

pytest.importorskip("aiohttp")

ACCESS = Access(timeout=5.0, outage_minutes=0.001)
CONTENT = bytes(range(256))


@contextmanager
def serving_ranges(context: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    """A server of byte ranges of CONTENT, and so a proxy of any host; yields its port and what it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            if "Proxy-Authorization" in self.headers:
                asked.append(self.headers["Proxy-Authorization"])
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            data = CONTENT[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
            self.end_headers()
            self.wfile.write(data)

    with answering(Handler, context) as url:
        yield int(url.rpartition(":")[2]), asked


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "ssl_cert_file",
        "requests_ca_bundle",
        "curl_ca_bundle",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_is_asked_but_for_hosts_that_need_none(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_ranges() as (proxy, through), serving_ranges() as (port, direct):
        monkeypatch.setenv("http_proxy", f"{scheme}127.0.0.1:{proxy}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert Remote("http://shards.invalid/set", ACCESS).read("0.tar", 3, 4) == CONTENT[3:7]
        assert [urlparse(url).netloc for url in through] == ["shards.invalid"]
        assert Remote(f"http://127.0.0.1:{port}/set", ACCESS).read("0.tar", 3, 4) == CONTENT[3:7]
        assert (len(through), direct) == (1, ["/set/0.tar"])


@pytest.mark.parametrize("way", ["in its URL", "netrc"])
def test_a_proxy_with_a_password(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cr@t\n")
    with serving_ranges() as (proxy, through):
        monkeypatch.setenv("NETRC", str(tmp_path / ("netrc" if way == "netrc" else "none")))
        password = "" if way == "netrc" else "me:s3cr%40t@"
        monkeypatch.setenv("http_proxy", f"http://{password}127.0.0.1:{proxy}")
        assert Remote("http://shards.invalid/set", ACCESS).read("0.tar", 3, 4) == CONTENT[3:7]
        assert through == ["http://shards.invalid/set/0.tar", "Basic " + b64encode(b"me:s3cr@t").decode()]


@pytest.mark.parametrize("shown", ["socks5://proxy:1080", "ftp://proxy", "http://proxy:web"])
def test_a_proxy_that_speaks_no_http(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", shown.replace("//", "//me:s3cr3t@"))
    with pytest.raises(InputError) as error:
        Remote("http://shards.invalid/set", ACCESS)
    assert str(error.value) == f"http_proxy = '{shown}': expected a proxy that speaks http, http://HOST:PORT"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that has signed itself, with its key, in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name, *files],
        check=True,
        capture_output=True,
    )
    both = folder / "both.pem"
    both.write_text((folder / "certificate").read_text() + (folder / "key").read_text())
    return both


READ = """
import sys
from megapix.shards.storage import Access, Remote
print(len(Remote(sys.argv[1], Access(5.0, 0.001)).read("0.tar", 3, 4)))
"""


@needs("openssl")
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_of_ones_own(variable: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: OpenSSL's variable is read once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving_ranges(context) as (port, _):
        url = f"https://127.0.0.1:{port}"
        with pytest.raises(InputError, match=r"0\.tar: .*certificate"):
            Remote(url, ACCESS).read("0.tar", 3, 4)
        monkeypatch.setenv(variable, str(certificate))
        done = subprocess.run([sys.executable, "-c", READ, url], capture_output=True, text=True)
        assert done.stdout == "4\n", done.stderr


def test_certificates_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    with pytest.raises(InputError, match=r"REQUESTS_CA_BUNDLE.* = '/no/such/file': No such file or directory"):
        Remote("https://127.0.0.1:1", ACCESS)


def test_nobody_there_is_no_bad_input() -> None:
    with pytest.raises(StorageError, match="Connect"):
        Remote("http://127.0.0.1:1", ACCESS).read("0.tar", 0, 1)

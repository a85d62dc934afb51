"""Ranges of remote files that are in flight together."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest

from megapix.shards.storage import Access, Refused, Remote
from megapix.shards.storage import ranges as module
from megapix.shards.storage.ranges import GAP, LONGEST, Ranges, joined
from tests.support.servers import answering

DATA = np.random.default_rng(0).bytes(1_000_003)
TOGETHER = 7
"""Requests that must have come before one of them is answered."""


class Server:
    """Answers its first request at once, and those after it when TOGETHER of them are there."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.fails = 0
        self.gate: threading.Barrier | None = threading.Barrier(TOGETHER)


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    pytest.importorskip("aiohttp")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()

        def do_GET(self) -> None:
            state.seen.append(self.headers["Range"])
            if state.gate and len(state.seen) > 1:
                state.gate.wait(timeout=60)
            if state.fails:
                state.fails -= 1
                self.send_error(503)
                return
            start, last = map(int, re.findall(r"\d+", self.headers["Range"]))
            if start >= len(DATA):
                self.send_error(416)
                return
            part = DATA[start : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    with answering(Handler) as url:
        yield state, url


def ranges_of(url: str) -> Ranges:
    return Ranges(Remote(url, Access(timeout=30.0, outage_minutes=0.05)))


def test_many_are_in_flight_but_the_first_goes_alone(server: tuple[Server, str], monkeypatch: Any) -> None:
    """A server that answers only when several have come would hang a reader that waits for each."""
    monkeypatch.setattr(module, "GAP", -1)
    state, url = server
    wanted = [("a.tar", 1000 * n + 17, 101 + n) for n in range(1 + 2 * TOGETHER)]
    reader = ranges_of(url)
    reader.begin(wanted)
    assert [reader.read(*one) for one in wanted] == [DATA[at : at + size] for _, at, size in wanted]
    assert len(state.seen) == len(wanted)
    assert state.seen[0] == "bytes=17-117"


def test_neighbours_are_one_request(server: tuple[Server, str]) -> None:
    state, url = server
    state.gate = None
    wanted = [("a.tar", at, 333) for at in (500_000, 70_001, 500_400, 70_001)]
    reader = ranges_of(url)
    reader.begin(wanted)
    assert [reader.read(*one) for one in wanted] == [DATA[at : at + size] for _, at, size in wanted]
    assert sorted(state.seen) == ["bytes=500000-500732", "bytes=70001-70333"]
    assert reader.read("a.tar", 5, 9) == DATA[5:14], "what was not asked for before"
    assert (reader._bytes, reader._begun) == (0, {})


def test_a_neighbour_beyond_the_end_is_the_only_one_that_fails(server: tuple[Server, str]) -> None:
    state, url = server
    state.gate = None
    inside, beyond = ("a.tar", len(DATA) - 300, 200), ("a.tar", len(DATA) - 50, 200)
    reader = ranges_of(url)
    reader.begin([inside, beyond])
    assert reader.read(*inside) == DATA[-300:-100]
    with pytest.raises(Refused, match=r"a.tar: it has 1000003 bytes, but 200 from byte 999953 on are asked"):
        reader.read(*beyond)


def test_what_fails_is_asked_for_again(server: tuple[Server, str], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "GAP", -1)
    state, url = server
    state.gate, state.fails = None, 4
    wanted = [("a.tar", 1000 * n, 99) for n in range(4)]
    reader = ranges_of(url)
    reader.begin(wanted)
    assert [reader.read(*one) for one in wanted] == [DATA[at : at + size] for _, at, size in wanted]
    assert state.fails == 0


def test_what_is_joined() -> None:
    """In the order of the first of each group; a gap or a length beyond the bound begins another."""
    a, b, c = ("a", 0, 10), ("a", 10 + GAP, 10), ("a", 21 + 2 * GAP, 5)
    assert joined([c, b, a]) == [(c, [c]), (("a", 0, 20 + GAP), [a, b])]
    assert joined([("a", 0, 5), ("b", 3, 5)]) == [(("a", 0, 5), [("a", 0, 5)]), (("b", 3, 5), [("b", 3, 5)])]
    large = ("a", 10, LONGEST - 5)
    assert joined([a, large]) == [(a, [a]), (large, [large])]
    assert joined([]) == []

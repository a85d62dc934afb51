"""Byte ranges of remote files that are asked for before they are needed, neighbours in one request.

begin([…, …])  ──▶  sorted, neighbours joined  ──▶  `Remote.begin`: many in flight together
read(…)        ──▶  waits for its answer; what failed is asked for again, and waited for as any read
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megapix.shards.storage.answers import passes
from megapix.shards.storage.remote import Range, Remote

GAP = 64 << 10
"""Bytes between two ranges that are read along: what a connection brings in less time than a further request takes."""
LONGEST = 8 << 20
"""Bytes of one request, but for a single range that is longer."""
IN_FLIGHT = 32 << 20
"""Bytes of what is asked for ahead by one process."""
RANGES = 512
"""Ranges that are asked for ahead by one process."""


@dataclass
class _Request:
    """One request, for one range or several."""

    whole: Range
    answer: Future[bytes]


class Ranges:
    """Reads ranges of remote files, of which it is told some before."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._begun: dict[Range, list[_Request]] = {}
        """A range may be asked for more than once."""
        self._bytes = 0

    @property
    def room(self) -> bool:
        """Whether more may be asked for ahead."""
        return self._bytes < IN_FLIGHT and len(self._begun) < RANGES

    def begin(self, ranges: Sequence[Range]) -> None:
        """Ask for ranges without waiting; they are in flight together."""
        groups = joined(ranges)
        for (whole, group), answer in zip(groups, self._remote.begin([whole for whole, _ in groups]), strict=True):
            request = _Request(whole, answer)
            for part in group:
                self._begun.setdefault(part, []).append(request)
                self._bytes += part[2]

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly those bytes; errors as of `Remote.read`, each of this range alone."""
        asked = (name, offset, size)
        if asked not in self._begun:
            return self._remote.read(*asked)
        request = self._begun[asked].pop(0)
        if not self._begun[asked]:
            del self._begun[asked]
        self._bytes -= size
        error = request.answer.exception()
        if request.whole == asked or (error is not None and passes(error)):
            data = self._remote.read(*asked, request.answer)
        elif error is not None or len(request.answer.result()) != request.whole[2]:
            data = self._remote.read(*asked)  # a neighbour may be beyond the file's end: each has an error of its own
        else:
            start = offset - request.whole[1]
            data = request.answer.result()[start : start + size]
        if error is not None:  # and now the server is back
            self._again()
        return data

    def _again(self) -> None:
        """Ask once more for all that has failed meanwhile: many in flight, and not each when it is needed."""
        requests = {id(request): request for some in self._begun.values() for request in some}.values()
        failed = [request for request in requests if request.answer.done() and request.answer.exception()]
        for request, answer in zip(failed, self._remote.begin([one.whole for one in failed]), strict=True):
            request.answer = answer


def joined(ranges: Sequence[Range]) -> list[tuple[Range, list[Range]]]:
    """Neighbours, each group with the one range that covers it; in the order in which the first of each came."""
    place = {part: number for number, part in reversed(list(enumerate(ranges)))}
    groups: list[tuple[Range, list[Range]]] = []
    for part in sorted(ranges):
        name, offset, size = part
        if groups:
            (before, start, length), group = groups[-1]
            end = max(start + length, offset + size)
            if before == name and offset <= start + length + GAP and end - start <= LONGEST:
                groups[-1] = (name, start, end - start), [*group, part]
                continue
        groups.append((part, [part]))
    return sorted(groups, key=lambda found: min(place[part] for part in found[1]))

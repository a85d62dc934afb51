"""Who failed, who died, and who hangs: heartbeats over TCP, beside the collectives that a lost rank would block for
ever.

    rank 1 ──beat──▶           ┌ an error is told                         all end with its code, once saves are written
    rank 2 ──beat──▶  rank 0 ──┤ a connection closes without a goodbye    that process died
    rank 3 ◀──beat──           │ no beat for `seconds`                    it was stopped, or its host or link is gone
                               └ beats, but the rank that is furthest     it hangs, and those ahead of it wait for it
                                 behind says nothing new for `seconds`

Rank 0 finds it, prints it (of a lost rank one block with the last word of every rank), tells the others, and every rank
ends, with EXIT_LOST if one was lost, without waiting for a collective. Beats go both ways, so every other rank finds
the loss of rank 0 by itself. What rank 0 does for each rank in the time of a beat is the same for any number of ranks.

Nothing is written to any folder: a shared one may stay reachable for a host whose link to the others is cut.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from megapix.dist import CollectiveInputError, World, first, gather, on_all_ranks
from megapix.errors import InputError, RankLost, Reported
from megapix.resilience import doors, first_error, hangs
from megapix.resilience.first_error import Failure
from megapix.resilience.hangs import Hangs
from megapix.resilience.heartbeat import Link, Peer, Word, line, period
from megapix.resilience.notes import PATIENCE, Notes
from megapix.resilience.stopping import StopRequested

EXIT_LOST = RankLost.exit_code
"""Exit code of every rank that is left when one died or hangs; the same command resumes from the last checkpoint."""
CLOSING = 10.0
"""Seconds in which a rank closes what its error has passed, without a checkpoint that is being written."""
GRACE = 2.0
"""Seconds that the others have to end by themselves once a rank has failed."""
VERDICT = 4.0
"""Seconds that a failing rank waits for the news that another was lost, or failed, before it; then the failure is its
own. Rank 0 answers it in less."""
LOOK = 0.25
"""Seconds between two looks at what the others say: to be woken by each message would cost a large world more."""


class Watchdog:
    """Around the training on every rank, once the process group stands: `with Watchdog(world, seconds) as watch`.

    An error that leaves it, or `telling`, on one rank alone becomes `Reported`: the log has it, and all ranks know it.

    Args:
        seconds: after which silence is a death and no news a hang; 0 watches nothing.
        longer: phase -> seconds that may pass there beyond `seconds`, where a phase may wait for something slow.

    Raises (on entering):
        CollectiveInputError: a rank cannot reach rank 0 at MASTER_ADDR, or another number of seconds is set there.
    """

    def __init__(self, world: World, seconds: float, longer: Mapping[str, float] | None = None) -> None:
        self._world, self._seconds = world, seconds
        self._host = socket.gethostname()
        self.notes = Notes(seconds, {"error": VERDICT, **(longer or {})})
        self.at_work: Callable[[], bool] = lambda: False
        """Whether this rank is still writing what other ranks write, too, and should end after it."""
        self._peers: dict[int, Peer] = {}
        self._gone: list[int] = []  # whose connections have closed without a goodbye
        self._leaving: dict[str, Any] | None = None
        self._left: tuple[float, Failure] | None = None  # since when a rank is gone in order that all should share
        self._failed: tuple[float, Failure] | None = None
        self._unwinds = False  # this rank's own error is on its way out
        self._known, self._one = threading.Event(), threading.Lock()
        self._every = period(world.size, seconds)
        self._hangs = Hangs(self._every)
        self._entered = False
        self._selector = selectors.DefaultSelector()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, step: int, phase: str, begins: bool = False) -> None:
        """Say where this rank is: `Notes.note`. Takes microseconds."""
        self.notes.note(step, phase, begins)

    def where(self) -> tuple[int, str]:
        """Step and phase of the last note."""
        return self.notes.word.step, self.notes.word.phase

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell an error of this rank alone to all at once, before anything around this is closed, which may take long.

        Raises:
            Reported: in place of that error.
        """
        try:
            yield
        except BaseException as error:
            self._report(error)
            raise

    # -----------------------------------------------------------------------------------------------------------------
    # In and out
    # -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        serves = self._world.main and self._seconds > 0
        server = on_all_ranks(self._world, lambda: doors.listen(self._world.size) if serves else None)
        port = server.getsockname()[1] if server else 0
        everyone = gather(self._world, (self._host, port, secrets.token_hex(16), self._seconds))
        for rank, (*_, seconds) in enumerate(everyone):
            if seconds != everyone[0][-1]:
                raise CollectiveInputError(
                    f"rank {rank} has machine.watchdog = {seconds:g}, but rank 0 has {everyone[0][-1]:g}"
                )
        if not self._seconds:
            return self
        _, port, self._token, _ = everyone[0]
        for rank, (host, *_) in enumerate(everyone):
            if rank != self._world.rank and (self._world.main or rank == 0):
                self._peers[rank] = Peer(host, Word(patience=self._seconds * PATIENCE), time.monotonic())
        if server:
            self._selector.register(server, selectors.EVENT_READ, self._accept)
            self._thread.start()  # it lets the others in, more of them than may wait at its door
        try:
            on_all_ranks(self._world, lambda: None if server else self._connect(port))
        except InputError:
            self._leaving = {"left": 2, "reason": ""}
            raise
        for peer in self._peers.values():
            peer.heard = time.monotonic()
        self._entered = True
        if not server:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error:
                self._report(error)
        finally:
            if self._seconds:
                code = 0 if error is None or isinstance(error, StopRequested) else getattr(error, "exit_code", 1)
                self._leaving = {"left": code, "reason": " ".join(str(error).split())}
                self._woken.set()
                self._thread.join(2 * GRACE)

    def _connect(self, port: int) -> None:
        link, answer = doors.reach(port, {"token": self._token, "rank": self._world.rank}, self._seconds)
        self._adopt(0, link)
        for message in answer:
            self._hear(0, message)

    def _accept(self, server: socket.socket) -> None:
        link = Link(server.accept()[0])
        self._selector.register(link.socket, selectors.EVENT_READ, lambda _: self._welcome(link))

    def _welcome(self, link: Link) -> None:
        """The first line of a connection must come from a rank of this run; whoever else calls is not listened to."""
        try:
            messages = link.read()
            if not messages and not link.closed:
                return
            hello = messages[0] if messages and messages[0]["token"] == self._token else None
            rank, attempt = (int(hello["rank"]), int(hello["attempt"])) if hello else (0, 0)
        except (ValueError, TypeError, KeyError):
            hello = None
        self._selector.unregister(link.socket)
        if hello is None or attempt <= self._peers[rank].attempt:  # or it has called again since
            link.socket.close()
            return
        self._peers[rank].attempt = attempt
        self._adopt(rank, link)
        link.send(line({"welcome": rank}))
        for message in messages[1:]:
            self._hear(rank, message)

    def _adopt(self, rank: int, link: Link) -> None:
        self._peers[rank].link = link
        self._selector.register(link.socket, selectors.EVENT_READ, lambda _: self._read(rank, link))

    # -----------------------------------------------------------------------------------------------------------------
    # An error
    # -----------------------------------------------------------------------------------------------------------------

    def _report(self, error: BaseException) -> None:
        """Tell all ranks an error that this one has alone.

        Raises:
            Reported: in place of it.
        """
        if self._world.size == 1 or isinstance(error, Reported) or first_error.collective(error):
            return
        step, phase = self.where()
        if first_error.perhaps_of_another(error):
            if not self._entered:
                return  # nobody can tell
            self.note(step, "error")
            self._known.wait(VERDICT)  # a lost rank ends this process within this time
        self._unwinds = True
        if not self._failed:
            first_error.show(error)
            self._tell_first(first_error.failure(error, self._world.rank, self._host, step, phase))
        assert self._failed
        raise Reported(self._failed[1].code) from error

    def _tell_first(self, mine: Failure) -> None:
        """Have rank 0 say it, if none has come before; where it does not answer, or nobody watches, say it here."""
        if not self._entered:
            self._failed = time.monotonic(), mine
            if first("an error"):
                _print(f"megapix: error: {mine.reason}")
        elif self._world.main:
            self._fail(mine)
        else:
            self._tell({"error": mine.code, "reason": mine.reason})
            if not self._known.wait(VERDICT):
                self._learn(mine)
                _print(f"megapix: error: {mine.reason}")

    def _fail(self, failure: Failure) -> None:
        """Rank 0: all ranks end with this, unless they already do with another; in whichever thread it comes."""
        if self._learn(failure):
            self._tell({"failed": failure.code, "reason": failure.reason, "host": self._host})
            _print(f"megapix: error: {failure.reason}")

    def _learn(self, failure: Failure) -> bool:
        """End with this, be it that the other threads wait for ever; False if this rank already ends with another."""
        with self._one:
            if self._failed:
                return False
            self._failed = time.monotonic(), failure
        # stderr may be a pipe that nobody reads any more
        last_resort = threading.Timer(self._seconds * PATIENCE + 2 * GRACE, os._exit, (failure.code,))
        last_resort.daemon = True
        last_resort.start()
        self._known.set()
        return True

    def _end_failed(self, now: float) -> None:
        """End this rank, unless it is writing a checkpoint with the others, or closing what its error has passed."""
        assert self._failed
        since, failure = self._failed
        # What an interrupt has passed may hold a lock that closing waits for, so that gets some seconds alone.
        limit = self._seconds * PATIENCE if self.at_work() else CLOSING if self._unwinds else GRACE
        if now - since > limit:
            self._hang_up()
            os._exit(failure.code)

    # -----------------------------------------------------------------------------------------------------------------
    # The thread
    # -----------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        due = now = time.monotonic()
        pause = min(LOOK, self._every)
        while self._leaving is None:
            if self._entered:
                self._woken.wait(pause)
            for key, _ in self._selector.select(0 if self._entered else pause):
                key.data(key.fileobj)
            before, now = now, time.monotonic()
            # A pause of its own (the process was stopped, the machine slept) says nothing of others: clocks restart.
            if now - before >= self._seconds / 2:
                self.notes.resumed = now
            if beats := now >= due:
                due = now + self._every
                self._beat(now)
            if self._entered:
                self._judge(now, beats)
        self._beat(now)
        self._tell(self._leaving)
        self._hang_up()

    def _beat(self, now: float) -> None:
        w = self.notes.spoken(now)
        word = {"step": w.step, "phase": w.phase, "turn": w.turn, "patience": w.patience, "when": w.when}
        self._tell({"word": word, "idle": now - w.at})

    def _read(self, rank: int, link: Link) -> None:
        for message in link.read():
            self._hear(rank, message)
        if link.closed:
            self._selector.unregister(link.socket)
            if link is self._peers[rank].link and not self._peers[rank].left:
                self._gone.append(rank)

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        peer, peer.heard = self._peers[rank], time.monotonic()
        if "word" in message:
            peer.word = Word(**message["word"], at=peer.heard - message["idle"])
        elif "left" in message:
            peer.left = True
            if message["left"] and not self._left:
                reason = f"rank {rank} on {peer.host} ended with an error: {message['reason']}"
                self._left = peer.heard, Failure(message["left"], reason)
            if peer.link:
                peer.link.finish()
        elif "error" in message:
            self._fail(Failure(message["error"], message["reason"]))
        elif "failed" in message:
            if self._learn(Failure(message["failed"], message["reason"])):
                self._say_here(message)
        elif "end" in message:
            self._say_here(message)
            os._exit(message["end"])

    def _say_here(self, message: Mapping[str, Any]) -> None:
        """On a host that is not rank 0's, whose log may be another."""
        if self._world.local_rank == 0 and self._host != message["host"]:
            _print(f"megapix: error: {message['reason']} (rank 0 is on {message['host']})")

    def _judge(self, now: float, beats: bool) -> None:
        """End this rank, and tell the others to, if a rank has failed or is lost; all of them are looked at in the time
        of a beat once."""
        if self._failed:
            self._end_failed(now)
            return
        if self._gone:
            hosts = self._hosts
            self._end([f"rank {r} on {hosts[r]} is lost: its process ended without a goodbye" for r in self._gone])
        if self._left and now - self._left[0] > GRACE:
            self._fail(self._left[1])
        if not beats:
            return
        watched = {rank: peer for rank, peer in self._peers.items() if not peer.left}
        silent = {rank: now - max(peer.heard, self.notes.resumed) for rank, peer in watched.items()}
        longest = max(silent.values(), default=0.0)
        if longest > self._seconds:
            self._end(
                [
                    f"rank {rank} on {watched[rank].host} is lost: no heartbeat for {seconds:.1f} s "
                    "(stopped, or its host or its link is gone)"
                    for rank, seconds in silent.items()
                    if seconds > self._seconds / 2  # the others of a lost host are as good as over the limit
                ]
            )
        elif self._world.main and not self._left and longest < 3 * self._every:
            # Ranks that wait for a silent one say nothing new either; whether it is lost shows in a while.
            words = self._words(now)
            if idle := self._hangs.found(now, words, self.notes.resumed):
                self._end(hangs.reasons(idle, words, self._hosts))

    # -----------------------------------------------------------------------------------------------------------------
    # The end
    # -----------------------------------------------------------------------------------------------------------------

    def _end(self, reasons: list[str]) -> None:
        """Tell everybody that ranks are lost, and end this process, whatever its other threads wait for."""
        self._tell({"end": EXIT_LOST, "reason": reasons[0], "host": self._host})
        last_resort = threading.Timer(GRACE, os._exit, (EXIT_LOST,))  # as in `_learn`
        last_resort.daemon = True
        last_resort.start()
        now = time.monotonic()
        block = [f"error: {reason}" for reason in reasons] + ["the last heartbeat of each rank:"]
        block += [f"  {each}" for each in hangs.listed(now, self._words(now, all_=True), self._hosts)]
        block.append(f"every rank ends with code {EXIT_LOST}; the same command resumes from the last checkpoint")
        _print("\n".join(f"megapix: {each}" for each in block))
        self._hang_up()
        os._exit(EXIT_LOST)

    def _tell(self, message: Mapping[str, Any]) -> None:
        data = line(message)
        for peer in self._peers.values():
            if peer.link and not peer.left:
                peer.link.send(data)

    def _hang_up(self) -> None:
        """Wait until the others close their ends: to close first, with beats unread, could take back what was said."""
        links = [peer.link for peer in self._peers.values() if peer.link and not peer.link.closed and not peer.left]
        until = time.monotonic() + GRACE / 2
        for link in links:
            link.finish()
        for link in links:
            link.socket.settimeout(max(0.01, until - time.monotonic()))
            with suppress(OSError):
                while link.socket.recv(1 << 16):
                    pass

    def _words(self, now: float, all_: bool = False) -> dict[int, Word]:
        """The last word of each rank that this one hears, and of itself; with `all_` of those that have left, too."""
        words = {rank: peer.word for rank, peer in self._peers.items() if all_ or not peer.left}
        return {self._world.rank: self.notes.spoken(now), **words}

    @property
    def _hosts(self) -> dict[int, str]:
        return {self._world.rank: self._host, **{rank: peer.host for rank, peer in self._peers.items()}}


def _print(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # a line of its own, below a progress bar

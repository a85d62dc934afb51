"""Who died, and who hangs: heartbeats over TCP, beside the collectives that a lost rank would block for ever.

    rank 1 ──beat──▶           ┌ a connection closes without a goodbye    that process died
    rank 2 ──beat──▶  rank 0 ──┤ no beat for `seconds`                    it was stopped, or its host or link is gone
    rank 3 ◀──beat──           └ beats, but the rank that is furthest     it hangs, and those ahead of it wait for it
                                 behind says nothing new for `seconds`

Rank 0 finds it, prints one block with the last word of every rank, tells the others, and every rank ends with EXIT_LOST
without waiting for a collective. Beats go both ways, so every other rank finds the loss of rank 0 by itself.

Nothing is written to any folder: a shared one may stay reachable for a host whose link to the others is cut.
"""

from __future__ import annotations

import os
import secrets
import select
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from megapix.dist import World, gather, on_all_ranks
from megapix.errors import InputError, OutOfMemory, RunError
from megapix.resilience.heartbeat import BEAT, Link, Peer, Word
from megapix.resilience.stopping import StopRequested

EXIT_LOST = 69
"""Exit code of every rank that is left when one died or hangs; the same command resumes from the last checkpoint."""
LONG = ("start", "save", "load", "score", "profile")
"""Phases that are long and say nothing new meanwhile: building, loading and compiling; writing a checkpoint; rolling
back to one; scoring images on rank 0; writing a trace."""
PATIENCE = 10.0
"""`seconds` times this may pass without news in the phases of LONG, in the first step, which compiles, and in every
other phase the first time that it is seen after that, which shows how long it takes."""
USUAL = 3.0
"""What a phase took then, times this, may pass later on, where that is more than `seconds`."""
GRACE = 2.0
"""Seconds that the others have to end by themselves once a rank has ended with an error that it reported."""
CALL_AGAIN = 0.1
"""Seconds between two calls to rank 0."""
VERDICT = 4.0
"""Seconds that a failing rank waits for the news that another was lost before it; then the failure is its own."""


class Watchdog:
    """Around the training on every rank, once the process group stands: `with Watchdog(world, seconds) as watch`.

    Args:
        seconds: after which silence is a death and no news a hang; 0 watches nothing.
        longer: phase -> seconds that may pass there beyond `seconds`, where a phase may wait for something slow.

    Raises (on entering):
        CollectiveInputError: a rank cannot reach rank 0 at MASTER_ADDR.
    """

    def __init__(self, world: World, seconds: float, longer: Mapping[str, float] | None = None) -> None:
        self._world, self._seconds, self._longer = world, seconds, {"error": VERDICT, **(longer or {})}
        self._host = socket.gethostname()
        self._word = Word(patience=seconds * PATIENCE)
        self._first: int | None = None
        self._begun = False
        self._took: dict[str, float] = {}  # phase -> seconds, the first time after the first step
        self._peers: dict[int, Peer] = {}
        self._leaving: dict[str, Any] | None = None
        self._failed: tuple[float, int, str, str] | None = None
        self._every = min(BEAT, seconds / 4)
        self._stuck: set[tuple[int, int, int]] = set()
        self._stuck_since = 0.0
        self._resumed = 0.0
        self._entered = False
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, step: int, phase: str, begins: bool = False) -> None:
        """Say where this rank is: the step it is at, and what it does next. Takes microseconds.

        Args:
            begins: the phase begins with something else than what is noted in it later on, and what that takes is not
                what the phase usually takes.
        """
        last, now = self._word, time.monotonic()
        if self._first is None:
            self._first = step
        elif last.step != self._first and not self._begun:
            self._took.setdefault(last.phase, self._idle(last, now))
        turn = 0 if step != last.step else last.turn + (phase != last.phase)
        long = phase in LONG or step == self._first or phase not in self._took
        patience = max(self._seconds * (PATIENCE if long else 1.0), USUAL * self._took.get(phase, 0.0))
        patience += self._longer.get(phase, 0.0)
        self._begun = begins
        self._word = Word(step, phase, turn, patience, at=now)  # one assignment: the thread never sees half a word

    def where(self) -> tuple[int, str]:
        """Step and phase of the last note."""
        return self._word.step, self._word.phase

    # -----------------------------------------------------------------------------------------------------------------
    # In and out
    # -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        if not self._seconds:
            return self
        server = _listen(self._world.size) if self._world.main else None
        mine = (self._host, server.getsockname()[1] if server else 0, secrets.token_hex(16))
        everyone = gather(self._world, mine)
        _, port, self._token = everyone[0]
        for rank, (host, *_) in enumerate(everyone):
            if rank != self._world.rank and (self._world.main or rank == 0):
                self._peers[rank] = Peer(host, Word(patience=self._seconds * PATIENCE), time.monotonic())
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)
        if server:
            self._selector.register(server, selectors.EVENT_READ, self._accept)
        if server:
            self._thread.start()  # it lets the others in, more of them than may wait at its door
        try:
            on_all_ranks(self._world, lambda: None if server else self._connect(port))
        except InputError:
            self._leaving = {"left": 2, "reason": "", "told": False}
            raise
        for peer in self._peers.values():
            peer.heard = time.monotonic()
        self._entered = True
        if not server:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._seconds:
            return
        if error and not isinstance(error, (InputError, RunError, StopRequested, KeyboardInterrupt, SystemExit)):
            # Most likely a collective that broke because another rank is lost: then the thread ends this process now.
            self.note(self._word.step, "error")
            self._thread.join(VERDICT)
        code = 0 if error is None or isinstance(error, StopRequested) else 2 if isinstance(error, InputError) else 1
        reason = f"{kind.__name__}: {' '.join(str(error).split())}" if kind else ""
        told = isinstance(error, OutOfMemory)  # by this rank, which it names
        self._leaving = {"left": code, "reason": str(error) if told else reason, "told": told}
        self._wake.send(b"!")
        self._thread.join(2 * GRACE)

    def _connect(self, port: int) -> None:
        """Call rank 0 until it answers: a kernel whose queue of callers is full breaks what seems to be connected."""
        address, attempt, until = os.environ["MASTER_ADDR"], 0, time.monotonic() + self._seconds
        while True:
            attempt += 1
            try:
                return self._call(address, port, attempt)
            except OSError as error:
                if time.monotonic() > until:
                    raise InputError(
                        f"machine.watchdog = {self._seconds:g}: rank 0 cannot be reached at {address}:{port} "
                        f"({error}); expected TCP between the nodes, or 0 (off)"
                    ) from error
                time.sleep(CALL_AGAIN)

    def _call(self, address: str, port: int, attempt: int) -> None:
        connection = socket.create_connection((address, port), timeout=self._seconds)
        link = Link(connection)
        link.send({"token": self._token, "rank": self._world.rank, "attempt": attempt})
        select.select([connection], [], [], self._seconds / 4)
        answer = link.read()
        if not answer:
            connection.close()
            raise ConnectionError("no answer")
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
        link.send({"welcome": rank})
        for message in messages[1:]:
            self._hear(rank, message)

    def _adopt(self, rank: int, link: Link) -> None:
        self._peers[rank].link = link
        self._selector.register(link.socket, selectors.EVENT_READ, lambda _: self._read(rank, link))

    # -----------------------------------------------------------------------------------------------------------------
    # The thread
    # -----------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        due = round_ = time.monotonic()
        while self._leaving is None:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                if key.data:
                    key.data(key.fileobj)
            before, round_ = round_, time.monotonic()
            if round_ >= due:
                due = round_ + self._every
                self._beat()
            # A pause of its own (the process was stopped, the machine slept) says nothing of others: clocks restart.
            if round_ - before >= self._seconds / 2:
                self._resumed = round_
            if self._entered:
                self._judge(round_)
        self._beat()
        self._tell(self._leaving)
        self._hang_up()

    def _beat(self) -> None:
        w = self._word
        word = {"step": w.step, "phase": w.phase, "turn": w.turn, "patience": w.patience, "when": w.when}
        self._tell({"word": word, "idle": self._idle(w, time.monotonic())})

    def _idle(self, word: Word, now: float) -> float:
        """Seconds without news since a word, not counting those in which this process was stopped."""
        return now - max(word.at, self._resumed)

    def _read(self, rank: int, link: Link) -> None:
        for message in link.read():
            self._hear(rank, message)
        if link.closed:
            self._selector.unregister(link.socket)

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        peer, peer.heard = self._peers[rank], time.monotonic()
        if "word" in message:
            peer.word = Word(**message["word"], at=peer.heard - message["idle"])
        elif "left" in message:
            peer.left = True
            if message["left"] and not self._failed:
                about = f"rank {rank} on {peer.host} ended with an error: {message['reason']}"
                told_on = peer.host if message["told"] else ""
                self._failed = (peer.heard + GRACE, message["left"], message["reason"] if told_on else about, told_on)
            if peer.link:
                peer.link.finish()
        elif "end" in message:
            said = peer.host, message["told"]  # rank 0 has said it there
            if self._world.local_rank == 0 and self._host not in said:
                os.write(2, f"\nmegapix: error: {message['reason']} (rank 0 on {peer.host} says more)\n".encode())
            os._exit(message["end"])

    def _judge(self, now: float) -> None:
        """End this rank, and tell the others to, if a rank is lost."""
        watched = {rank: peer for rank, peer in self._peers.items() if not peer.left}
        dead = [
            f"rank {rank} on {peer.host} is lost: its process ended without a goodbye"
            for rank, peer in watched.items()
            if peer.link and peer.link.closed
        ]
        if dead:
            self._end(EXIT_LOST, dead)
        silent = {rank: now - max(peer.heard, self._resumed) for rank, peer in watched.items()}
        if max(silent.values(), default=0.0) > self._seconds:
            self._end(
                EXIT_LOST,
                [
                    f"rank {rank} on {watched[rank].host} is lost: no heartbeat for {seconds:.1f} s "
                    "(stopped, or its host or its link is gone)"
                    for rank, seconds in silent.items()
                    if seconds > self._seconds / 2  # the others of a lost host are as good as over the limit
                ],
            )
        if self._failed:
            at, code, reason, told_on = self._failed
            if now > at:
                self._end(code, [reason], told_on)
        elif self._world.main and max(silent.values(), default=0.0) < 3 * BEAT:
            # Ranks that wait for a silent one say nothing new either; whether it is lost shows in a while.
            self._judge_progress(now, {self._world.rank: self._word} | {r: peer.word for r, peer in watched.items()})

    def _judge_progress(self, now: float, words: dict[int, Word]) -> None:
        """A rank with others ahead of it waits for nobody: its own last word decides. Equal ones may wait together.

        A word from elsewhere is as old as its heartbeat, and the others may have moved on in that time: a rank hangs if
        it is found behind with the same word for two heartbeats more.
        """
        behind = min((w.step, w.turn) for w in words.values())
        last = {rank: w for rank, w in words.items() if (w.step, w.turn) == behind}
        stale = all(self._idle(w, now) > w.patience for w in last.values())
        stuck = {(rank, w.step, w.turn) for rank, w in last.items()} if stale else set()
        if stuck != self._stuck:
            self._stuck, self._stuck_since = stuck, now
        if not stuck or now - self._stuck_since < 2 * self._every:
            return
        if len(last) < len(words) or len(words) == 1:
            reasons = [
                f"rank {rank} on {self._host_of(rank)} hangs: nothing new for {self._idle(w, now):.1f} s"
                for rank, w in last.items()
            ]
        else:
            longest = max(self._idle(w, now) for w in last.values())
            reasons = [f"all ranks hang, in a collective or at a disk: nothing new for {longest:.1f} s"]
        self._end(EXIT_LOST, reasons)

    # -----------------------------------------------------------------------------------------------------------------
    # The end
    # -----------------------------------------------------------------------------------------------------------------

    def _end(self, code: int, reasons: list[str], told_on: str = "") -> None:
        """Tell the ranks and the user, and end this process, whatever its other threads wait for.

        Args:
            told_on: the host whose log has the only reason already, and needs no more.
        """
        self._tell({"end": code, "reason": reasons[0], "told": told_on})
        last_resort = threading.Timer(GRACE, os._exit, (code,))  # stderr may be a pipe that nobody reads any more
        last_resort.daemon = True
        last_resort.start()
        now = time.monotonic()
        words = {self._world.rank: self._word} | {rank: peer.word for rank, peer in self._peers.items()}
        lines = [f"megapix: error: {reason}" for reason in reasons]
        lines.append("megapix: the last heartbeat of each rank:")
        for rank, w in sorted(words.items()):
            clock = time.strftime("%H:%M:%S", time.localtime(w.when))
            lines.append(
                f"megapix:   rank {rank} on {self._host_of(rank)}: step {w.step}, {w.phase}, {clock}, "
                f"{now - w.at:.1f} s ago"
            )
        resumes = "; the same command resumes from the last checkpoint" if code == EXIT_LOST else ""
        lines.append(f"megapix: every rank ends with code {code}{resumes}")
        if told_on != self._host:
            os.write(2, ("\n" + "\n".join(lines[:1] if told_on else lines) + "\n").encode())
        self._hang_up()
        os._exit(code)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for peer in self._peers.values():
            if peer.link and not peer.left:
                peer.link.send(message)

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

    def _host_of(self, rank: int) -> str:
        return self._peers[rank].host if rank in self._peers else self._host


def _listen(ranks: int) -> socket.socket:
    """A listening socket on a free port of every interface, with room for all ranks to call at once."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=ranks)

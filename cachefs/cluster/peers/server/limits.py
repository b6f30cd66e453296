"""What peers may ask of a node at most, and who goes first.

Whoever comes when all is taken hears it at once, with a time after which to come again, and asks the origin meanwhile.
Prefetch is refused first: it has places of its own, and none once foreground requests take half of theirs. So it never
takes the place of a request that somebody waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """connections: open at once; strangers: of these, that have not shown yet who they are.

    requests: answered at once that somebody waits for; prefetch: that nobody waits for; per_peer: of one node
    (Session.who), of each kind. senders: threads that read and send. fetches: objects asked of the fetcher at once, of
    one request; guests: that it is to keep for others. Seconds: handshake, to show who one is; transfer, to send a
    request once begun; idle, between requests; stall, in which a peer takes nothing of its answer. retry: milliseconds,
    told to who comes when all is taken.
    """

    connections: int = 1024
    strangers: int = 64
    requests: int = 256
    prefetch: int = 64
    per_peer: int = 16
    senders: int = 8
    fetches: int = 64
    guests: int = 8
    handshake: float = 10.0
    transfer: float = 10.0
    idle: float = 600.0
    stall: float = 15.0
    retry: int = 100


class Admission:
    """Who is being answered. Used on one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of_peer: Counter[tuple[str, bool]] = Counter()
        self.foreground = 0
        self.prefetch = 0
        self.refused = 0

    @contextmanager
    def enter(self, peer: str, prefetch: bool) -> Iterator[bool]:
        """False: refused, there is no room for it."""
        if not self._room(peer, prefetch):
            self.refused += 1
            yield False
            return
        self._count(peer, prefetch, 1)
        try:
            yield True
        finally:
            self._count(peer, prefetch, -1)

    def _room(self, peer: str, prefetch: bool) -> bool:
        limits = self._limits
        if self._of_peer[peer, prefetch] >= limits.per_peer:
            return False
        if prefetch:
            return self.prefetch < limits.prefetch and self.foreground < limits.requests // 2
        return self.foreground < limits.requests

    def _count(self, peer: str, prefetch: bool, step: int) -> None:
        self._of_peer[peer, prefetch] += step
        if not self._of_peer[peer, prefetch]:
            del self._of_peer[peer, prefetch]
        if prefetch:
            self.prefetch += step
        else:
            self.foreground += step

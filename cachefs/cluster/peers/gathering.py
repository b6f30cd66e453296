"""What is asked of one peer and has not been sent: two lanes, one for what somebody waits for and one for the rest.

What is asked for ahead of time never shares a request or a connection with what somebody waits for. When somebody comes
to wait for it, it changes lanes, and the one that it leaves passes it over.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.peers.wire import Item
from cachefs.errors import PeerError

# At 110 KB an object, 28 MB: 20 ms at 10 Gbit/s, so that nobody waits long behind others; and from 64 on the cost of
# a request does not show.
MOST_TOGETHER = 256
MOST_TOGETHER_BYTES = 32 * 1024 * 1024
_USUAL_SIZE = 128 * 1024

# Of what nobody waits for: as many as a server has fetched at once of one request (server/limits), so that each of them
# is under way where it can be urged on.
MOST_PREFETCH_TOGETHER = 64

# A path's characters: up to four bytes each; a request has at most 2 MiB.
_MOST_PATHS = 400_000

CONNECTIONS = 4
PREFETCH_CONNECTIONS = 2


@dataclass(eq=False, slots=True)
class Ask:
    """One item that is wanted. until: on the loop's clock. prefetch: nobody waits for it yet. taken: is in a request.

    sent: when. left: called when it is wanted no more, while its request is under way.
    urging: what sees to it that it comes, if it was lifted after it was taken.
    """

    item: Item
    fetch: bool
    until: float
    answer: asyncio.Future[Piece]
    prefetch: bool = False
    taken: bool = False
    sent: float = 0.0
    left: Callable[[], None] | None = None
    urging: asyncio.TimerHandle | asyncio.Task[None] | None = None

    def leave(self) -> None:
        if self.left is not None:
            self.left()

    def fail(self, error: PeerError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Lane:
    """Foreground or prefetch. most: connections at once."""

    def __init__(self, *, prefetch: bool) -> None:
        self.prefetch = prefetch
        self.most = PREFETCH_CONNECTIONS if prefetch else CONNECTIONS
        self.queue: deque[Ask] = deque()
        self.workers = 0
        self.timer: asyncio.TimerHandle | None = None

    def take(self) -> list[Ask]:
        """The next ones that may travel together; [] when nobody waits."""
        asks: list[Ask] = []
        size = paths = 0
        most = MOST_PREFETCH_TOGETHER if self.prefetch else MOST_TOGETHER
        while self.queue and len(asks) < most:
            ask = self.queue[0]
            if ask.answer.done() or ask.prefetch is not self.prefetch:
                self.queue.popleft()
                continue
            item = ask.item
            wanted = item.length if item.length >= 0 else item.size if item.size >= 0 else _USUAL_SIZE
            size += wanted
            paths += len(item.path)
            if asks and (size > MOST_TOGETHER_BYTES or paths > _MOST_PATHS or ask.fetch != asks[0].fetch):
                break
            ask.taken = True
            asks.append(self.queue.popleft())
        return asks

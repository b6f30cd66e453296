"""A bounded number of requests at the origin, the ones somebody waits for first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Somebody waits for these bytes; somebody will soon (read-ahead); somebody asked for them ahead of time (warm).
FOREGROUND, AHEAD, BACKGROUND = 0, 1, 2

# Enough to fill 1 Gbit/s with 110 KB objects at 50 ms (57 in flight); object stores take hundreds per client.
DEFAULT_LANES = 64


class Lanes:
    """`limit` may travel at once; waiters go by priority, then by arrival."""

    def __init__(self, limit: int = DEFAULT_LANES) -> None:
        self._free = limit
        self._order = itertools.count()
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def lane(self, priority: int = FOREGROUND) -> AsyncIterator[None]:
        if self._free > 0 and not self._queue:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queue, (priority, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                # Cancelled after the lane was handed to us but before we ran: hand it on, or it is lost for good.
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        while self._queue:
            turn = heapq.heappop(self._queue)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

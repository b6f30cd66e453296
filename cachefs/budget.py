"""So much of something for all together: bytes in memory, requests under way. Whoever finds too little left waits.

Turns go by priority, then by arrival, and whoever is first in line is not overtaken by those who want less: else a
large share would wait for as long as small ones come.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Budget:
    """`limit`: of all shares together; a larger share is given when nothing else is out. Used on one event loop.

    used: what is out now. most: the most that ever was.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.most = 0
        self._order = itertools.count()
        self._queue: list[tuple[int, int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def hold(self, size: int, priority: int = 0) -> AsyncIterator[None]:
        """Have `size` of it for as long as the block runs; the smallest priority goes first."""
        if not self._queue and self._fits(size):
            self._take(size)
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queue, (priority, next(self._order), size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                # Cancelled after our share was handed to us but before we ran: hand it on, or it is lost for good.
                if turn.done() and not turn.cancelled():
                    self._give_back(size)
                else:
                    turn.cancel()
                    self._next()  # those behind may want less than we did
                raise
        try:
            yield
        finally:
            self._give_back(size)

    def _fits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self.limit

    def _take(self, size: int) -> None:
        self.used += size
        self.most = max(self.most, self.used)

    def _give_back(self, size: int) -> None:
        self.used -= size
        self._next()

    def _next(self) -> None:
        while self._queue:
            _, _, size, turn = self._queue[0]
            if not turn.done():
                if not self._fits(size):
                    return
                self._take(size)
                turn.set_result(None)
            heapq.heappop(self._queue)

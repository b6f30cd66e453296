"""So much of something for all together: bytes in memory, requests under way. Whoever finds too little left waits.

Turns go by priority, then by arrival, and whoever is first in line is not overtaken by those who want less: else a
large share would wait for as long as small ones come.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager


class Urgency:
    """How soon something is needed: the smallest level goes first, and at 0 somebody waits for it.

    It is lifted when somebody more urgent comes to want the same: wherever it is in line by then, it moves up.
    """

    __slots__ = ("_told", "level")

    def __init__(self, level: int = 0) -> None:
        self.level = level
        self._told: list[Callable[[], None]] = []

    def lift(self, level: int) -> None:
        if level < self.level:
            self.level = level
            for tell in list(self._told):
                tell()

    @contextmanager
    def telling(self, tell: Callable[[], None]) -> Iterator[None]:
        """Have `tell` called each time that it is lifted, for as long as the block runs."""
        self._told.append(tell)
        try:
            yield
        finally:
            self._told.remove(tell)

    async def waited_for(self) -> None:
        """Until somebody waits for it."""
        if self.level == 0:
            return
        turn = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if self.level == 0 and not turn.done():
                turn.set_result(None)

        with self.telling(tell):
            await turn


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
    async def hold(self, size: int, urgency: Urgency | int = 0) -> AsyncIterator[None]:
        """Have `size` of it for as long as the block runs; the smallest level goes first."""
        if not self._queue and self._fits(size):
            self._take(size)
        else:
            await self._turn(size, urgency if isinstance(urgency, Urgency) else Urgency(urgency))
        try:
            yield
        finally:
            self._give_back(size)

    async def _turn(self, size: int, urgency: Urgency) -> None:
        turn = asyncio.get_running_loop().create_future()
        order = next(self._order)

        def line_up() -> None:
            """Also when it is lifted: its place before that is passed over once its turn has come."""
            heapq.heappush(self._queue, (urgency.level, order, size, turn))

        def lifted() -> None:
            if not turn.done():
                line_up()
                self._next()  # it may fit where those before it did not

        line_up()
        try:
            with urgency.telling(lifted):
                await turn
        except asyncio.CancelledError:
            # Cancelled after our share was handed to us but before we ran: hand it on, or it is lost for good.
            if turn.done() and not turn.cancelled():
                self._give_back(size)
            else:
                turn.cancel()
                self._next()  # those behind may want less than we did
            raise

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

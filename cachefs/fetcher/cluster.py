"""Whether this fetcher is a node of a cluster: as long as somebody's connection says so (`cachefs cluster serve`).

Joining puts `FromCluster` in the place of the plain origin, and leaving puts that back; readers notice neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from cachefs.errors import FetcherError
from cachefs.fetcher.room import Room
from cachefs.messages import Join

if TYPE_CHECKING:
    from cachefs.fetcher.node import Part

log = logging.getLogger("cachefs.fetcher")


class Cluster:
    """Belongs to the fetcher's loop; `close` it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._part: Part | None = None
        self._holder: object = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def join(self, holder: object, request: Join) -> None:
        """Be a node until `holder` lets go; who held it before does not any more. Raises ConfigError."""
        from cachefs.fetcher.node import open_part

        part = open_part(self._room, request)
        await part.begin()
        # All at once: while the one before ends, whoever holds this one may let go of it.
        before, self._part, self._holder = self._part, part, holder
        self._room.source, self._room.editions = part.source, part.editions
        if before is not None:
            await before.end()
        log.info("a node of the cluster %s: %s, port %d", request.members, request.name, request.port)

    def let_go(self, holder: object) -> None:
        """Leave, if it was `holder` who had us join."""
        if self._part is not None and self._holder is holder:
            part, self._part, self._holder = self._part, None, None
            self._room.source, self._room.editions = self._room.origin, None
            task = asyncio.get_running_loop().create_task(part.end())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            log.info("no node of a cluster any more")

    def status(self) -> dict[str, Any] | None:
        """For `cachefs cluster status`; None: it is none."""
        return None if self._part is None else self._part.status()

    def account(self) -> dict[str, Any]:
        """What this node says of itself to the others. Raises FetcherError when it is none."""
        if self._part is None:
            raise FetcherError("its fetcher is in no cluster: it has just been started, or left")
        return self._part.account()

    async def survey(self) -> AsyncGenerator[dict[str, Any], None]:
        """What every node says of itself, as it comes; the last is of this one."""
        if self._part is None:
            yield {"me": None}
            return
        async for row in self._part.survey():
            yield row

    async def close(self) -> None:
        self.let_go(self._holder)
        await asyncio.gather(*self._leaving)

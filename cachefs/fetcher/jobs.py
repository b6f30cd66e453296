"""Long work, asked for by a command, inside its request: Ctrl-C there cancels it here, and what it did stays done."""

from __future__ import annotations

from collections.abc import Callable

from cachefs.errors import FetcherError
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.chores import Chores, Discard, Fetch
from cachefs.fetcher.naming import Naming
from cachefs.fetcher.room import Room
from cachefs.fetcher.settling import Settling
from cachefs.fetcher.tally import Send
from cachefs.messages import (
    Adopt,
    Evict,
    Follow,
    List,
    MakeCatalog,
    Pin,
    Quota,
    Refresh,
    Request,
    TakeCatalog,
    Verify,
    Warm,
)


class Jobs:
    def __init__(self, room: Room, fetch: Fetch, discard: Discard, discard_part: Callable[[str], int]) -> None:
        self._naming = Naming(room)
        self._settling = Settling(room, discard_part)
        self._chores = Chores(room, fetch, discard)

    async def run(self, request: Request, attachment: Attachment | None, send: Send) -> None:
        """Do what `request` asks and send its replies. Raises CacheFSError."""
        match request:
            case Verify():
                return await self._chores.verify(request, send)
            case Pin():
                return await self._settling.pin(request, send)
            case Quota():
                return await self._settling.quota(request, send)
            case Adopt():
                return await self._naming.adopt(request, send)
            case Follow():
                return await self._naming.follow(request, send)
        assert attachment is not None
        match request:
            case List():
                await self._naming.list(request, attachment, send)
            case MakeCatalog():
                await self._naming.make_catalog(request, attachment, send)
            case TakeCatalog():
                await self._naming.take_catalog(request, attachment, send)
            case Refresh():
                await self._naming.refresh(request, attachment, send)
            case Warm():
                await self._chores.warm(request, attachment, send)
            case Evict():
                await self._chores.evict(request, attachment, send)
            case _:
                raise FetcherError(f"no such work: {type(request).__name__}")
        return None

    async def close(self) -> None:
        await self._naming.close()

    async def fit(self) -> None:
        """Drop what exceeds a quota."""
        await self._settling.fit()

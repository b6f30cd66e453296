"""Where the bytes of an object come from that is not stored here: from its origin, within the lanes to it, counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from cachefs.budget import Urgency
from cachefs.digest import BLOCK_SIZE
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.lanes import Lanes
from cachefs.messages import Entry, Need

Data = bytes | memoryview


class Source(Protocol):
    """Raises StaleObject for another version than the one that is asked for, where it can tell, and OriginError."""

    async def whole(
        self, attachment: Attachment, request: Need, version: str, urgency: Urgency
    ) -> tuple[Entry, Data | None]:
        """What `request` names, of that version ("" = any); no bytes when it is larger than one block."""
        ...

    async def block(
        self, attachment: Attachment, entry: Entry, start: int, stop: int, urgency: Urgency, *, lodge: bool = False
    ) -> Data:
        """Bytes [start, stop) of an object, at most a block. lodge: it counts on this node, which has no room for it;
        another one may keep it."""
        ...

    def counts_on_us(self, identity: str, path: str, version: str, block: int | None = None) -> bool:
        """Whether this version of an object would have to be read from the origin again if it were not kept here.

        block: None = any of what is here of it; else whether that block is to be kept when it comes."""
        ...

    @property
    def owners(self) -> object:
        """Another one whenever what counts on this node may be other objects."""
        ...

    def offer(self, attachment: Attachment, entry: Entry) -> None:
        """It counts on this node, which has no room for it: another one may keep it. It is in transit now."""
        ...


@runtime_checkable
class Host(Source, Protocol):
    """A source that keeps something for other nodes, too: objects that their owner has no room for."""

    def take_in(self, attachment: Attachment, path: str, version: str) -> bool:
        """It counts on this node from now on. False: not on this one."""
        ...

    def turn_away(self, attachment: Attachment, path: str, version: str) -> None:
        """It does not any more."""
        ...

    async def from_owner(self, attachment: Attachment, path: str, version: str, size: int) -> Data:
        """Raises PeerError."""
        ...


# How much the latest request counts in what requests usually take.
_LATEST = 0.1


class Usual:
    """What requests usually take. seconds: 0.0 until one was made."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def took(self, seconds: float) -> None:
        self.seconds += _LATEST * (seconds - self.seconds) if self.seconds else seconds

    @contextmanager
    def timed(self, urgency: Urgency) -> Iterator[None]:
        """One request is the block. One that fails does not count."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            yield
        except asyncio.CancelledError:
            # It would have taken longer still. Who hears only of those that win against an owner never hears of an
            # origin that has become slow.
            if self.seconds and not urgency.level:
                self.took(max(self.seconds, clock() - began))
            raise
        self.took(clock() - began)


class FromOrigin:
    """usual, usual_block: what a request takes, of an object or of a block, with its wait for a lane."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._lanes = Lanes()
        self.usual = Usual()
        self.usual_block = Usual()

    async def whole(
        self, attachment: Attachment, request: Need, version: str, urgency: Urgency
    ) -> tuple[Entry, Data | None]:
        with self.usual.timed(urgency):
            async with self._lanes.lane(urgency):
                with self._counted():
                    entry, data = await attachment.origin.get(request.path, version=version, limit=BLOCK_SIZE)
        self._came(attachment, len(data or b""))
        return entry, data

    async def block(
        self, attachment: Attachment, entry: Entry, start: int, stop: int, urgency: Urgency, *, lodge: bool = False
    ) -> Data:
        with self.usual_block.timed(urgency):
            async with self._lanes.lane(urgency):
                with self._counted():
                    data = await attachment.origin.get_range(entry.path, start, stop, version=entry.version)
        self._came(attachment, len(data))
        return data

    def counts_on_us(self, identity: str, path: str, version: str, block: int | None = None) -> bool:
        return True

    @property
    def owners(self) -> object:
        return None

    def offer(self, attachment: Attachment, entry: Entry) -> None:
        """There is nobody to offer it to."""

    def _came(self, attachment: Attachment, count: int) -> None:
        self._counters.origin_reads += 1
        self._counters.origin_bytes += count
        self._counters.read_for_peers += attachment.direct

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._counters.origin_requests += 1
        try:
            yield
        except Exception:
            self._counters.origin_errors += 1
            raise

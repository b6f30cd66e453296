"""One block of a large object at a time: fetched once for all who ask, and stored where there is room for it.

Blocks land in a sparse file (a `Part` of the store) in any order. Room is set aside before a block is fetched, because
who fetches it depends on that: in a cluster, what its owner has no room for is fetched by a node that has, and kept
there (lodging.py); it comes from there to the owner, and on to whoever asked. What nobody keeps passes through memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from cachefs.budget import Urgency
from cachefs.digest import block_range
from cachefs.errors import CacheError, CacheFull
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Known
from cachefs.fetcher.objects import Objects
from cachefs.fetcher.sources import Data
from cachefs.fetcher.transit import Transit, memory_file
from cachefs.messages import Entry
from cachefs.store import Part

log = logging.getLogger("cachefs.fetcher")

# Read-ahead of a sequential reader, in blocks: 32 MiB hides 50 ms of latency at 5 Gbit/s. Twice as much, up to the
# most, each time that a block which is read ahead comes too late: the origin gives each connection less than that.
AHEAD_BLOCKS, MOST_AHEAD_BLOCKS = 4, 16

# As many sequential readers of one object are told apart: the ranks of a large node.
RECENT_BLOCKS = 16

# Incomplete objects whose map stays in memory: a map of 1 GiB has 128 entries.
OPEN_PARTS = 256


class Moved(Exception):
    """The object became whole, or was dropped, while it was asked for: to be looked for anew."""


@dataclass
class Incomplete:
    """An object while its blocks come in.

    recent: the last blocks of what was asked for, and of what was given, to see readers that go on from there. ahead:
    the blocks that are being read ahead. window: how many there may be. copy: some of it was stored as a copy.
    """

    part: Part | None
    entry: Entry
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_BLOCKS))
    ahead: dict[int, asyncio.Task[object]] = field(default_factory=dict)
    window: int = AHEAD_BLOCKS
    copy: bool = False


class Blocks:
    """Of all incomplete objects. One per fetcher; open: those whose map is in memory, by their name in the store."""

    def __init__(self, objects: Objects) -> None:
        self._clearing = objects.clearing
        self._clearing.discard_part = self.discard_part
        self._room = objects.room
        self.open: OrderedDict[str, Incomplete] = OrderedDict()
        self._flights: Flights[Transit | None] = Flights()
        self._taking_in: Flights[None] = Flights()

    def subject(self, attachment: Attachment, name: str, entry: Entry) -> Incomplete:
        """What is here of it, begun if there is nothing yet."""
        subject = self.open.get(name)
        if subject is not None and subject.part is not None and subject.part.lost:
            log.warning("%s: was removed while its object came in; it is fetched again", subject.part.path)
            subject.part.close()
            subject = None
        if subject is None:
            try:
                part = self._room.store.part(name, entry.size, attachment.dataset)
            except CacheError as error:
                log.warning("%s: cannot be stored by block (%s); it streams through", entry.path, error)
                part = None
            if part is not None:
                self._note(attachment, entry)
            subject = self.open[name] = Incomplete(part, entry)
            while len(self.open) > OPEN_PARTS:
                self.open.popitem(last=False)
        with contextlib.suppress(KeyError):  # dropped by another thread just now: its part says so
            self.open.move_to_end(name)
        return subject

    def _note(self, attachment: Attachment, entry: Entry) -> None:
        """Let the index know that some of an object is stored (key b"" = not all), so that it can be evicted."""
        self._room.attachments.remember(attachment)
        if self._room.index.known(attachment.domain, entry.path, entry.version) is None:
            self._room.index.learn(attachment.domain, _some_of(attachment, entry))

    def look(self, attachment: Attachment, name: str, entry: Entry) -> None:
        """Whoever asks may have heard that it is not stored just before its last block was. A second beginning would
        fetch it all again: Moved."""
        if name not in self.open:
            known = self._room.index.known(attachment.domain, entry.path, entry.version)
            if known is not None and known.key and self._room.store.has(known.key):
                raise Moved

    async def fetch(
        self, attachment: Attachment, subject: Incomplete, name: str, blocks: range, priority: int
    ) -> Transit | None:
        """Fetch what is missing of `blocks`. The first that could not be stored comes back in transit. Raises Moved."""
        missing = [b for b in blocks if not await self._present(subject, b)]
        if not missing:
            return None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._flights.join((name, b), partial(self._block, attachment, subject, b), priority)
                    )
                    for b in missing
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # the reader is told what failed, not that something did
        return next((t.result() for t in tasks if t.result() is not None), None)

    async def _present(self, subject: Incomplete, block: int) -> bool:
        part = subject.part
        try:
            return part is not None and part.present(block) and await asyncio.to_thread(part.checked, block)
        except CacheError:
            if part is not None and part.closed:
                raise Moved from None
            raise

    async def _block(self, attachment: Attachment, subject: Incomplete, block: int, urgency: Urgency) -> Transit | None:
        entry = subject.entry
        start, stop = block_range(block, entry.size)
        key = (attachment.domain, entry.path, entry.version, block)
        if (passing := self._room.transit.get(key)) is not None:
            return passing
        if await self._present(subject, block):
            return None  # a flight that landed between the caller's look and this one brought it
        async with self._room.in_flight.hold(stop - start, urgency):
            return await self._fetch_and_keep(attachment, subject, block, urgency)

    async def _fetch_and_keep(
        self, attachment: Attachment, subject: Incomplete, block: int, urgency: Urgency
    ) -> Transit | None:
        entry, part, source = subject.entry, subject.part, self._room.source
        start, stop = block_range(block, entry.size)
        data: Data | None
        if part is None:
            data = await source.block(attachment, entry, start, stop, urgency)
        elif source.counts_on_us(attachment.identity, entry.path, entry.version):
            data = await self._what_counts(attachment, entry, part, block, urgency)
        else:
            data = await self._a_copy(attachment, subject, part, block, urgency)
        if data is None or (part is not None and part.present(block)):  # its owner had this node keep it
            return None
        transit = Transit(memory_file(data), start, stop, entry.size, entry.version, entry.mtime_ns)
        self._room.transit.put((attachment.domain, entry.path, entry.version, block), transit)
        self._room.counters.streamed += 1
        return transit

    async def _what_counts(
        self, attachment: Attachment, entry: Entry, part: Part, block: int, urgency: Urgency
    ) -> Data | None:
        """A block of an object that counts on this node; None = it is stored now.

        Room first: what finds none is fetched by a node that has some. Not stored is what another node keeps already,
        and on one that keeps other blocks of it, what its owner did not ask it to keep: it would stay with what counts.
        """
        source = self._room.source
        start, stop = block_range(block, entry.size)
        lodge = True
        if source.counts_on_us(attachment.identity, entry.path, entry.version, block):
            try:
                async with self._aside(attachment, part, stop - start, copy=False):
                    data = await source.block(attachment, entry, start, stop, urgency)
                    return None if await self._write(part, block, data) else data
            except CacheFull:
                lodge = self._room.scanned.is_set()  # what is not counted yet, after a crash, may have room
        return await source.block(attachment, entry, start, stop, urgency, lodge=lodge)

    async def _a_copy(
        self, attachment: Attachment, subject: Incomplete, part: Part, block: int, urgency: Urgency
    ) -> Data | None:
        """A block of an object that other nodes keep; None = it is stored here too."""
        entry = subject.entry
        start, stop = block_range(block, entry.size)
        data = await self._room.source.block(attachment, entry, start, stop, urgency)
        try:
            # Not before it is there: its owner may ask this very node to keep it.
            async with self._aside(attachment, part, len(data), copy=True):
                if self._room.source.counts_on_us(attachment.identity, entry.path, entry.version):
                    return data  # its owner had this node keep another block meanwhile: this one would stay with that
                # Said before it is written: who takes a block in while it is sees that there are copies.
                first, subject.copy = not subject.copy, True
                if not await self._write(part, block, data):
                    return data
        except CacheFull:
            return data
        if first:
            self._clearing.came(attachment, _some_of(attachment, entry))
        return None

    @asynccontextmanager
    async def _aside(self, attachment: Attachment, part: Part | None, size: int, *, copy: bool) -> AsyncIterator[None]:
        """Room for a block, until the block of code ends. Raises CacheFull."""
        # Charged is the dataset that began the object, whoever reads on.
        owner, file = (part.owner, part.path) if part is not None else ("", None)
        with await self._room.quotas.aside(attachment, size, owner):
            reserved = await self._clearing.reserve(size, attachment.dataset, file, copy=copy)
            try:
                yield
            finally:
                self._room.capacity.cancel(reserved)  # what was written of it is counted by now

    async def _write(self, part: Part, block: int, data: Data) -> bool:
        try:
            await asyncio.to_thread(part.write, block, data)
        except CacheError as error:
            if not part.closed:  # a copy may have given way while its next block came
                self._room.counters.store_errors += 1
                log.warning("a block cannot be stored (%s); it streams through", error)
            return False
        self._room.capacity.commit(0, self._room.store.arrived())
        return True

    # --- for another node ---

    async def take_in(self, attachment: Attachment, entry: Entry, name: str, block: int, priority: int) -> Incomplete:
        """Keep a block for the owner of its object, which has no room for it: fetched from the origin, by this node for
        both. Raises CacheFull when there is no room here either, and then nothing was read.

        In a flight of its own: a reader on this node may wait for the same block from the owner, which waits for this.
        """
        self.look(attachment, name, entry)
        if (subject := self._here(attachment, name, entry)) is not None and await self._present(subject, block):
            return subject
        await self._taking_in.join((name, block), partial(self._take_in, attachment, entry, name, block), priority)
        return self.subject(attachment, name, entry)

    def _here(self, attachment: Attachment, name: str, entry: Entry) -> Incomplete | None:
        """None where nothing is here of it, and then nothing is begun."""
        here = name in self.open or self._room.store.has_part(name)
        return self.subject(attachment, name, entry) if here else None

    async def _take_in(self, attachment: Attachment, entry: Entry, name: str, block: int, urgency: Urgency) -> None:
        start, stop = block_range(block, entry.size)
        subject = self._here(attachment, name, entry)
        if subject is not None and subject.copy:
            # Copies of other blocks would stay with what counts. Another block may come by while they go.
            subject.copy = False
            self._room.capacity.free(await asyncio.to_thread(self.discard_part, name))
            subject = None
        size, old = stop - start, subject.part if subject is not None else None
        async with self._aside(attachment, old, size, copy=False), self._room.in_flight.hold(size, urgency):
            data = await self._room.origin.block(attachment, entry, start, stop, urgency)
            part = self.subject(attachment, name, entry).part
            if part is None or not await self._write(part, block, data):
                raise CacheError(f"{entry.path}: a block could not be kept for another node", path=entry.path)
        self._room.counters.guests += 1

    # --- and away ---

    def discard_part(self, name: str) -> int:
        """Drop what is stored of an incomplete object, by its name in the store; bytes freed. Its readers go on with
        their descriptors. May be called from another thread."""
        subject = self.open.pop(name, None)
        if subject is not None and subject.part is not None:
            try:
                return subject.part.discard()
            except CacheError:  # it became whole, or was dropped, just now
                return 0
        return self._room.store.discard_part(name)

    async def close(self) -> None:
        await self._flights.close()
        await self._taking_in.close()


def _some_of(attachment: Attachment, entry: Entry) -> Known:
    return Known(b"", entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)

"""Objects larger than one block: fetched block by block, the asked block first, each block once.

Blocks land in a sparse file (a `Part` of the store) in any order. A reader that goes on where it left off is
sequential, and the next blocks are fetched before it asks; a random reader causes no read-ahead. When the last
block is there, the object becomes a blob like any other. Blocks that cannot be stored pass through memory.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cachefs.digest import BLOCK_SIZE, block_count, block_range, version_ref
from cachefs.errors import CacheError, CacheFSError, CacheFull
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Known
from cachefs.fetcher.lanes import AHEAD, FOREGROUND
from cachefs.fetcher.objects import Objects, Stored
from cachefs.fetcher.transit import Transit, memory_file
from cachefs.messages import Entry, Need
from cachefs.store import Part

log = logging.getLogger("cachefs.fetcher")

# Where bytes are: a whole blob, a block in transit, or (file, start, stop, size, version) of an incomplete object.
Place = Stored | Transit | tuple[str, int, int, int, str]

# Read-ahead of a sequential reader, in blocks: 32 MiB hides 50 ms of latency at 5 Gbit/s. Twice as much, up to the
# most, each time that a block which is read ahead comes too late: the origin gives each connection less than that.
AHEAD_BLOCKS, MOST_AHEAD_BLOCKS = 4, 16

# Blocks of one object in flight at once when all of it is asked for: the same bound as read-ahead and its block.
WHOLE_BLOCKS = 8

# As many sequential readers of one object are told apart: the ranks of a large node.
RECENT_BLOCKS = 16

# Incomplete objects whose map stays in memory: a map of 1 GiB has 128 entries.
OPEN_PARTS = 256


# Told (bytes so far, of how many) while a large object comes in.
Alive = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """For those who need no sign of life."""


@dataclass
class _Object:
    """An object while its blocks come in.

    recent: the last blocks of what was asked for, and of what was given, to see readers that go on from there. ahead:
    the blocks that are being read ahead. window: how many there may be.
    """

    part: Part | None
    entry: Entry
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_BLOCKS))
    ahead: dict[int, asyncio.Task[object]] = field(default_factory=dict)
    window: int = AHEAD_BLOCKS


class Moved(Exception):
    """The object became whole, or was dropped, while it was asked for: to be looked for anew."""


class LargeObjects:
    """Blocks of large objects. One per fetcher."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._room = objects.room
        self._open: OrderedDict[str, _Object] = OrderedDict()
        self._flights: Flights[Transit | None] = Flights()
        self._finishing: Flights[Stored | None] = Flights()

    async def need(
        self,
        attachment: Attachment,
        request: Need,
        entry: Entry,
        priority: int = FOREGROUND,
        alive: Alive = silent,
    ) -> Place:
        """Bytes [offset, offset+length) readable: the whole blob, a block in transit, or a part.

        alive(bytes so far, of how many) is called as the blocks of a whole object come in. Raises Moved.
        """
        name = part_name(attachment.identity, entry.path, entry.version)
        if name not in self._open and not request.damaged:
            # Whoever asked may have heard that it is not stored just before its last block was. A second beginning
            # would fetch it all again.
            known = self._room.index.known(attachment.identity, entry.path, entry.version)
            if known is not None and known.key and self._room.store.has(known.key):
                raise Moved
        subject = self._subject(attachment, name, entry)
        if request.length is None:
            return await self._whole(attachment, request, subject, name, priority, alive)
        if request.length == 0 and subject.part is not None and not subject.part.complete:
            return str(subject.part.path), 0, 0, entry.size, entry.version  # opened, not read: nothing is fetched
        first = min(request.offset, entry.size - 1) // BLOCK_SIZE
        last = max(request.offset, min(entry.size, request.offset + request.length) - 1) // BLOCK_SIZE
        # Asked for again within a block is no sign of going on, and neither is the next block: random readers do that
        # too. Who goes on from one block to the next begins at its beginning, or comes across the border.
        at_its_beginning = last > first or request.offset - first * BLOCK_SIZE <= request.length
        sequential = at_its_beginning and first - 1 in subject.recent
        subject.recent.append(last)
        if sequential:
            if first in subject.ahead:
                subject.window = min(2 * subject.window, MOST_AHEAD_BLOCKS)
            # Before this one is here, so that the next ones are on their way while it is waited for.
            self._read_ahead(attachment, subject, name, last + 1)
        passing = await self._blocks(attachment, subject, name, range(first, last + 1), FOREGROUND)
        if passing is not None:
            # What cannot be stored waits in memory, where there is room for few blocks: more would be fetched twice.
            subject.window = AHEAD_BLOCKS // 2
            if passing.start <= request.offset:
                return passing
            last = passing.start // BLOCK_SIZE - 1  # what comes before is stored; the reader asks again from there on
        assert subject.part is not None
        if subject.part.closed:
            raise Moved
        if subject.part.complete and (stored := await self._finish(attachment, request, subject, name)):
            return stored
        start, stop = subject.part.run(*_span(first, last, entry.size))
        if sequential:  # it asks again when half of what is read ahead is used up, and more is
            stop = min(stop, block_range(last + subject.window // 2, entry.size)[1])
        if stop > start:
            subject.recent.append((stop - 1) // BLOCK_SIZE)  # it reads up to there without asking
        return str(subject.part.path), start, stop, entry.size, entry.version

    async def _whole(
        self, attachment: Attachment, request: Need, subject: _Object, name: str, priority: int, alive: Alive
    ) -> Place:
        count = block_count(subject.entry.size)
        for start in range(0, count, WHOLE_BLOCKS):
            blocks = range(start, min(count, start + WHOLE_BLOCKS))
            passing = await self._blocks(attachment, subject, name, blocks, priority)
            alive(block_range(blocks[-1], subject.entry.size)[1], subject.entry.size)
            if passing is not None:
                raise CacheFull(
                    f"{subject.entry.path}: {subject.entry.size} bytes do not fit into the cache as a whole; "
                    "read it in pieces, or give the cache more room (cache_size, --size)",
                    path=subject.entry.path,
                )
        stored = await self._finish(attachment, request, subject, name)
        if stored is None:
            raise CacheError(f"{subject.entry.path}: could not be completed on disk; see the fetcher's log")
        return stored

    def _note(self, attachment: Attachment, entry: Entry) -> None:
        """Let the index know that some of an object is stored (key b"" = not all), so that it can be evicted."""
        self._room.attachments.remember(attachment)
        if self._room.index.known(attachment.identity, entry.path, entry.version) is None:
            known = Known(b"", entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)
            self._room.index.learn(attachment.identity, known)

    def _subject(self, attachment: Attachment, name: str, entry: Entry) -> _Object:
        subject = self._open.get(name)
        if subject is not None and subject.part is not None and subject.part.lost:
            log.warning("%s: was removed while its object came in; it is fetched again", subject.part.path)
            subject.part.close()
            subject = None
        if subject is None:
            try:
                part = self._room.store.part(name, entry.size)
            except CacheError as error:
                log.warning("%s: cannot be stored by block (%s); it streams through", entry.path, error)
                part = None
            if part is not None:
                self._note(attachment, entry)
            subject = self._open[name] = _Object(part, entry)
            while len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return subject

    async def _blocks(
        self, attachment: Attachment, subject: _Object, name: str, blocks: range, priority: int
    ) -> Transit | None:
        """Fetch what is missing of `blocks`. The first that could not be stored comes back in transit."""
        missing = [b for b in blocks if not await self._present(subject, b)]
        if not missing:
            return None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._flights.join((name, b), lambda b=b: self._block(attachment, subject, b, priority))  # type: ignore[misc]
                    )
                    for b in missing
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # the reader is told what failed, not that something did
        return next((t.result() for t in tasks if t.result() is not None), None)

    async def _present(self, subject: _Object, block: int) -> bool:
        part = subject.part
        try:
            return part is not None and part.present(block) and await asyncio.to_thread(part.checked, block)
        except CacheError:
            if part is not None and part.closed:
                raise Moved from None
            raise

    async def _block(self, attachment: Attachment, subject: _Object, block: int, priority: int) -> Transit | None:
        entry = subject.entry
        start, stop = block_range(block, entry.size)
        key = (attachment.identity, entry.path, entry.version, block)
        if (passing := self._room.transit.get(key)) is not None:
            return passing
        if await self._present(subject, block):
            return None  # a flight that landed between the caller's look and this one brought it
        async with self._room.in_flight.hold(stop - start, priority):
            return await self._fetch_and_keep(attachment, subject, block, priority)

    async def _fetch_and_keep(
        self, attachment: Attachment, subject: _Object, block: int, priority: int
    ) -> Transit | None:
        entry = subject.entry
        start, stop = block_range(block, entry.size)
        counters = self._room.counters
        async with self._room.lanes.lane(priority):
            counters.origin_requests += 1
            try:
                data = await attachment.origin.get_range(entry.path, start, stop, version=entry.version)
            except CacheFSError:
                counters.origin_errors += 1
                raise
        counters.origin_bytes += len(data)
        if subject.part is not None and await self._store(attachment, subject.part, block, data):
            return None
        transit = Transit(memory_file(data), start, stop, entry.size, entry.version, entry.mtime_ns)
        self._room.transit.put((attachment.identity, entry.path, entry.version, block), transit)
        counters.streamed += 1
        return transit

    async def _store(self, attachment: Attachment, part: Part, block: int, data: bytes) -> bool:
        try:
            reserved = await self._objects.reserve(len(data), attachment.dataset, part.path)
        except CacheFull:
            return False
        try:
            await asyncio.to_thread(part.write, block, data)
        except CacheError as error:
            self._room.counters.store_errors += 1
            self._room.capacity.cancel(reserved)
            log.warning("a block cannot be stored (%s); it streams through", error)
            return False
        except BaseException:
            self._room.capacity.cancel(reserved)
            raise
        self._room.capacity.commit(reserved)
        return True

    def _read_ahead(self, attachment: Attachment, subject: _Object, name: str, start: int) -> None:
        """Fetch the next blocks; owned by the object, cancelled at shutdown, errors left to whoever needs them."""
        part = subject.part
        if part is None:
            return
        for block in range(start, min(block_count(subject.entry.size), start + subject.window)):
            if block not in subject.ahead and not part.present(block):
                coming = self._blocks(attachment, subject, name, range(block, block + 1), AHEAD)
                task: asyncio.Task[object] = asyncio.create_task(coming)
                subject.ahead[block] = task
                task.add_done_callback(functools.partial(_ended, subject, block))

    async def _finish(self, attachment: Attachment, request: Need, subject: _Object, name: str) -> Stored | None:
        """Turn the complete part into a blob, once, and link it where this reader looks."""
        stored = await self._finishing.join(name, lambda: self._publish(attachment, request, subject, name))
        refs = self._objects.refs(attachment, request)
        if stored is not None and stored.refs != refs:
            await asyncio.to_thread(self._room.store.link, stored.key, refs)
        return stored

    async def _publish(self, attachment: Attachment, request: Need, subject: _Object, name: str) -> Stored | None:
        entry = subject.entry
        assert subject.part is not None
        refs = self._objects.refs(attachment, request)
        try:
            key = await asyncio.to_thread(subject.part.finish, refs)
        except CacheError as error:
            log.warning("%s: cannot be completed (%s)", entry.path, error)
            return None
        self._open.pop(name, None)
        known = Known(key, entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)
        self._room.index.learn(attachment.identity, known)
        return self._objects.stored(known, refs)

    def discard(self, identity: str, known: Known) -> int:
        """Drop what is stored of an incomplete object; bytes freed. Its readers go on with their descriptors."""
        name = part_name(identity, known.path, known.version)
        subject = self._open.pop(name, None)
        if subject is not None and subject.part is not None:
            return subject.part.discard()
        return self._room.store.discard_part(name)

    async def close(self) -> None:
        ahead = [task for subject in self._open.values() for task in subject.ahead.values()]
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        await self._flights.close()
        await self._finishing.close()


def part_name(identity: str, path: str, version: str) -> str:
    """Under which name the store keeps what it has of an incomplete object."""
    return version_ref(f"{identity}\0{path}", version)


def _span(first: int, last: int, size: int) -> tuple[int, int]:
    return block_range(first, size)[0], block_range(last, size)[1]


def _ended(subject: _Object, block: int, task: asyncio.Task[object]) -> None:
    subject.ahead.pop(block, None)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("%s: read-ahead failed (%s); whoever reads there will try again", subject.entry.path, error)

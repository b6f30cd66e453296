"""Objects larger than one block: fetched block by block, the asked block first, each block once.

How one block comes is said in blocks.py. A reader that goes on where it left off is sequential, and the next blocks are
fetched before it asks; a random reader causes no read-ahead. When the last block is there, the object becomes a blob
like any other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from cachefs.digest import BLOCK_SIZE, block_count, block_range, version_ref
from cachefs.errors import CacheError, CacheFull, OriginError
from cachefs.fetcher.attachments import Attachment, part_name
from cachefs.fetcher.blocks import AHEAD_BLOCKS, MOST_AHEAD_BLOCKS, Blocks, Incomplete, Moved
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Known
from cachefs.fetcher.lanes import AHEAD, FOREGROUND
from cachefs.fetcher.objects import Objects, Stored
from cachefs.fetcher.transit import Transit
from cachefs.messages import Entry, Need
from cachefs.store import Part

log = logging.getLogger("cachefs.fetcher")

# Where bytes are: a whole blob, a block in transit, or (file, start, stop, size, version) of an incomplete object.
Place = Stored | Transit | tuple[str, int, int, int, str]

# Blocks of one object in flight at once when all of it is asked for: the same bound as read-ahead and its block.
WHOLE_BLOCKS = 8

# Objects that are read a second time; of one that was forgotten, the next reading is the first again.
MOST_DOUBTED = 1024

# Told (bytes so far, of how many) while a large object comes in.
Alive = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """For those who need no sign of life."""


class LargeObjects:
    """Blocks of large objects. One per fetcher."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._room = objects.room
        self._blocks = Blocks(objects)
        self._other_bytes: dict[str, bytes] = {}  # content keys of what is read again, as it is not what was sealed
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
        name = part_name(attachment.domain, entry.path, entry.version)
        if not request.damaged:
            self._blocks.look(attachment, name, entry)
        subject = self._blocks.subject(attachment, name, entry)
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
        if sequential and priority == FOREGROUND:  # else it is read ahead itself, by another node
            if first in subject.ahead:
                subject.window = min(2 * subject.window, MOST_AHEAD_BLOCKS)
            # Before this one is here, so that the next ones are on their way while it is waited for.
            self._read_ahead(attachment, subject, name, last + 1)
        passing = await self._blocks.fetch(attachment, subject, name, range(first, last + 1), priority)
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
        self, attachment: Attachment, request: Need, subject: Incomplete, name: str, priority: int, alive: Alive
    ) -> Place:
        count = block_count(subject.entry.size)
        for start in range(0, count, WHOLE_BLOCKS):
            blocks = range(start, min(count, start + WHOLE_BLOCKS))
            passing = await self._blocks.fetch(attachment, subject, name, blocks, priority)
            alive(block_range(blocks[-1], subject.entry.size)[1], subject.entry.size)
            if passing is not None:
                raise CacheFull(
                    f"{subject.entry.path}: {subject.entry.size} bytes do not fit into the cache as a whole; "
                    "read it in pieces, or give the cache more room (cache_size, --size; `cachefs quota`)",
                    path=subject.entry.path,
                )
        stored = await self._finish(attachment, request, subject, name)
        if stored is None:
            raise CacheError(f"{subject.entry.path}: could not be completed on disk; see the fetcher's log")
        return stored

    def _read_ahead(self, attachment: Attachment, subject: Incomplete, name: str, start: int) -> None:
        """Fetch the next blocks; owned by the object, cancelled at shutdown, errors left to whoever needs them."""
        part = subject.part
        if part is None:
            return
        for block in range(start, min(block_count(subject.entry.size), start + subject.window)):
            if block not in subject.ahead and not part.present(block):
                coming = self._blocks.fetch(attachment, subject, name, range(block, block + 1), AHEAD)
                task: asyncio.Task[object] = asyncio.create_task(coming)
                subject.ahead[block] = task
                task.add_done_callback(partial(_ended, subject, block))

    async def _finish(self, attachment: Attachment, request: Need, subject: Incomplete, name: str) -> Stored | None:
        """Turn the complete part into a blob, once, and link it where this reader looks."""
        stored = await self._finishing.join(name, lambda _: self._publish(attachment, request, subject, name))
        refs = self._objects.refs(attachment, request)
        if stored is not None and stored.refs != refs:
            await self._room.quotas.link(attachment, stored.key, refs)
        return stored

    async def _publish(self, attachment: Attachment, request: Need, subject: Incomplete, name: str) -> Stored | None:
        entry, part = subject.entry, subject.part
        assert part is not None
        self._compare(attachment, entry, part, name)
        refs = self._objects.refs(attachment, request)
        aside: AbstractContextManager[None] = nullcontext()
        if part.owner != attachment.dataset:
            try:
                aside = await self._room.quotas.aside(attachment, entry.size)
            except CacheFull:  # where the reader looks it cannot be, but where whoever began it does
                refs = ((part.owner, version_ref(entry.path, entry.version)),) if part.owner else ()
        try:
            with aside:
                key = await asyncio.to_thread(part.finish, refs, attachment.tag)
        except CacheError as error:
            log.warning("%s: cannot be completed (%s)", entry.path, error)
            return None
        self._room.capacity.commit(0, self._room.store.arrived())
        self._blocks.open.pop(name, None)
        known = Known(key, entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)
        self._room.index.learn(attachment.domain, known)
        if not self._room.source.counts_on_us(attachment.identity, entry.path, entry.version):
            self._objects.clearing.came(attachment, known)
        return self._objects.stored(known, refs)

    def _compare(self, attachment: Attachment, entry: Entry, part: Part, name: str) -> None:
        """With the content key that was sealed, if one was; as in `Objects`, what is not that is read again, once, and
        what comes twice is what the origin has. Raises Moved, OriginError."""
        sealed = self._objects.sealed_key(attachment, entry.path, entry.size, entry.version)
        key = part.key
        if sealed is None or key is None or key + attachment.tag == sealed:
            self._other_bytes.pop(name, None)
            return
        before = self._other_bytes.pop(name, None)
        if before == key:
            log.warning("%s: is not what was sealed, though its version is; served as the origin has it", entry.path)
            return
        self._room.capacity.free(self._blocks.discard_part(name))
        if before is not None:
            raise OriginError(
                f"{entry.path}: came with other bytes each time it was read, none of them those that were sealed; "
                "its storage or the network damages data",
                path=entry.path,
            )
        log.warning("%s: came with other bytes than were sealed; reading it again", entry.path)
        self._other_bytes[name] = key
        if len(self._other_bytes) > MOST_DOUBTED:
            del self._other_bytes[next(iter(self._other_bytes))]
        raise Moved

    # --- for another node ---

    async def take_in(self, attachment: Attachment, request: Need, entry: Entry, priority: int = FOREGROUND) -> Place:
        """One block, kept from now on for the owner of its object, which has no room for it. Raises CacheFull, and then
        nothing was read; Moved.
        """
        name = part_name(attachment.domain, entry.path, entry.version)
        block = min(request.offset, entry.size - 1) // BLOCK_SIZE
        subject = await self._blocks.take_in(attachment, entry, name, block, priority)
        if subject.part is None or subject.part.closed:
            raise Moved
        if subject.part.complete and (stored := await self._finish(attachment, request, subject, name)):
            return stored
        start, stop = subject.part.run(*block_range(block, entry.size))
        return str(subject.part.path), start, stop, entry.size, entry.version

    def has(self, domain: str, path: str, version: str) -> bool:
        """Whether anything of it is here."""
        known = self._room.index.known(domain, path, version)
        whole = known is not None and known.key and self._room.store.has(known.key)
        return bool(whole) or self._room.store.has_part(part_name(domain, path, version))

    # --- and away ---

    def discard(self, domain: str, known: Known) -> int:
        """Drop what is stored of an incomplete object; bytes freed. Its readers go on with their descriptors."""
        return self._blocks.discard_part(part_name(domain, known.path, known.version))

    def discard_part(self, name: str) -> int:
        """The same, by its name in the store."""
        return self._blocks.discard_part(name)

    async def close(self) -> None:
        ahead = [task for subject in self._blocks.open.values() for task in subject.ahead.values()]
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        await self._blocks.close()
        await self._finishing.close()


def _span(first: int, last: int, size: int) -> tuple[int, int]:
    return block_range(first, size)[0], block_range(last, size)[1]


def _ended(subject: Incomplete, block: int, task: asyncio.Task[object]) -> None:
    subject.ahead.pop(block, None)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("%s: read-ahead failed (%s); whoever reads there will try again", subject.entry.path, error)

"""Make the bytes of an object readable: from disk, from a flight already under way, or from the origin.

The order of a miss: the ref may exist by now (another reader was first) -> the version may be stored under
another name -> its content may be known before it is fetched -> fetch, reserve, store, link. What cannot be
stored (no room, failing SSD) streams through memory. A cache failure is never an error for the reader.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cachefs import datasets, memory
from cachefs.budget import Budget
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, content_key, snapshot_ref, version_ref
from cachefs.errors import CacheError, CacheFull, StaleObject
from cachefs.fetcher import superseded
from cachefs.fetcher.attachments import Attachment, Attachments
from cachefs.fetcher.capacity import Capacity, allocated
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Index, Known, Seen
from cachefs.fetcher.lanes import FOREGROUND, Lanes
from cachefs.fetcher.residency import Candidate, victims
from cachefs.fetcher.storing import Storing
from cachefs.fetcher.transit import KEEP_BYTES, KEEP_LEAST, KEEP_SHARE, Transit, TransitStation, memory_file
from cachefs.messages import Entry, Need
from cachefs.store import Reader, Store

log = logging.getLogger("cachefs.fetcher")

# S3 describes the content of what was uploaded in one piece by its MD5, in several by the MD5 of their MD5s and
# their number (AWS "Checking object integrity"): equal ETag and size mean equal content, whatever the name.
# Other origins make ETags of inode and time, which says nothing about content.
_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")

# After a crash the store is counted anew, 3 s per million blobs; a reader waits this long before its object streams
# through instead.
SCAN_PATIENCE = 1.0

# Eviction frees more than the one object that asked, so that the next ones find room without evicting again.
EVICT_AT_LEAST = 64 * 1024 * 1024


# (dataset, ref) pairs: where a reader looks for an object.
Refs = tuple[tuple[str, str], ...]


class Stored(NamedTuple):
    """An object that is on disk, whole. key: 16 bytes of content key. file: where. refs: under which it is linked."""

    key: bytes
    size: int
    version: str
    mtime_ns: int
    file: str
    refs: Refs


class Room:
    """Everything the fetcher's parts share. Owned by the service; made once."""

    def __init__(self, config: CacheConfig, store: Store, index: Index) -> None:
        self.config = config
        self.store = store
        self.reader = Reader(config.dirs)
        self.storing = Storing(store)
        self.index = index
        self.capacity = Capacity(config.size, config.min_free)
        self.attachments = Attachments(config.home)
        self.counters = Counters()
        self.lanes = Lanes()
        self.in_flight = Budget(memory.in_flight())
        self.transit = TransitStation(memory.share(KEEP_SHARE, least=KEEP_LEAST, most=KEEP_BYTES))
        self.scanned = asyncio.Event()


class Objects:
    """Whole objects of at most one block. Larger ones are recognised here and handed to `large`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._flights: Flights[Stored | Transit | Entry] = Flights()
        self._evicting = asyncio.Lock()

    def refs(self, attachment: Attachment, request: Need) -> Refs:
        """Where the reader that asks will look for the object."""
        if request.version:
            at = (attachment.dataset, version_ref(request.path, request.version))
            if request.everywhere:  # a mount looks by version, a file system by snapshot
                return (at, (attachment.dataset, snapshot_ref(request.path, attachment.snapshot)))
            return (at,)
        return ((attachment.dataset, snapshot_ref(request.path, attachment.snapshot)),)

    def stored(self, known: Known, refs: Refs) -> Stored:
        file = self.room.storing.file(known.key)
        return Stored(known.key, known.size, known.version, known.mtime_ns, file, refs)

    async def version_of(self, attachment: Attachment, request: Need) -> tuple[str, int]:
        """(version, size) that this reader's snapshot serves; ("", -1) when it was never seen."""
        if request.version:
            return request.version, request.size
        catalog = attachment.catalog(self.room.config.home)
        if catalog is not None and (row := catalog.find(request.path)) is not None and not row.directory:
            return row.version, row.size
        seen = self.room.index.seen(attachment.dataset, attachment.snapshot, request.path)
        return (seen.version, seen.size) if seen else ("", -1)

    async def whole(
        self, attachment: Attachment, request: Need, version: str, priority: int = FOREGROUND
    ) -> Stored | Transit | Entry:
        """The object, stored or in transit; its Entry when it is larger than one block.

        Raises StaleObject when the origin has another version and this one is not cached; OriginError.
        """
        refs = self.refs(attachment, request)
        try:
            if version and (known := await self._stored(attachment, request, version, refs)):
                return known
            if not request.damaged and (found := self._linked(version, refs)):
                return found
        except CacheError as error:
            log.warning("%s: its stored copy cannot be used (%s); reading the origin", request.path, error)
        if version and (passing := self.room.transit.get((attachment.identity, request.path, version))) is not None:
            return passing
        # Readers of different snapshots may mean different versions while the version is still unknown.
        key = (attachment.identity, request.path, version, "" if version else (attachment.dataset, attachment.snapshot))
        result = await self._flights.join(key, lambda: self._fetch(attachment, request, version, refs, priority))
        if isinstance(result, Stored) and result.refs != refs:
            # Whoever joined the flight may look for the object under another ref than whoever started it.
            await asyncio.to_thread(self.room.store.link, result.key, refs)
        return result

    async def _stored(self, attachment: Attachment, request: Need, version: str, refs: Refs) -> Stored | None:
        """The object if its bytes are on disk and right, linked under `refs`."""
        room = self.room
        known = room.index.known(attachment.identity, request.path, version)
        if known is None or not known.key:
            return None
        missing = tuple(ref for ref in refs if not room.reader.file(*ref))
        if missing == refs or request.damaged:
            if not room.store.has(known.key):
                return None
            # Not checked since the machine started, or a reader found it wrong: read it before it is served.
            if not await asyncio.to_thread(room.store.check, known.key):
                self._damaged(attachment, known)
                return None
            missing = refs
        if missing and not await asyncio.to_thread(room.store.link, known.key, missing):
            return None
        room.counters.stored += 1
        self._see(attachment, request, version, known.size, known.mtime_ns)
        return self.stored(known, refs)

    def _linked(self, version: str, refs: Refs) -> Stored | None:
        """The object if its ref is there though the index does not know it: a batch of the index was lost."""
        for dataset, ref in refs:
            file = self.room.reader.file(dataset, ref)
            key = self.room.store.key_of(dataset, ref) if file else None
            if file and key and self.room.store.has(key):
                self.room.counters.stored += 1
                if len(refs) > 1:
                    self.room.store.link(key, refs)
                return Stored(key, os.stat(file).st_size, version, 0, file, refs)
        return None

    def _damaged(self, attachment: Attachment, known: Known) -> None:
        log.warning("%s: its stored copy does not match its digest; fetching it again", known.path)
        self.room.counters.damaged += 1
        self.room.capacity.free(self.room.store.drop(known.key))
        self.room.index.forget(attachment.identity, known.path, known.version)

    def _see(self, attachment: Attachment, request: Need, version: str, size: int, mtime_ns: int) -> None:
        if not request.version and attachment.snapshot.startswith("g"):
            seen = Seen(version, size, mtime_ns)
            if self.room.index.seen(attachment.dataset, attachment.snapshot, request.path) != seen:
                self.room.index.see(attachment.dataset, attachment.snapshot, request.path, seen)

    async def _fetch(
        self, attachment: Attachment, request: Need, version: str, refs: Refs, priority: int
    ) -> Stored | Transit | Entry:
        room = self.room
        if request.size > BLOCK_SIZE:
            return Entry(request.path, request.size, 0, version)
        try:
            if recognised := await self._recognise(attachment, request, version, refs):
                return recognised
        except CacheError as error:
            log.warning("%s: its stored copy cannot be used (%s); reading the origin", request.path, error)
        # Of unknown size: as much as will be taken.
        async with room.in_flight.hold(request.size if request.size >= 0 else BLOCK_SIZE, priority):
            return await self._fetch_and_keep(attachment, request, version, refs, priority)

    async def _fetch_and_keep(
        self, attachment: Attachment, request: Need, version: str, refs: Refs, priority: int
    ) -> Stored | Transit | Entry:
        room = self.room
        async with room.lanes.lane(priority):
            entry, data = await self.ask(lambda: attachment.origin.get(request.path, version=version, limit=BLOCK_SIZE))
        if version and entry.version != version:
            raise StaleObject(
                f"{request.path}: was replaced at the origin and the version of this snapshot is not cached; "
                "`cachefs refresh` takes the new one",
                path=request.path,
            )
        if data is None:
            self._see(attachment, request, entry.version, entry.size, entry.mtime_ns)
            return entry
        room.counters.origin_bytes += len(data)
        kept = await self.keep(attachment, entry, data, refs)
        # Before the flight lands: whoever comes between its landing and a later note would find nothing known
        # of the object and read it again.
        self._see(attachment, request, entry.version, entry.size, entry.mtime_ns)
        return kept

    async def ask(self, call: Callable[[], object]) -> tuple[Entry, bytes | None]:
        """One request at the origin, counted."""
        self.room.counters.origin_requests += 1
        try:
            return await call()  # type: ignore[misc,no-any-return]
        except Exception:
            self.room.counters.origin_errors += 1
            raise

    async def _recognise(self, attachment: Attachment, request: Need, version: str, refs: Refs) -> Stored | None:
        """A renamed or copied object whose content is stored: found by what S3 says of the content."""
        hint = content_hint(attachment, version)
        if hint is None or request.size < 0:
            return None
        key = self.room.index.same_content(hint, request.size)
        if key is None or not self.room.store.has(key):
            return None
        if not await asyncio.to_thread(self.room.store.check, key):
            self.room.capacity.free(self.room.store.drop(key))
            return None
        if not await asyncio.to_thread(self.room.store.link, key, refs):
            return None
        known = Known(key, request.size, 0, version, request.path, attachment.dataset)
        self.room.index.learn(attachment.identity, known)
        return self.stored(known, refs)

    async def keep(self, attachment: Attachment, entry: Entry, data: bytes, refs: Refs) -> Stored | Transit:
        """Store what was fetched, or let it pass through memory when it cannot be stored."""
        room = self.room
        try:
            several = len(room.config.dirs) > 1  # only then does it matter where the key leads
            file = room.store.path(content_key(data)) if several else None
            reserved = await self.reserve(len(data), attachment.dataset, file)
        except CacheError:  # full, or no directory works any more
            return self._pass(attachment, entry, data)
        try:
            key = await room.storing.put(data, refs)
        except CacheError as error:
            room.counters.store_errors += 1
            room.capacity.cancel(reserved)
            log.warning("%s: cannot be stored (%s); it streams through", entry.path, error)
            return self._pass(attachment, entry, data)
        except BaseException:
            room.capacity.cancel(reserved)
            raise
        room.capacity.commit(reserved)
        room.attachments.remember(attachment)
        known = Known(key, entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)
        room.index.learn(attachment.identity, known)
        if hint := content_hint(attachment, entry.version):
            room.index.learn_content(hint, entry.size, key)
        return self.stored(known, refs)

    def _pass(self, attachment: Attachment, entry: Entry, data: bytes) -> Transit:
        self.room.counters.streamed += 1
        fd = memory_file(data)
        transit = Transit(fd, 0, len(data), entry.size, entry.version, entry.mtime_ns)
        self.room.transit.put((attachment.identity, entry.path, entry.version), transit)
        return transit

    async def reserve(self, count: int, dataset: str, file: Path | None) -> int:
        """Room for `count` bytes of `file` (None: in home), taken from idle datasets if need be. Raises CacheFull."""
        room = self.room
        if not room.scanned.is_set():
            try:
                async with asyncio.timeout(SCAN_PATIENCE):
                    await room.scanned.wait()
            except TimeoutError:
                raise CacheFull("the cache is still being counted after a crash") from None
        directory = room.config.home
        if file is not None:
            directory = next((d for d in room.config.dirs if file.is_relative_to(d)), directory)
        try:
            return room.capacity.reserve(count, directory)
        except CacheFull:
            # One eviction at a time: those who waited for it find its room and need none of their own.
            async with self._evicting:
                try:
                    return room.capacity.reserve(count, directory)
                except CacheFull:
                    await asyncio.to_thread(self._evict, max(allocated(count), EVICT_AT_LEAST), dataset)
                return room.capacity.reserve(count, directory)

    def _evict(self, count: int, wanted_by: str) -> None:
        """Free `count` bytes, without taking from a dataset in use: first of what a refresh has replaced."""
        room = self.room
        freed = 0
        for dataset, ref in self._may_go(wanted_by):
            freed += room.store.unlink_ref(dataset, ref)
            if freed >= count:
                break
        room.counters.evicted_bytes += freed
        room.capacity.free(freed)

    def _may_go(self, wanted_by: str) -> Iterator[tuple[str, str]]:
        room = self.room
        pinned = datasets.pinned(room.config.home)
        yield from superseded.take(room.config.home, kept=pinned - {wanted_by})
        candidates = [
            Candidate(d, datasets.last_use(room.config.home, d), room.attachments.in_use(d), d in pinned)
            for d in room.store.datasets()
        ]
        for dataset in victims(candidates, wanted_by):
            for ref in room.store.refs(dataset):
                yield dataset, ref

    async def close(self) -> None:
        await self._flights.close()


def content_hint(attachment: Attachment, version: str) -> str | None:
    """What the origin says about the content itself, None where it says nothing."""
    if attachment.identity.startswith("s3") and _MD5_ETAG.fullmatch(version):
        return f"md5:{version}"
    return None

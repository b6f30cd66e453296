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
from functools import partial
from typing import NamedTuple

from cachefs.budget import Urgency
from cachefs.digest import BLOCK_SIZE, content_key, snapshot_ref, version_ref
from cachefs.errors import CacheError, CacheFull, OriginError, StaleObject
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.clearing import Clearing
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Known, Seen
from cachefs.fetcher.lanes import BACKGROUND, FOREGROUND
from cachefs.fetcher.room import Room
from cachefs.fetcher.sources import Data, Host
from cachefs.fetcher.transit import Transit, memory_file
from cachefs.messages import Entry, Lodge, Need

log = logging.getLogger("cachefs.fetcher")

# S3 describes the content of what was uploaded in one piece by its MD5, in several by the MD5 of their MD5s and
# their number (AWS "Checking object integrity"): equal ETag and size mean equal content, whatever the name.
# Other origins make ETags of inode and time, which says nothing about content.
_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")

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


class Objects:
    """Whole objects of at most one block. Larger ones are recognised here and handed to `large`."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._flights: Flights[Stored | Transit | Entry] = Flights()
        self.clearing = Clearing(room)

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
                self.room.counters.stored += 1
                return known
            if not request.damaged and (found := self._linked(version, refs)):
                return found
        except CacheError as error:
            log.warning("%s: its stored copy cannot be used (%s); reading the origin", request.path, error)
        if version and (passing := self.room.transit.get((attachment.domain, request.path, version))) is not None:
            return passing
        # Readers of different snapshots may mean different versions while the version is still unknown.
        key = (attachment.domain, request.path, version, "" if version else (attachment.dataset, attachment.snapshot))
        result = await self._flights.join(key, partial(self._fetch, attachment, request, version, refs), priority)
        if isinstance(result, Stored) and result.refs != refs:
            # Whoever joined the flight may look for the object under another ref than whoever started it.
            await self.room.quotas.link(attachment, result.key, refs)
        return result

    async def _stored(self, attachment: Attachment, request: Need, version: str, refs: Refs) -> Stored | None:
        """The object if its bytes are on disk and right, linked under `refs`."""
        room = self.room
        known = room.index.known(attachment.domain, request.path, version)
        if known is None or not known.key:
            return None
        missing = tuple(ref for ref in refs if not room.reader.file(*ref))
        if missing == refs or request.damaged:
            if not room.store.has(known.key):
                return None
            # Not checked since the machine started, or a reader found it wrong: read it before it is served.
            unsure = request.damaged or not room.store.sealed(known.key)
            if unsure and not await asyncio.to_thread(room.store.check, known.key):
                self._damaged(attachment, known)
                return None
            missing = refs
        if missing and not await room.quotas.link(attachment, known.key, missing):
            return None
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
        self.room.turnover.lost(attachment, known)
        self.room.index.forget(attachment.domain, known.path, known.version)

    def _see(self, attachment: Attachment, request: Need, version: str, size: int, mtime_ns: int) -> None:
        if not request.version and attachment.snapshot.startswith("g"):
            seen = Seen(version, size, mtime_ns)
            if self.room.index.seen(attachment.dataset, attachment.snapshot, request.path) != seen:
                self.room.index.see(attachment.dataset, attachment.snapshot, request.path, seen)

    async def _fetch(
        self, attachment: Attachment, request: Need, version: str, refs: Refs, urgency: Urgency
    ) -> Stored | Transit | Entry:
        room = self.room
        try:
            if recognised := await self._recognise(attachment, request, version, refs):
                return recognised
        except CacheError as error:
            log.warning("%s: its stored copy cannot be used (%s); reading the origin", request.path, error)
        if request.size > BLOCK_SIZE:
            return Entry(request.path, request.size, 0, version)
        # Of unknown size: as much as will be taken.
        async with room.in_flight.hold(request.size if request.size >= 0 else BLOCK_SIZE, urgency):
            return await self._fetch_and_keep(attachment, request, version, refs, urgency)

    async def _fetch_and_keep(
        self, attachment: Attachment, request: Need, version: str, refs: Refs, urgency: Urgency
    ) -> Stored | Transit | Entry:
        room = self.room
        entry, data = await room.source.whole(attachment, request, version, urgency)
        if version and entry.version != version:
            raise StaleObject(
                f"{request.path}: was replaced at the origin and the version of this snapshot is not cached; "
                "`cachefs refresh` takes the new one",
                path=request.path,
            )
        if data is None:
            self._see(attachment, request, entry.version, entry.size, entry.mtime_ns)
            return entry
        sealed = self.sealed_key(attachment, request.path, request.size, version) if version else None
        if sealed is not None and content_key(data) + attachment.tag != sealed:
            data = await self._again(attachment, request, version, urgency, data, sealed)
        kept = await self._keep_or_pass(attachment, entry, data, refs)
        # Before the flight lands: whoever comes between its landing and a later note would find nothing known
        # of the object and read it again.
        self._see(attachment, request, entry.version, entry.size, entry.mtime_ns)
        return kept

    async def _again(
        self, attachment: Attachment, request: Need, version: str, urgency: Urgency, data: Data, sealed: bytes
    ) -> Data:
        """What came is not what was sealed: read it once more. What comes twice is what the origin has now, and whoever
        sealed it may have read it wrong; what is different each time was damaged on its way. Raises OriginError."""
        log.warning("%s: came with other bytes than were sealed; reading it again", request.path)
        _, again = await self.room.source.whole(attachment, request, version, urgency)
        if again is not None and content_key(again) + attachment.tag == sealed:
            return again
        if again is None or bytes(again) != bytes(data):
            raise OriginError(
                f"{request.path}: came with other bytes each time it was read, none of them those that were sealed; "
                "its storage or the network damages data",
                path=request.path,
            )
        log.warning("%s: is not what was sealed, though its version is; served as the origin has it", request.path)
        return again

    async def _recognise(self, attachment: Attachment, request: Need, version: str, refs: Refs) -> Stored | None:
        """An object whose content is stored under another name: found by its content key where the catalog has it, or
        by what S3 says of the content of one that was renamed or copied."""
        if not version or request.size < 0:
            return None
        sealed = self.sealed_key(attachment, request.path, request.size, version)
        key = sealed
        if key is None and request.size <= BLOCK_SIZE and (hint := content_hint(attachment, version)):
            key = self.room.index.same_content(hint, request.size)
        if key is None or not self.room.store.has(key):
            return None
        # To read all of a large one costs as much as it saves; the seal says that it is whole.
        whole = sealed is not None and not request.damaged and self.room.store.sealed(key)
        if not whole and not await asyncio.to_thread(self.room.store.check, key):
            self.room.capacity.free(self.room.store.drop(key))
            return None
        if _size_of(self.room.store.path(key)) != request.size:
            return None  # evicted just now; or two contents of one key: XXH3 is no proof against whoever wants that
        if not await self.room.quotas.link(attachment, key, refs):
            return None
        known = Known(key, request.size, 0, version, request.path, attachment.dataset)
        self.room.index.learn(attachment.domain, known)
        return self.stored(known, refs)

    def sealed_key(self, attachment: Attachment, path: str, size: int, version: str) -> bytes | None:
        """What the blob of this version is called by the catalog, where `cachefs seal` has put that into it."""
        try:
            catalog = attachment.catalog(self.room.config.home)
            if catalog is None or not catalog.has_keys or (row := catalog.find(path)) is None:
                return None
            key = catalog.key(row.id)
        except StaleObject:  # its snapshot has no catalog any more: the origin is asked as ever
            return None
        same = row.version == version and row.size == size
        return key + attachment.tag if key is not None and same else None

    async def _keep_or_pass(self, attachment: Attachment, entry: Entry, data: Data, refs: Refs) -> Stored | Transit:
        """Store what was fetched, in the place of what is read less often if need be, or let it pass through memory."""
        room = self.room
        for last in (False, True):
            try:
                with await room.quotas.aside(attachment, len(data)):
                    return await self._keep(attachment, entry, data, refs)
            except CacheFull:
                # What another node keeps, too, takes nothing's place.
                ours = room.source.counts_on_us(attachment.identity, entry.path, entry.version)
                sure = ours and room.scanned.is_set()
                if last or not sure or not await room.turnover.give_way(attachment, entry, len(data)):
                    break
        passing = self._pass(attachment, entry, data)
        if sure:
            room.source.offer(attachment, entry)
        return passing

    async def _keep(self, attachment: Attachment, entry: Entry, data: Data, refs: Refs) -> Stored | Transit:
        """Raises CacheFull. What cannot be stored for another reason passes through memory."""
        room = self.room
        try:
            several = len(room.config.dirs) > 1  # only then does it matter where the key leads
            file = room.store.path(content_key(data) + attachment.tag) if several else None
            copy = not room.source.counts_on_us(attachment.identity, entry.path, entry.version)
            reserved = await self.clearing.reserve(len(data), attachment.dataset, file, copy=copy, path=entry.path)
        except CacheFull:
            raise
        except CacheError:  # no directory works any more
            return self._pass(attachment, entry, data)
        try:
            key = await room.storing.put(data, refs, attachment.tag)
        except CacheError as error:
            room.counters.store_errors += 1
            room.capacity.cancel(reserved)
            log.warning("%s: cannot be stored (%s); it streams through", entry.path, error)
            return self._pass(attachment, entry, data)
        except BaseException:
            room.capacity.cancel(reserved)
            raise
        room.capacity.commit(reserved, room.store.arrived())
        room.attachments.remember(attachment)
        known = Known(key, entry.size, entry.mtime_ns, entry.version, entry.path, attachment.dataset)
        room.index.learn(attachment.domain, known)
        if hint := content_hint(attachment, entry.version):
            room.index.learn_content(hint, entry.size, key)
        if copy:
            self.clearing.came(attachment, known)
        room.turnover.kept(attachment, known)
        return self.stored(known, refs)

    def _pass(self, attachment: Attachment, entry: Entry, data: Data) -> Transit:
        self.room.counters.streamed += 1
        fd = memory_file(data)
        transit = Transit(fd, 0, len(data), entry.size, entry.version, entry.mtime_ns)
        self.room.transit.put((attachment.domain, entry.path, entry.version), transit)
        return transit

    # --- for another node ---

    async def take_in(self, attachment: Attachment, request: Lodge) -> bool:
        """Keep an object for its owner, which has no room for it. Whether it is kept; copies give way to it, as they do
        to what this node owns. Raises CacheFull when there is no room here either, PeerError.
        """
        source, path, version = self.room.source, request.path, request.version
        if not isinstance(source, Host) or not source.take_in(attachment, path, version):
            return False
        kept = False
        try:
            kept = await self._take_in(attachment, request, source)
        finally:
            if kept:
                source.take_in(attachment, path, version)  # a reader here may have missed it meanwhile
            else:
                source.turn_away(attachment, path, version)
        self.room.counters.guests += kept
        return kept

    async def _take_in(self, attachment: Attachment, request: Lodge, source: Host) -> bool:
        room, path, version = self.room, request.path, request.version
        need = Need(attachment=request.attachment, path=path, version=version, size=request.size, everywhere=True)
        refs = self.refs(attachment, need)
        if await self._stored(attachment, need, version, refs):
            return True
        with await room.quotas.aside(attachment, request.size):
            # Before its bytes are asked for: a node that is full takes nobody's time.
            reserved = await self.clearing.reserve(request.size, attachment.dataset, None)
            try:
                async with room.in_flight.hold(request.size, BACKGROUND):
                    data = await source.from_owner(attachment, path, version, request.size)
            finally:
                room.capacity.cancel(reserved)
            entry = Entry(path, len(data), 0, version)
            return isinstance(await self._keep(attachment, entry, data, refs), Stored)

    async def close(self) -> None:
        await self.clearing.close()
        await self._flights.close()
        await self.room.turnover.close()


def _size_of(file: str | os.PathLike[str]) -> int:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return -1


def content_hint(attachment: Attachment, version: str) -> str | None:
    """What the origin says about the content itself, None where it says nothing."""
    if attachment.identity.startswith("s3") and _MD5_ETAG.fullmatch(version):
        return f"md5:{version} {attachment.record.tenant}".rstrip()
    return None

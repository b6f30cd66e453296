"""Long work, asked for by a command: list, warm, evict, verify. Each says how far it is, at least once a second.

A job runs inside the request of whoever asked for it: Ctrl-C there cancels it here, and what it did stays done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cachefs import datasets
from cachefs.catalog import Catalog, hold
from cachefs.datasets import DatasetRecord
from cachefs.digest import snapshot_ref, version_ref
from cachefs.errors import CacheFSError, CatalogError, FetcherError
from cachefs.fetcher import superseded
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.index import Known
from cachefs.fetcher.lanes import BACKGROUND
from cachefs.fetcher.objects import Room
from cachefs.messages import (
    PAGE_BYTES,
    Catalogued,
    Done,
    Entry,
    Evict,
    List,
    MakeCatalog,
    Need,
    Page,
    Progress,
    Refresh,
    Reply,
    Request,
    Verify,
    Warm,
    encode,
)

log = logging.getLogger("cachefs.fetcher")

# Objects of a warm-up under way at once: twice the lanes, so that storing one overlaps with fetching the next.
WARM_AT_ONCE = 128

# Failures named in a reply; the rest are counted.
NAMED_FAILURES = 100

# So that a hundred of them stay within a packet of 96 KiB whatever they are called.
NAME_LENGTH, REASON_LENGTH = 400, 300

Send = Callable[[Reply], None]
Fetch = Callable[[Attachment, Need, int], Awaitable[Any]]
Discard = Callable[[str, Known], int]


@dataclass
class _Tally:
    """How far a job is."""

    what: str
    done: int = 0
    total: int = 0
    bytes: int = 0


class _Failures:
    """What failed and why: the first few by name, so that the reply fits into a packet, and how many in all."""

    def __init__(self) -> None:
        self.named: list[tuple[str, str]] = []
        self.total = 0

    def add(self, path: str, reason: str) -> None:
        self.total += 1
        if len(self.named) < NAMED_FAILURES:
            self.named.append((path[-NAME_LENGTH:], reason[:REASON_LENGTH]))


class Jobs:
    def __init__(self, room: Room, fetch: Fetch, discard: Discard) -> None:
        self._room = room
        self._fetch = fetch
        self._discard = discard
        self._listings: Flights[tuple[DatasetRecord, bool]] = Flights()

    async def run(self, request: Request, attachment: Attachment | None, send: Send) -> None:
        """Do what `request` asks and send its replies. Raises CacheFSError."""
        if isinstance(request, Verify):
            await self._verify(request, send)
            return
        assert attachment is not None
        match request:
            case List():
                await self._list(request, attachment, send)
            case MakeCatalog():
                await self._make_catalog(request, attachment, send)
            case Refresh():
                await self._refresh(request, attachment, send)
            case Warm():
                await self._warm(request, attachment, send)
            case Evict():
                await self._evict(request, attachment, send)
            case _:
                raise FetcherError(f"no such work: {type(request).__name__}")

    # --- names ---

    async def _list(self, request: List, attachment: Attachment, send: Send) -> None:
        self._room.counters.origin_requests += 1
        pages = (
            attachment.origin.list_all(request.path)
            if request.recursive
            else attachment.origin.list_level(request.path)
        )
        async for entries in pages:
            for page in _pages([entry for entry in entries if _is_text(entry.path)]):
                send(Page(id=request.id, entries=page, more=True))
        send(Page(id=request.id, entries=[], more=False))

    async def _make_catalog(self, request: MakeCatalog, attachment: Attachment, send: Send) -> None:
        tally = _Tally("objects listed")
        async with _heartbeat(request.id, tally, send):
            record, changed = await self._listings.join(
                attachment.dataset, lambda: self._catalogue(attachment, request.refresh, tally)
            )
        attachment.record = record
        attachment.close()
        attachment.snapshot = record.snapshot
        file = datasets.catalog_file(self._room.config.home, record)
        assert file is not None
        catalog = Catalog.open(file)
        try:
            summary = catalog.summary
        finally:
            catalog.close()
        send(
            Catalogued(
                id=request.id,
                file=str(file),
                snapshot=record.snapshot,
                files=summary.files,
                directories=summary.directories,
                bytes=summary.bytes,
                skipped=summary.skipped,
                changed=changed,
            )
        )

    async def _catalogue(self, attachment: Attachment, refresh: bool, tally: _Tally) -> tuple[DatasetRecord, bool]:
        from cachefs.catalog import listing

        home = self._room.config.home
        record = datasets.load(home, attachment.identity, attachment.record.root) or attachment.record
        previous = self._open_catalog(datasets.catalog_file(home, record))
        if previous is not None and not refresh:
            previous.close()
            return record, False
        folder = home / "catalogs" / record.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

        def progress(objects: int, count: int) -> None:
            tally.done, tally.bytes = objects, count

        try:
            await attachment.origin.check(record.root)  # a wrong address or key is said at once, not after retries
            catalog = await listing.build(
                attachment.origin,
                record.root,
                folder / "new.sqlite",
                previous=previous,
                last_id=_last_id(record, folder) if previous is None else record.last_id,
                progress=progress,
                # A refresh was asked for because something changed just now: what an interrupted one listed before
                # that must not be taken for it.
                resume=previous is None,
            )
            if previous is not None:
                await asyncio.to_thread(superseded.note, home, record.id, previous, catalog)
        finally:
            if previous is not None:
                previous.close()
        snapshot, last_id = catalog.summary.snapshot, catalog.summary.last_id
        catalog.close()
        os.replace(folder / "new.sqlite", folder / f"{snapshot}.sqlite")
        changed = snapshot != record.snapshot
        record = replace(record, snapshot=snapshot, catalog=f"{snapshot}.sqlite", last_id=last_id)
        datasets.save(home, record)
        hold.forget_old(folder, current=record.catalog)
        return record, changed

    def _open_catalog(self, file: Path | None) -> Catalog | None:
        if file is None:
            return None
        try:
            return Catalog.open(file)
        except (CatalogError, OSError) as error:
            log.warning("%s: cannot be used (%s); the dataset is listed again", file, error)
            return None

    async def _refresh(self, request: Refresh, attachment: Attachment, send: Send) -> None:
        record = attachment.record
        if record.catalog:
            raise FetcherError(f"{record.root}: has a catalog; refresh it with MakeCatalog")
        generation = int(record.snapshot[1:]) + 1 if record.snapshot[1:].isdigit() else 1
        record = replace(record, snapshot=f"g{generation}")
        datasets.save(self._room.config.home, record)
        attachment.record, attachment.snapshot = record, record.snapshot
        send(Done(id=request.id))

    # --- bytes ---

    async def _warm(self, request: Warm, attachment: Attachment, send: Send) -> None:
        catalog = attachment.catalog(self._room.config.home)
        if catalog is None and request.paths is None:
            raise FetcherError(f"{attachment.record.root}: has no catalog yet; make one first")
        tally = _Tally("objects", total=len(request.paths) if request.paths is not None else 0)
        if catalog is not None and request.paths is None:
            tally.total = catalog.summary.files
        failures = _Failures()

        async def one(path: str, version: str, size: int) -> None:
            try:
                if not (version and self._room.reader.file(attachment.dataset, version_ref(path, version))):
                    need = Need(attachment=0, path=path, version=version, size=size)
                    await self._fetch(attachment, need, BACKGROUND)
                tally.bytes += max(0, size)
            except CacheFSError as error:
                failures.add(path, str(error))
            tally.done += 1

        async with _heartbeat(request.id, tally, send):
            wanted = iter(self._wanted(catalog, request.paths, failures))
            while batch := list(islice(wanted, WARM_AT_ONCE)):
                async with asyncio.TaskGroup() as group:
                    for item in batch:
                        group.create_task(one(*item))
        send(
            Done(
                id=request.id,
                count=tally.done,
                bytes=tally.bytes,
                failed=failures.named,
                failed_total=failures.total,
            )
        )

    def _wanted(
        self, catalog: Catalog | None, paths: list[str] | None, failures: _Failures
    ) -> Iterator[tuple[str, str, int]]:
        if paths is None:
            assert catalog is not None
            for path, row in catalog.files():
                yield path, row.version, row.size
            return
        for path in paths:
            if catalog is None:
                yield path, "", -1
                continue
            entry = catalog.find(path)
            if entry is None or entry.directory:
                failures.add(path, "the dataset has no such file")
            else:
                yield path, entry.version, entry.size

    async def _evict(self, request: Evict, attachment: Attachment, send: Send) -> None:
        tally = _Tally("objects")
        self._room.index.flush()
        async with _heartbeat(request.id, tally, send):
            await self._in_thread(self._evict_below(attachment, request.path), tally)
        send(Done(id=request.id, count=tally.done, bytes=tally.bytes))

    def _evict_below(self, attachment: Attachment, path: str) -> Iterator[int]:
        """Drops refs one by one; yields the bytes each gave back."""
        room = self._room
        records = [r for r in datasets.load_all(room.config.home) if r.identity == attachment.identity]
        whole = [r for r in records if not path or r.root == path or r.root.startswith(path + "/")]
        for record in whole:
            for ref in room.store.refs(record.id):
                yield room.store.unlink_ref(record.id, ref)
        others = [r for r in records if r not in whole and r.covers(path)]
        for known in room.index.records():
            if path and known.path != path and not known.path.startswith(path + "/"):
                continue
            if not known.key:
                yield self._discard(attachment.identity, known)
            for record in others:
                freed = room.store.unlink_ref(record.id, version_ref(known.path, known.version))
                yield freed + room.store.unlink_ref(record.id, snapshot_ref(known.path, record.snapshot))

    async def _verify(self, request: Verify, send: Send) -> None:
        room = self._room
        tally = _Tally("blobs")
        damaged = _Failures()
        room.index.flush()
        names = {known.key: known.path for known in await asyncio.to_thread(lambda: list(room.index.records()))}
        async with _heartbeat(request.id, tally, send):
            keys = room.store.keys()
            while batch := await asyncio.to_thread(lambda: list(islice(keys, 64))):
                for key in batch:
                    size = await asyncio.to_thread(self._check, key)
                    if size is None:
                        damaged.add(names.get(key, key.hex()), "does not match its digest: dropped")
                        room.counters.damaged += 1
                    tally.done += 1
                    tally.bytes += size or 0
        send(
            Done(
                id=request.id,
                count=tally.done,
                bytes=tally.bytes,
                failed=damaged.named,
                failed_total=damaged.total,
            )
        )

    def _check(self, key: bytes) -> int | None:
        """Bytes of an intact blob; None when it was damaged and has been dropped."""
        if self._room.store.check(key):
            try:
                return os.stat(self._room.store.path(key)).st_size
            except FileNotFoundError:
                return 0  # evicted meanwhile
        self._room.capacity.free(self._room.store.drop(key))
        return None

    async def _in_thread(self, freed: Iterable[int], tally: _Tally) -> None:
        """Run a generator of freed byte counts in a thread, a slice at a time, so that it can be cancelled."""
        steps = iter(freed)
        while batch := await asyncio.to_thread(lambda: list(islice(steps, 256))):
            tally.done += sum(1 for count in batch if count)
            tally.bytes += sum(batch)
            self._room.capacity.free(sum(batch))


@asynccontextmanager
async def _heartbeat(id: int, tally: _Tally, send: Send) -> AsyncIterator[None]:
    """Tell the one who asked how far the work is, as long as the block runs."""

    async def beat() -> None:
        while True:
            send(Progress(id=id, done=tally.done, total=tally.total, bytes=tally.bytes, what=tally.what))
            await asyncio.sleep(0.2)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


def _last_id(record: DatasetRecord, folder: Path) -> int:
    """Where inode numbers go on though no catalog can be read that says it; `folder` is where catalogs are.

    A mount may still serve the one that is lost, and in the kernel a number must not come to mean something else.
    """
    if record.last_id or not (record.catalog or any(folder.glob("*.sqlite"))):
        return record.last_id
    # The record is of an older version, or was lost too. More than were ever given away: a million for each second.
    return int(time.time()) << 20


def _is_text(path: str) -> bool:
    """False for a local name that is not UTF-8: it cannot travel. A catalog reports such names as skipped."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pages(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Cut entries into pages that fit into one packet."""
    page: list[Entry] = []
    size = 0
    for entry in entries:
        count = len(encode(entry))
        if page and size + count > PAGE_BYTES:
            yield page
            page, size = [], 0
        page.append(entry)
        size += count
    if page:
        yield page

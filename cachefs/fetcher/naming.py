"""Which names there are: an origin is listed for a reader, or into the catalog of a dataset."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cachefs import datasets
from cachefs.catalog import Catalog, hold
from cachefs.datasets import DatasetRecord
from cachefs.errors import CatalogError, FetcherError
from cachefs.fetcher import superseded
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.objects import Room
from cachefs.fetcher.tally import Send, Tally, heartbeat
from cachefs.messages import PAGE_BYTES, Catalogued, Done, Entry, List, MakeCatalog, Page, Refresh, encode

log = logging.getLogger("cachefs.fetcher")


class Naming:
    def __init__(self, room: Room) -> None:
        self._room = room
        self._listings: Flights[tuple[DatasetRecord, bool]] = Flights()

    async def list(self, request: List, attachment: Attachment, send: Send) -> None:
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

    async def make_catalog(self, request: MakeCatalog, attachment: Attachment, send: Send) -> None:
        tally = Tally("objects listed")
        async with heartbeat(request.id, tally, send):
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

    async def _catalogue(self, attachment: Attachment, refresh: bool, tally: Tally) -> tuple[DatasetRecord, bool]:
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
        record = datasets.update(home, record, snapshot=snapshot, catalog=f"{snapshot}.sqlite", last_id=last_id)
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

    async def refresh(self, request: Refresh, attachment: Attachment, send: Send) -> None:
        record = attachment.record
        if record.catalog:
            raise FetcherError(f"{record.root}: has a catalog; refresh it with MakeCatalog")
        generation = int(record.snapshot[1:]) + 1 if record.snapshot[1:].isdigit() else 1
        record = datasets.update(self._room.config.home, record, snapshot=f"g{generation}")
        attachment.record, attachment.snapshot = record, record.snapshot
        send(Done(id=request.id))


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

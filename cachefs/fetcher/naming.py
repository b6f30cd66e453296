"""Which names there are: an origin is listed for a reader, or into the catalog of a dataset."""

from __future__ import annotations

from collections.abc import Iterator

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.errors import FetcherError
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.cataloguing import Cataloguing, Made
from cachefs.fetcher.room import Room
from cachefs.fetcher.tally import Send, Tally, heartbeat
from cachefs.messages import (
    PAGE_BYTES,
    Adopt,
    Catalogued,
    Done,
    Entry,
    Follow,
    List,
    MakeCatalog,
    Page,
    Refresh,
    TakeCatalog,
    encode,
)

# Of nodes that do not serve a new catalog so many are named: their names and reasons stay within a packet.
MOST_BEHIND = 64


class Naming:
    def __init__(self, room: Room) -> None:
        self._room = room
        self._cataloguing = Cataloguing(room)

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
            made = await self._cataloguing.catalogue(attachment, request.refresh, tally)
        self._serve(made, attachment)
        self._say(request.id, made, send)

    async def take_catalog(self, request: TakeCatalog, attachment: Attachment, send: Send) -> None:
        """Raises ConfigError, CacheError."""
        tally = Tally("nodes have it")
        async with heartbeat(request.id, tally, send):
            follows = request.previous, request.last_id
            made = await self._cataloguing.take(attachment, request.file, follows, tally)
        self._serve(made, attachment)
        self._say(request.id, made, send)

    @staticmethod
    def _serve(made: Made, attachment: Attachment) -> None:
        """The reader that asked serves the new catalog from now on."""
        attachment.record = made.record
        attachment.close()
        attachment.snapshot = made.record.snapshot

    async def adopt(self, request: Adopt, send: Send) -> None:
        """Raises PeerError, CacheError, FetcherError."""
        from cachefs.cluster.peers.catalogs import checked_edition

        tally = Tally("blocks of names")
        async with heartbeat(request.id, tally, send):
            edition = checked_edition(request.edition, request.snapshot, request.size, request.key, request.keys)
            made = await self._cataloguing.adopt(request.node, request.dataset, edition, request.switch, tally)
        self._say(request.id, made, send)

    async def follow(self, request: Follow, send: Send) -> None:
        """Raises PeerError, CacheError."""
        tally = Tally("blocks of names")
        async with heartbeat(request.id, tally, send):
            made = await self._cataloguing.follow(request.dataset, tally)
        self._say(request.id, made, send)

    def _say(self, id: int, made: Made | None, send: Send) -> None:
        if made is None:
            send(Done(id=id))
            return
        record = made.record
        file = datasets.catalog_file(self._room.config.home, record)
        assert file is not None
        with Catalog.open(file) as catalog:
            summary = catalog.summary
        send(
            Catalogued(
                id=id,
                file=str(file),
                snapshot=record.snapshot,
                files=summary.files,
                directories=summary.directories,
                bytes=summary.bytes,
                skipped=summary.skipped,
                changed=made.changed,
                edition=record.edition,
                behind=list(made.behind[:MOST_BEHIND]),
                behind_total=made.behind_total,
            )
        )

    async def close(self) -> None:
        await self._cataloguing.close()

    async def refresh(self, request: Refresh, attachment: Attachment, send: Send) -> None:
        record = attachment.record
        if record.catalog:
            raise FetcherError(f"{record.root}: has a catalog; refresh it with MakeCatalog")
        generation = int(record.snapshot[1:]) + 1 if record.snapshot[1:].isdigit() else 1
        record = datasets.update(self._room.config.home, record, snapshot=f"g{generation}")
        attachment.record, attachment.snapshot = record, record.snapshot
        send(Done(id=request.id))


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

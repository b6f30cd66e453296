"""Long work on what is stored: warm, evict, verify. Each does what is left, so an interrupted one is run again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.digest import snapshot_ref, version_ref
from cachefs.errors import CacheFSError, ConfigError, FetcherError
from cachefs.fetcher.attachments import Attachment, domain_of
from cachefs.fetcher.index import Known
from cachefs.fetcher.lanes import BACKGROUND
from cachefs.fetcher.room import Room
from cachefs.fetcher.tally import Failures, Send, Tally, heartbeat
from cachefs.messages import Done, Evict, Need, Verify, Warm

# Objects of a warm-up under way at once: twice the lanes, so that storing one overlaps with fetching the next.
WARM_AT_ONCE = 128

Fetch = Callable[[Attachment, Need, int], Awaitable[Any]]
Discard = Callable[[str, Known], int]


class Chores:
    def __init__(self, room: Room, fetch: Fetch, discard: Discard) -> None:
        self._room = room
        self._fetch = fetch
        self._discard = discard

    async def warm(self, request: Warm, attachment: Attachment, send: Send) -> None:
        catalog = attachment.catalog(self._room.config.home)
        named = request.versions if request.versions is not None else request.paths
        if catalog is None and named is None:
            raise FetcherError(f"{attachment.record.root}: has no catalog yet; make one first")
        tally = Tally("objects", total=len(named) if named is not None else 0)
        if catalog is not None and named is None:
            tally.total = catalog.summary.files
        failures = Failures()

        async def one(path: str, version: str, size: int) -> None:
            try:
                if not (version and self._room.reader.file(attachment.dataset, version_ref(path, version))):
                    need = Need(attachment=0, path=path, version=version, size=size)
                    await self._fetch(attachment, need, BACKGROUND)
                tally.bytes += max(0, size)
            except CacheFSError as error:
                failures.add(path, str(error))
            tally.done += 1

        async with heartbeat(request.id, tally, send):
            versions = request.versions
            wanted = iter(self._wanted(catalog, request.paths, failures) if versions is None else versions)
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
        self, catalog: Catalog | None, paths: list[str] | None, failures: Failures
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

    async def evict(self, request: Evict, attachment: Attachment, send: Send) -> None:
        if not request.force:
            self._refuse_pinned(attachment, request.path)
        tally = Tally("objects")
        self._room.index.flush()
        async with heartbeat(request.id, tally, send):
            # Else what goes now may have been counted just before, and would stay in the count.
            await self._room.scanned.wait()
            await self._in_thread(self._evict_below(attachment, request.path), tally)
        self._room.turnover.forget()
        send(Done(id=request.id, count=tally.done, bytes=tally.bytes))

    def _refuse_pinned(self, attachment: Attachment, path: str) -> None:
        """Raises ConfigError when anything of a pinned dataset would go."""
        for record in datasets.load_all(self._room.config.home):
            below = not path or record.root == path or record.root.startswith(path + "/")
            if record.pinned and record.identity == attachment.identity and (below or record.covers(path)):
                raise ConfigError(
                    f"{record.root or record.url}: is pinned, so nothing was dropped; `cachefs unpin` it first, "
                    "or say --force"
                )

    def _evict_below(self, attachment: Attachment, path: str) -> Iterator[int]:
        """Drops refs one by one; yields the bytes each gave back."""
        room = self._room
        records = [r for r in datasets.load_all(room.config.home) if r.identity == attachment.identity]
        whole = [r for r in records if not path or r.root == path or r.root.startswith(path + "/")]
        for record in whole:
            for ref in room.store.refs(record.id):
                yield room.store.unlink_ref(record.id, ref)
        domains = {r.id: domain_of(r) for r in records}
        others = [r for r in records if r not in whole and r.covers(path)]
        for known in room.index.records():
            if path and known.path != path and not known.path.startswith(path + "/"):
                continue
            if not known.key:
                domain = domains.get(known.dataset, attachment.domain)
                yield self._discard(domain, known)
            for record in others:
                freed = room.store.unlink_ref(record.id, version_ref(known.path, known.version))
                yield freed + room.store.unlink_ref(record.id, snapshot_ref(known.path, record.snapshot))

    async def verify(self, request: Verify, send: Send) -> None:
        room = self._room
        tally = Tally("blobs")
        damaged = Failures()
        room.index.flush()
        names = {known.key: known.path for known in await asyncio.to_thread(lambda: list(room.index.records()))}
        async with heartbeat(request.id, tally, send):
            await self._room.scanned.wait()
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

    async def _in_thread(self, freed: Iterable[int], tally: Tally) -> None:
        """Run a generator of freed byte counts in a thread, a slice at a time, so that it can be cancelled."""
        steps = iter(freed)
        while batch := await asyncio.to_thread(lambda: list(islice(steps, 256))):
            tally.done += sum(1 for count in batch if count)
            tally.bytes += sum(batch)
            self._room.capacity.free(sum(batch))

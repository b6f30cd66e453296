"""How much of the disk a dataset, and all datasets of a tenant, may take: asked before the cache itself is.

What would exceed a quota is not stored: it streams through, as in a cache that is full, and nothing of others is
evicted for it. What is set aside here is charged to the dataset's book (store/ledger.py) by the time it is given back,
so a quota is exceeded at no moment: not by writing, and not by linking what another dataset has stored.

Only datasets that a quota bounds have a book; for the others all this is one look into a dictionary.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cachefs import datasets, tenants
from cachefs.datasets import DatasetRecord
from cachefs.errors import CacheFull
from cachefs.fetcher import superseded
from cachefs.fetcher.attachments import Attachment
from cachefs.store import Store
from cachefs.store.ledger import Book, charge

log = logging.getLogger("cachefs.fetcher")

# A dataset that got a quota, or outlived a crash, is counted, 3 s per million refs; a reader waits this long before its
# object streams through instead.
COUNT_PATIENCE = 1.0

# Before a dataset is counted that had no quota, what is on its way into the store has to arrive.
ARRIVAL_SECONDS = 10.0


@dataclass
class _Bound:
    """A dataset with a quota, its own or its tenant's. quota: its own. reserved: set aside, and not charged yet."""

    dataset: str
    tenant: str
    quota: int | None
    book: Book
    reserved: int = 0
    counted: asyncio.Event = field(default_factory=asyncio.Event)
    counting: asyncio.Task[None] | None = None

    @property
    def taken(self) -> int:
        return self.book.used + self.reserved


class _Aside:
    __slots__ = ("_bound", "_count")

    def __init__(self, bound: _Bound, count: int) -> None:
        self._bound = bound
        self._count = count
        bound.reserved += count

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bound.reserved -= self._count


class _Unbound:
    """What no quota bounds. inside: how much of it is on its way into the store. empty: set when nothing is."""

    __slots__ = ("empty", "inside")

    def __init__(self) -> None:
        self.inside = 0
        self.empty: asyncio.Event | None = None

    def __enter__(self) -> None:
        self.inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside -= 1
        if self.empty is not None and not self.inside:
            self.empty.set()


class Quotas:
    """Every quota of one cache. Used on the fetcher's loop; `trim` in a thread."""

    def __init__(self, home: Path, store: Store) -> None:
        self._home = home
        self._store = store
        self._of_tenants = tenants.quotas(home)
        self._bounds: dict[str, _Bound] = {}
        self._unbound = _Unbound()
        if store.live:  # else another process has this cache
            for record in datasets.load_all(home):
                if self._is_bounded(record):
                    self._take_up(self._bind(record))

    # --- asked before anything is stored ---

    async def aside(self, attachment: Attachment, size: int, dataset: str = "") -> AbstractContextManager[None]:
        """Room for `size` bytes of content, until the block ends. Raises CacheFull.

        dataset: which is charged, if not the attachment's.
        """
        dataset = dataset or attachment.dataset
        bound = self._bounds.get(dataset)
        if bound is None:
            new = attachment.record.tenant in self._of_tenants and dataset == attachment.dataset
            if not new or not self._store.live:
                return self._unbound
            bound = self._bind(attachment.record)  # has stored nothing yet, or it would be known
            self._begin_count(bound)
        if not bound.counted.is_set():
            try:
                async with asyncio.timeout(COUNT_PATIENCE):
                    await bound.counted.wait()
            except TimeoutError:
                raise CacheFull("what its dataset takes is still being counted") from None
        if charge(size) > self._left(bound):
            raise CacheFull("its dataset, or the tenant, has reached its quota")
        return _Aside(bound, charge(size))

    async def link(self, attachment: Attachment, key: bytes, refs: Iterable[tuple[str, str]]) -> bool:
        """Make refs of the attachment's dataset name a blob; without room in a quota it is served, but not linked.

        False: there is no such blob. Raises CacheError.
        """
        try:
            with await self._aside_link(attachment, key):
                return await asyncio.to_thread(self._store.link, key, refs)
        except CacheFull:
            return self._store.has(key)

    async def _aside_link(self, attachment: Attachment, key: bytes) -> AbstractContextManager[None]:
        bound = self._bounds.get(attachment.dataset)
        if bound is None and attachment.record.tenant not in self._of_tenants:
            return self._unbound
        file = str(self._store.path(key))
        try:
            info = os.stat(file)
        except OSError:
            return self._unbound  # evicted just now, and not linked then
        if bound is not None and self._store.holds(bound.book, file, info):
            return self._unbound
        return await self.aside(attachment, info.st_size)

    def _left(self, bound: _Bound) -> int:
        """Bytes that the dataset may still take."""
        left = [] if bound.quota is None else [bound.quota - bound.taken]
        if bound.tenant in self._of_tenants:
            left.append(self._of_tenants[bound.tenant] - self._taken_by(bound.tenant))
        return min(left)

    def _taken_by(self, tenant: str) -> int:
        return sum(each.taken for each in list(self._bounds.values()) if each.tenant == tenant)

    # --- which datasets are bounded ---

    async def reload(self) -> None:
        """Take up what the records say by now; returns when all that have a quota are counted."""
        if not self._store.live:
            return
        self._of_tenants = tenants.quotas(self._home)
        if await self._rebind():
            await self._arrivals()
            await self._rebind()  # something of a dataset that was not known may have been among them
        for bound in list(self._bounds.values()):
            if not bound.counted.is_set():
                await asyncio.shield(self._begin_count(bound))

    async def _rebind(self) -> bool:
        """Whether there are new ones."""
        records = {r.id: r for r in await asyncio.to_thread(lambda: list(datasets.load_all(self._home)))}
        for dataset, bound in list(self._bounds.items()):
            record = records.get(dataset)
            if record is not None:
                bound.quota, bound.tenant = record.quota, record.tenant
            if bound.quota is None and bound.tenant not in self._of_tenants:
                del self._bounds[dataset]
                self._store.ledger.close(dataset)
        new = [r for r in records.values() if self._is_bounded(r) and r.id not in self._bounds]
        for record in new:
            self._bind(record)
        return bool(new)

    async def _arrivals(self) -> None:
        """Wait for what was let in before there was a quota."""
        before, self._unbound = self._unbound, _Unbound()
        if before.inside:
            before.empty = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ARRIVAL_SECONDS):
                    await before.empty.wait()

    def _is_bounded(self, record: DatasetRecord) -> bool:
        return record.quota is not None or record.tenant in self._of_tenants

    def _bind(self, record: DatasetRecord) -> _Bound:
        book = self._store.ledger.open(record.id)
        bound = self._bounds[record.id] = _Bound(record.id, record.tenant, record.quota, book)
        return bound

    def _begin_count(self, bound: _Bound) -> asyncio.Task[None]:
        if bound.counting is None:
            bound.counting = asyncio.create_task(self._count(bound))
        return bound.counting

    async def _count(self, bound: _Bound) -> None:
        try:
            await asyncio.to_thread(self._store.open_book, bound.dataset)
        except OSError as error:
            log.warning("what dataset %s takes cannot be counted (%s): it is not stored", bound.dataset, error)
        else:
            bound.counted.set()

    # --- what is too much ---

    def too_much(self) -> list[tuple[list[str], Callable[[], int]]]:
        """What exceeds a quota: datasets, in the order in which they should give room, and how much they must yet."""
        found: list[tuple[list[str], Callable[[], int]]] = []
        for bound in self._bounds.values():
            if bound.quota is not None:
                found.append(([bound.dataset], lambda bound=bound: bound.taken - (bound.quota or 0)))  # type: ignore[misc]
        for tenant, quota in self._of_tenants.items():
            own = [each.dataset for each in self._bounds.values() if each.tenant == tenant]
            own.sort(key=lambda dataset: datasets.last_use(self._home, dataset))
            found.append((own, lambda tenant=tenant, quota=quota: self._taken_by(tenant) - quota))  # type: ignore[misc]
        return [(own, excess) for own, excess in found if excess() > 0]

    def trim(self, own: Iterable[str], excess: Callable[[], int], discard: Callable[[str], int]) -> Iterator[int]:
        """Drop objects of these datasets, but not of pinned ones, until nothing is too much. Bytes freed, each.

        First what a refresh has replaced, incomplete objects last. discard: drops one of those, by its name.
        """
        pinned = datasets.pinned(self._home)
        for dataset in own:
            if dataset not in pinned:
                yield from self._trim(dataset, excess, discard)

    def _trim(self, dataset: str, excess: Callable[[], int], discard: Callable[[str], int]) -> Iterator[int]:
        book = self._bounds[dataset].book
        others = {record.id for record in datasets.load_all(self._home)} - {dataset}
        replaced = ((name, part) for _, name, part in superseded.take(self._home, kept=others))
        stored = ((ref, False) for ref in self._store.refs(dataset))
        for source in (replaced, stored):
            for name, incomplete in source:
                if excess() <= 0:
                    return
                before = book.used
                freed = discard(name) if incomplete else self._store.unlink_ref(dataset, name)
                if book.used < before:
                    yield freed
        for name in self._store.parts_of(dataset):
            if excess() <= 0:
                return
            yield discard(name)

    # --- at the beginning and the end ---

    def _take_up(self, bound: _Bound) -> None:
        """What the last fetcher left; after a crash nothing, and `reload` counts."""
        file = self._file(bound.dataset)
        with contextlib.suppress(OSError):
            data = file.read_bytes()
            file.unlink()  # once: what changes from now on is not in it
            if bound.book.load(data, self._store.directories.live):
                bound.counted.set()

    async def close(self) -> None:
        counting = [each.counting for each in self._bounds.values() if each.counting is not None]
        await asyncio.gather(*counting, return_exceptions=True)

    def leave(self) -> None:
        """Write the books down for the next fetcher. Nothing may change any more."""
        for bound in self._bounds.values():
            if bound.counted.is_set():
                file = self._file(bound.dataset)
                try:
                    file.parent.mkdir(mode=0o700, exist_ok=True)
                    file.write_bytes(bound.book.dump(self._store.directories.live))
                except OSError as error:
                    log.warning("%s: cannot be written (%s); its dataset is counted at the next start", file, error)

    def _file(self, dataset: str) -> Path:
        return self._home / "run" / "charged" / dataset

    def used(self, dataset: str, tenant: str) -> int | None:
        """Bytes charged to a dataset, or to a tenant; None = no quota bounds it."""
        if dataset:
            return self._bounds[dataset].book.used if dataset in self._bounds else None
        return sum(each.book.used for each in self._bounds.values() if each.tenant == tenant)

    def report(self) -> dict[str, object]:
        """used: None while it is being counted."""
        return {
            "datasets": {
                each.dataset: each.book.used if each.counted.is_set() else None for each in self._bounds.values()
            },
            "tenants": {
                name: {"quota": quota, "used": self.used("", name)} for name, quota in self._of_tenants.items()
            },
        }

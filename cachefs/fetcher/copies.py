"""Which copies of what other nodes of the cluster keep this node has, and which of them it can do without best.

A copy saves a transfer when this node reads the object next. So what this node's consumers have announced (`Plans`)
says what it is worth: the one that is read last goes first, and before it one that no plan names. It is found as Redis
finds what was used least lately: of a handful that were noted, looked up anew at each decision, so that nothing has to
follow as plans come, go on and end. Without plans the copy that was noted first goes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cachefs import datasets
from cachefs.datasets import DatasetRecord
from cachefs.digest import snapshot_ref, version_ref
from cachefs.fetcher.attachments import Attachment, domain_of, part_name
from cachefs.fetcher.capacity import allocated
from cachefs.fetcher.index import Known

if TYPE_CHECKING:
    from cachefs.fetcher.room import Room

log = logging.getLogger("cachefs.fetcher")

# Copies are noted as they come. What was a copy before this process began, or became one as nodes came and went, is
# found by reading the whole index, some 20 us per object: when none are noted, and not more often than once in so many
# seconds, or a hundred times as long as it took: a node whose cache is full of what counts on it must not read its
# index for every miss.
NOTED = 65536
FRUITLESS_SECONDS = 60.0
FRUITLESS_TIMES = 100.0

# The worst of so many is among the worst ninth of all, on average. More save hardly more (simulated), and a look takes
# 5 to 8 us per consumer of the dataset.
SAMPLE = 8

# The next use of what no plan names.
NEVER = math.inf


class Plans(Protocol):
    """What this node's consumers have said they will read. Answers are seconds from now, or items where no pace is
    known: any two are to be compared at once. NEVER: in no plan."""

    def next_use(self, dataset: str, path: str) -> float:
        """When an object that is stored is read."""
        ...

    def used_again(self, dataset: str, path: str) -> float:
        """When an object that is just being fetched is read after the read that it is fetched for."""
        ...


class NoPlans:
    """Nobody has said anything."""

    def next_use(self, dataset: str, path: str) -> float:
        return NEVER

    used_again = next_use


class Copy(NamedTuple):
    """An object that is stored here and counts, or counted, on another node. size: of all of it, in bytes. domain: of
    it, where not all is here."""

    dataset: str
    identity: str
    snapshot: str
    path: str
    version: str
    size: int
    domain: str | None = None

    @property
    def refs(self) -> tuple[str, str]:
        return version_ref(self.path, self.version), snapshot_ref(self.path, self.snapshot)


class Copies:
    """One per fetcher. Notes may come from a thread; all else belongs to the fetcher's loop."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._noted: deque[Copy] = deque()
        self._owners: object = None  # when the index was read last
        self._again = 0.0  # when it is worth reading
        self._began = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._closing = False

    async def close(self) -> None:
        self._closing = True
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    def came(self, attachment: Attachment, known: Known) -> None:
        """A copy was stored, or the first block of one."""
        if len(self._noted) < NOTED:
            self._noted.append(_copy(attachment.record, attachment.snapshot, known))
        else:
            self._again = 0.0

    # --- which is worth least ---

    def take(self, need: int, after: float, here: Callable[[Copy], bool] | None = None) -> list[Copy]:
        """Out of the notes: those that are read last, all later than `after`, until they have `need` bytes together or
        no more are found. here: of these only."""
        taken: list[Copy] = []
        size = 0
        while size < need and (copy := self._last_used(after, here)) is not None:
            taken.append(copy)
            size += allocated(copy.size)
        return taken

    def put_back(self, copies: Iterable[Copy]) -> None:
        """They are not dropped after all."""
        self._noted.extend(copies)

    def _last_used(self, after: float, here: Callable[[Copy], bool] | None) -> Copy | None:
        last: Copy | None = None
        for _ in range(min(SAMPLE, len(self._noted))):
            copy = self._noted.popleft()
            use = self._room.plans.next_use(copy.dataset, copy.path)
            if use <= after or (here is not None and not here(copy)):
                self._noted.append(copy)  # behind all others, so that each is looked at in its turn
                continue
            if last is not None:
                self._noted.append(last)
            last, after = copy, use
            if use == NEVER:
                break
        return last

    # --- those that nobody noted ---

    async def look(self, patience: float) -> None:
        """Have the index read for them if none are noted; wait for it so many seconds."""
        room = self._room
        if self._noted or room.source is room.origin:
            return
        now = time.monotonic()
        if room.source.owners is not self._owners:
            self._owners, self._again = room.source.owners, 0.0
        if self._reading is None and now >= self._again and not self._closing:
            room.index.flush()
            self._began = now
            self._reading = asyncio.get_running_loop().create_task(asyncio.to_thread(self._read_index))
            self._reading.add_done_callback(self._read)
        if self._reading is not None and (left := self._began + patience - now) > 0:
            await asyncio.wait((self._reading,), timeout=left)

    def _read_index(self) -> None:
        room = self._room
        records = {r.id: r for r in datasets.load_all(room.config.home) if not r.pinned}
        for known in room.index.records():
            record = records.get(known.dataset)
            # What was evicted before is known still.
            if (
                record is not None
                and not room.source.counts_on_us(record.identity, known.path, known.version)
                and self._is_stored(record, known)
            ):
                self._noted.append(_copy(record, record.snapshot, known))
            if self._closing or len(self._noted) >= NOTED:
                return

    def _is_stored(self, record: DatasetRecord, known: Known) -> bool:
        if known.key:
            return self._room.store.has(known.key)
        return self._room.store.has_part(part_name(domain_of(record), known.path, known.version))

    def _read(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if not reading.cancelled() and (error := reading.exception()) is not None:
            log.error("the index cannot be searched for copies", exc_info=error)
        now = time.monotonic()
        pause = max(FRUITLESS_SECONDS, FRUITLESS_TIMES * (now - self._began))
        self._again = now if len(self._noted) >= NOTED else now + pause


def _copy(record: DatasetRecord, snapshot: str, known: Known) -> Copy:
    domain = None if known.key else domain_of(record)
    return Copy(record.id, record.identity, snapshot, known.path, known.version, known.size, domain)

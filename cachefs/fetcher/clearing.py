"""Room for what is to be stored: set aside where there is some, else made by letting go of what may go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cachefs import datasets
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import CacheFull
from cachefs.fetcher import superseded
from cachefs.fetcher.attachments import Attachment, part_name
from cachefs.fetcher.capacity import allocated
from cachefs.fetcher.copies import NEVER, Copies, Copy
from cachefs.fetcher.index import Known
from cachefs.fetcher.residency import Candidate, victims
from cachefs.fetcher.room import Room

# After a crash the store is counted anew, 3 s per million blobs; a reader waits this long before its object streams
# through instead.
SCAN_PATIENCE = 1.0

# Eviction frees more than the one object that asked, so that the next ones find room without evicting again. Of copies
# less than of idle datasets: those are in use, and it costs a look at each which of them are worth least.
EVICT_AT_LEAST = 64 * 1024 * 1024
COPIES_AT_LEAST = 4 * 1024 * 1024

# Copies that are gone already, or have other names too, give no room: then others are looked for, so many times.
ROUNDS = 4

# Lets go of something that is stored; bytes freed.
LetGo = Callable[[], int]


class Clearing:
    """One per fetcher."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.discard_part: Callable[[str], int] = room.store.discard_part  # of an incomplete object that may be open
        self._evicting = asyncio.Lock()
        self._copies = Copies(room)

    async def close(self) -> None:
        await self._copies.close()

    def came(self, attachment: Attachment, known: Known) -> None:
        """A copy was stored, or the first block of one."""
        self._copies.came(attachment, known)

    async def reserve(self, count: int, dataset: str, file: Path | None, *, copy: bool = False, path: str = "") -> int:
        """Room for `count` bytes of `file` (None: in home), taken from idle datasets if need be. Raises CacheFull.

        copy: another node of the cluster keeps it too. Copies give way to what only this node keeps, and to a copy of
        `path` if they are read later than that is read again.
        """
        room = self._room
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
                    need = allocated(count)
                    freed = await asyncio.to_thread(self._evict, max(need, EVICT_AT_LEAST), dataset)
                    if room.source is not room.origin and freed < need:
                        if not copy:
                            await self._let_copies_go(max(need, COPIES_AT_LEAST) - freed)
                        elif path:
                            await self._let_later_copies_go(need - freed, dataset, path, directory)
                return room.capacity.reserve(count, directory)

    # --- idle datasets ---

    def _evict(self, count: int, wanted_by: str) -> int:
        """Free `count` bytes if there are so many, first of what a refresh has replaced; how many were."""
        freed = 0
        for let_go in self._may_go(wanted_by):
            freed += let_go()
            if freed >= count:
                break
        return self._freed(freed)

    def _may_go(self, wanted_by: str) -> Iterator[LetGo]:
        room = self._room
        pinned = datasets.pinned(room.config.home)
        for dataset, name, incomplete in superseded.take(room.config.home, kept=pinned - {wanted_by}):
            if incomplete:
                yield partial(self.discard_part, name)
            else:
                yield partial(room.store.unlink_ref, dataset, name)
        known = {record.id for record in datasets.load_all(room.config.home)}  # one may have incomplete objects only
        candidates = [
            Candidate(d, datasets.last_use(room.config.home, d), room.attachments.in_use(d), d in pinned)
            for d in known.union(room.store.datasets())
        ]
        for dataset in victims(candidates, wanted_by):
            for ref in room.store.refs(dataset):
                yield partial(room.store.unlink_ref, dataset, ref)
            for name in room.store.parts_of(dataset):
                yield partial(self.discard_part, name)

    def _freed(self, count: int) -> int:
        self._room.counters.evicted_bytes += count
        self._room.capacity.free(count)
        return count

    # --- copies of what other nodes of the cluster keep ---

    async def _let_copies_go(self, need: int) -> None:
        """So many bytes, or all there are, to what only this node keeps."""
        await self._copies.look(SCAN_PATIENCE)  # who comes later streams through
        while need > 0 and (copies := self._copies.take(need, -1.0)):
            need -= await asyncio.to_thread(self._drop, copies)

    async def _let_later_copies_go(self, need: int, dataset: str, path: str, directory: Path) -> None:
        """So many bytes, or none, to a copy that is read again sooner."""
        again = self._room.plans.used_again(dataset, path)
        if again == NEVER:
            return
        await self._copies.look(0.0)
        here = self._small_in(directory)
        for _ in range(ROUNDS):
            copies = self._copies.take(need, again, here)
            if sum(allocated(copy.size) for copy in copies) < need:
                self._copies.put_back(copies)
                return
            need -= await asyncio.to_thread(self._drop, copies)
            if need <= 0:
                return

    def _small_in(self, directory: Path) -> Callable[[Copy], bool]:
        """Where one directory of several is full, copies in the others give no room; and a large one is not let go
        for a small one."""
        alone = len(self._room.config.dirs) == 1

        def small(copy: Copy) -> bool:
            if copy.size > BLOCK_SIZE or alone:
                return copy.size <= BLOCK_SIZE
            files = (self._room.reader.file(copy.dataset, ref) for ref in copy.refs)
            return any(file and Path(file).is_relative_to(directory) for file in files)

        return small

    def _drop(self, copies: Sequence[Copy]) -> int:
        """The bytes that it gave. Which objects other nodes keep is the cluster's to say, and changes."""
        room = self._room
        pinned = datasets.pinned(room.config.home)
        freed = 0
        for copy in copies:
            if copy.dataset in pinned or room.source.counts_on_us(copy.identity, copy.path, copy.version):
                continue
            if copy.domain is not None:
                freed += self.discard_part(part_name(copy.domain, copy.path, copy.version))
            else:
                freed += sum(room.store.unlink_ref(copy.dataset, ref) for ref in copy.refs)
        return self._freed(freed)

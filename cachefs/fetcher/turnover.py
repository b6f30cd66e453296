"""Within a dataset in use: room for an object that was missed, from one that is read less often.

`following` decides, and knows names only. Here they become files: whether one was read (its access time), and which
refs go with it. What the policy knows is what the index has, read when there is no room for the first time since this
process began, and then what is stored and dropped.

Objects in one block only: a large one comes and goes by its blocks. Pinned datasets give nothing, nor do directories on
file systems that keep no access times (noatime): there what came first stays, as if every read came once per epoch.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from cachefs import datasets
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, snapshot_ref, version_ref
from cachefs.errors import CacheError
from cachefs.fetcher.attachments import Attachment, Attachments
from cachefs.fetcher.capacity import ALLOCATION, Capacity, allocated
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.following import Following
from cachefs.fetcher.index import Index, Known
from cachefs.messages import Entry
from cachefs.store import Store, access
from cachefs.store.layout import Places

log = logging.getLogger("cachefs.fetcher")

# Of those that were named, some may be gone already (a refresh replaced them), or be held by other names.
_ROUNDS = 4


class _Followed:
    """One dataset. `following` belongs to whoever holds `asking`; what happens meanwhile waits in `late`."""

    def __init__(self, dataset: str, visited: Callable[[_Followed, bytes], bool]) -> None:
        self.dataset = dataset
        self.following = Following(partial(visited, self))
        self.asking = asyncio.Lock()
        self.late: list[Callable[[], None]] = []
        self.snapshots: set[str] = set()
        self.filling = False
        self.filled = False

    def tell(self, what: Callable[[], None]) -> None:
        self.late.append(what)
        if not self.asking.locked():
            self.catch_up()

    def catch_up(self) -> None:
        for what in self.late:
            what()
        self.late.clear()

    def refs(self, known: Known) -> list[str]:
        """Every ref under which it may be linked: a mount looks by version, a file system by snapshot."""
        return [
            version_ref(known.path, known.version),
            *(snapshot_ref(known.path, snapshot) for snapshot in self.snapshots),
        ]


class Turnover:
    """Owned by the fetcher's loop."""

    def __init__(
        self,
        config: CacheConfig,
        store: Store,
        index: Index,
        capacity: Capacity,
        attachments: Attachments,
        counters: Counters,
    ) -> None:
        self._config = config
        self._store = store
        self._index = index
        self._capacity = capacity
        self._attachments = attachments
        self._counters = counters
        self._followed: dict[str, _Followed] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self.silent: set[str] = {str(path) for path in config.dirs}  # tell nothing; all, until they were tried
        self.tried = False

    def try_directories(self) -> None:
        """Find out which directories tell whether a file is read. May wait for a disk."""
        live = self._store.live
        self.silent -= {str(path) for path in live if access.tells(Places(path).tmp, self._store.seal)}
        for path in self.silent & {str(path) for path in live}:
            log.warning("%s: keeps no access times, so what is stored there does not follow use", path)
        self.tried = True

    # --- what happens ---

    def kept(self, attachment: Attachment, known: Known) -> None:
        """An object in one block is stored, and the index knows it."""
        if followed := self._followed.get(attachment.dataset):
            followed.snapshots.add(attachment.snapshot)
            followed.tell(partial(followed.following.kept, self._name(attachment, known), _blocks(known.size)))

    def lost(self, attachment: Attachment, known: Known) -> None:
        """It was damaged, and dropped."""
        if followed := self._followed.get(attachment.dataset):
            followed.tell(partial(followed.following.removed, self._name(attachment, known)))

    def forget(self) -> None:
        """Much was dropped at once: what is there is looked up anew when it matters again."""
        self._followed.clear()

    async def give_way(self, attachment: Attachment, entry: Entry, size: int) -> bool:
        """An object of `size` bytes was fetched that does not fit. Whether others gave room, most often enough."""
        followed = self._followed.get(attachment.dataset) or self._begin(attachment)
        followed.snapshots.add(attachment.snapshot)
        # A dataset may miss before the directories were tried, which happens beside the first requests: not for good.
        if not (followed.filling or self._closing) and len(self.silent) < len(self._config.dirs):
            followed.filling = True
            self._task(self._fill(followed))
        if not followed.filled or self._closing:
            return False
        # On its own: whoever asked may be cancelled, and a thread that has begun to drop goes on.
        return await asyncio.shield(self._task(self._ask(followed, self._name(attachment, entry), size)))

    async def close(self) -> None:
        self._closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, attachment: Attachment) -> _Followed:
        for dataset in [dataset for dataset in self._followed if not self._attachments.in_use(dataset)]:
            del self._followed[dataset]
        followed = self._followed[attachment.dataset] = _Followed(attachment.dataset, self._visited)
        followed.snapshots |= {attachment.snapshot, attachment.record.snapshot}
        return followed

    def _task(self, work: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _name(self, attachment: Attachment, item: Known | Entry) -> bytes:
        return self._index.name(attachment.domain, item.path, item.version)

    # --- what is there already ---

    async def _fill(self, followed: _Followed) -> bool:
        async with followed.asking:
            self._index.flush()
            await asyncio.to_thread(self._read_index, followed)
            followed.catch_up()
            followed.filled = True
        return True

    def _read_index(self, followed: _Followed) -> None:
        for name, known in self._index.named_records():
            if self._closing:
                return
            if known.dataset == followed.dataset and known.key and known.size <= BLOCK_SIZE:
                refs = followed.refs(known)
                if any(self._inode(followed.dataset, ref) for ref in refs):
                    followed.following.kept(name, _blocks(known.size))

    # --- asking, and dropping ---

    async def _ask(self, followed: _Followed, name: bytes, size: int) -> bool:
        async with followed.asking:
            since = followed.following.missed(name)
            try:
                freed = await asyncio.to_thread(self._replace, followed, name, since, size) if since is not None else 0
            except (CacheError, OSError) as error:
                log.warning("nothing could be dropped (%s)", error)
                freed = 0
            self._counters.evicted_bytes += freed
            self._capacity.free(freed)
            followed.catch_up()
            return freed > 0

    def _replace(self, followed: _Followed, name: bytes, since: int, size: int) -> int:
        """Bytes that were freed. In a thread: every file that is looked at may wait for the disk."""
        if followed.dataset in datasets.pinned(self._config.home):
            return 0
        freed = 0
        for _ in range(_ROUNDS):
            victims = followed.following.place(name, since, _blocks(size))
            for victim in victims:
                given = self._drop(followed, victim)
                freed += given
                self._counters.replaced += given > 0
            if freed >= allocated(size) or not victims:
                break
        return freed

    def _drop(self, followed: _Followed, name: bytes) -> int:
        known = self._index.named(name)
        if known is None:
            return 0
        return sum(self._store.unlink_ref(followed.dataset, ref) for ref in followed.refs(known))

    def _visited(self, followed: _Followed, name: bytes) -> bool:
        """Whether an object was read; so is one whose going would give nothing. False for one that is gone."""
        known = self._index.named(name)
        if known is None:
            return False
        path = str(self._store.path(known.key))
        if any(path.startswith(os.path.join(directory, "")) for directory in self.silent):
            return True
        try:
            seen = access.look(path)
        except FileNotFoundError:
            return False
        if seen.read:
            return True
        own = sum(self._inode(followed.dataset, ref) == seen.inode for ref in followed.refs(known))
        return seen.links > 1 + own  # other objects have the same content, or another dataset has this one

    def _inode(self, dataset: str, ref: str) -> int:
        """0: no such ref."""
        for directory in self._store.live:
            try:
                return os.stat(Places(directory).ref(dataset, ref)).st_ino
            except OSError:
                continue
        return 0


def _blocks(size: int) -> int:
    return max(1, allocated(size) // ALLOCATION)

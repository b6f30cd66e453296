"""The writer's side of a cache: every change to its blobs and refs, and the locks that keep them whole.

Exactly one Store writes a cache, in the process that holds the fetcher's lock; any number of its threads call it.

Which directory: directories.py. A blob may lie elsewhere than its first choice (that was full, or out), so it is
looked for in all live directories, best first: they are few, and a look is one stat.

Which lock: everything that changes the names of a key's blob (publish, link, unlink_ref, drop) holds the lock of
that key, and writing and digesting bytes holds none. So of two threads that put the same content, one publishes
and the other finds it published; a put that races the eviction of the same key comes before it (the new ref then
keeps the blob: st_nlink) or after it (it finds no blob and publishes its own). No thread holds two of these locks.
Readers hold nothing: a hard link keeps content alive whatever happens to its other names.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, KEY_BYTES, TAG_BYTES, digest
from cachefs.errors import CacheError, CacheFull, CacheUnusable
from cachefs.store.blockmap import held_blocks
from cachefs.store.directories import Directories
from cachefs.store.folder import Data, Folder, allocated, allocated_entry, key_of, remove
from cachefs.store.layout import BOOT_ID, NO_SEAL, Link, checked_links, is_blob_name, is_name, seal_ns
from cachefs.store.ledger import Book, Ledger, charge
from cachefs.store.part import Part
from cachefs.store.scrub import check_blob, sweep_folder

# Threads rarely meet on one of 64 locks by chance, and 64 locks cost nothing.
_LOCKS = 64


class Usage(NamedTuple):
    """bytes: allocated on disk, incomplete objects included. blobs: how many complete ones."""

    bytes: int
    blobs: int


class Store:
    """The blobs of one cache. Made by `open`. Methods raise CacheError, and CacheFull where there is no room.

    seal: mtime in ns of what may be served. directories: for the room's own use.
    """

    def __init__(self, config: CacheConfig, seal: int, directories: Directories) -> None:
        self.config = config
        self.seal = seal
        self.directories = directories
        self.ledger = Ledger()
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        self._arrivals: deque[int] = deque()
        self._opening = threading.Lock()  # of _parts, and of opening one
        self._parts: weakref.WeakValueDictionary[str, Part] = weakref.WeakValueDictionary()

    @classmethod
    def open(cls, config: CacheConfig) -> Store:
        """Take possession of the directories of `config`, creating what is missing, and clear what was half written.

        The caller holds the fetcher's lock. Raises CacheUnusable when the home cannot be used, or when any of the
        directories must not be (another cache's, a future format's, not a directory, no hard links). A further
        directory whose disk fails or is not there is left out and listed in `out`.
        """
        seal = seal_ns()
        if seal == NO_SEAL:
            raise CacheUnusable(
                f"{BOOT_ID} cannot be read, and without it a restart of the machine would go unnoticed; mount /proc"
            )
        return cls(config, seal, Directories.claim(config, seal))

    def __repr__(self) -> str:
        return f"Store({', '.join(map(str, self.config.dirs))})"

    @property
    def out(self) -> dict[Path, str]:
        """Directories that are not used, each with the reason. They are tried again at the next start."""
        return self.directories.out

    @property
    def live(self) -> tuple[Path, ...]:
        """Directories that are used."""
        return tuple(folder.places.root for folder in self.directories.live)

    # --- blobs ---

    def put(self, data: Data, *, links: Iterable[Link] = (), tag: bytes = b"") -> bytes:
        """Store content and make the refs `links` name it, complete or not at all. Returns its key: the content key
        (16 bytes), followed by `tag`, a tenant's (digest.tenant_tag).

        A blob that no ref names may be removed by `sweep`. Raises CacheFull without room above the free-space
        floor, CacheError when no directory is left.
        """
        links = checked_links(links)
        view = memoryview(data)
        digests = [digest(view[i : i + BLOCK_SIZE]) for i in range(0, len(view), BLOCK_SIZE)]
        key = key_of(digests, len(view)) + tag
        if self.link_intact(key, links):
            return key
        full: CacheFull | None = None
        for folder in self.directories.ranked(key):
            try:
                with self.directories.guard(folder, "storing a blob"):
                    self.directories.require_room(folder, len(view))
                    if self.publish(folder, folder.write_tmp(key.hex(), view), key, digests, links):
                        self.came(charge(len(view)))
            except CacheFull as error:
                full = error
            except CacheError:
                if folder in self.directories.live:  # no failure of the disk: the next would not fare better
                    raise
            else:
                return key
        raise full or self.directories.nothing_left()

    def link(self, key: bytes, links: Iterable[Link]) -> bool:
        """Make further refs name an existing blob; a ref that named another names this one. False: no such blob.

        Refs are served only while the blob is sealed: `check` a blob from before the last boot first. To link a
        ref again is harmless, and heals one whose blob was replaced.
        """
        links, name = checked_links(links), _name(key)
        folder = self._find(key)
        if folder is None:
            return False
        with self.directories.guard(folder, "linking a blob"):
            with self._lock(key):
                if folder.stat_blob(name) is None:
                    return False
                before = [self.ledger.attach(folder, name, dataset, ref) for dataset, ref in links]
            self._forget_replaced(folder, links, before)
        return True

    def has(self, key: bytes) -> bool:
        """Whether the blob is in a live directory, sealed or not."""
        return self._find(key) is not None

    def sealed(self, key: bytes) -> bool:
        """Whether the blob was published, or checked, since the machine started, and nobody wrote to it since."""
        folder = self._find(key)
        info = folder.stat_blob(key.hex()) if folder is not None else None
        return info is not None and info.st_mtime_ns == self.seal

    def path(self, key: bytes) -> Path:
        """Where the blob is; for one that is nowhere, where it would be looked for first."""
        folder = self._find(key) or next(iter(self.directories.ranked(key)), None)
        if folder is None:
            raise self.directories.nothing_left()
        return Path(folder.places.blob(key.hex()))

    def key_of(self, dataset: str, ref: str) -> bytes | None:
        """Key of the blob that a ref names, for when the index does not know. None: no such ref, or no such blob."""
        checked_links([(dataset, ref)])
        for folder in self.directories.live:
            path = folder.places.ref(dataset, ref)
            with self.directories.tolerant(folder, "reading a ref"):
                name = folder.key_at(path, os.stat(path))
                if name is not None:
                    return bytes.fromhex(name)
        return None

    def unlink_ref(self, dataset: str, ref: str) -> int:
        """Remove a ref, and its blob when no other ref holds it. Bytes freed on disk."""
        checked_links([(dataset, ref)])
        return sum(self._unlink_in(folder, dataset, ref) for folder in self.directories.live)

    def drop(self, key: bytes) -> int:
        """Remove a blob: nobody is served it any more, through whichever ref. Bytes freed on disk.

        As long as refs to it are left, their unlinking frees its bytes and reports them.
        """
        name, freed = _name(key), 0
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "dropping a blob"), self._lock(key):
                info = folder.stat_blob(name)
                if info is not None:
                    freed += folder.remove_blob(name, info)
        return freed

    def check(self, key: bytes) -> bool:
        """Read the blob and compare it with its key. True: intact, and sealed. False: absent, or damaged and unsealed.

        Reads the whole blob, 8 MiB at a time, and holds no lock meanwhile.
        """
        folder = self._find(key)
        if folder is None:
            return False
        with self.directories.guard(folder, "checking a blob"):
            return check_blob(folder, key)

    # --- large objects ---

    def part(self, ref: str, size: int, owner: str = "") -> Part:
        """Open or begin an incomplete object of `size` bytes. One Part per ref: threads that ask at once share it.

        ref: 32 hex digits that name origin, object and version (path and version alone may be two origins').
        owner: the dataset that is charged for it, if it begins now.
        """
        checked_links([(ref, ref)])
        with self._opening:
            part = self._parts.get(ref)
            if part is not None and not part.closed and part.size == size and part.folder in self.directories.live:
                return part
            for folder in self._part_folders(ref, size):
                with self.directories.tolerant(folder, "opening an incomplete object"):
                    part = self._parts[ref] = Part(self, folder, ref, size, owner)
                    return part
        raise self.directories.nothing_left()

    def has_part(self, ref: str) -> bool:
        """Whether there is something of an incomplete object."""
        return any(os.path.exists(folder.places.part(ref)) for folder in self.directories.live)

    def parts(self) -> Iterator[str]:
        """Refs of all incomplete objects."""
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "listing incomplete objects"):
                names = {entry.name.removesuffix(".map") for entry in folder.part_entries()}
                yield from filter(is_name, names)

    def parts_of(self, dataset: str) -> Iterator[str]:
        """Refs of the incomplete objects that a dataset began."""
        for ref in self.parts():
            for folder in self.directories.live:
                if held_blocks(folder.places.map(ref), dataset):
                    yield ref

    def discard_part(self, ref: str) -> int:
        """Remove an incomplete object that nobody has open. Bytes freed on disk."""
        checked_links([(ref, ref)])
        freed = 0
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "removing an incomplete object"):
                freed += self.ledger.remove_part(folder, ref)
        return freed

    # --- what there is ---

    def usage(self) -> Usage:
        """Count by looking at every file."""
        size = blobs = 0
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "counting blobs"):
                for entry in folder.blob_entries():
                    size += allocated_entry(entry)
                    blobs += is_blob_name(entry.name)  # and not .blocks
                size += sum(map(allocated_entry, folder.part_entries()))
        return Usage(size, blobs)

    def arrived(self) -> int:
        """Bytes that putting, linking and completing brought onto the disk since the last call, less what they
        replaced there: nothing for content that was there already. What other methods free they return."""
        total = 0
        with contextlib.suppress(IndexError):
            while True:
                total += self._arrivals.popleft()
        return total

    def keys(self) -> Iterator[bytes]:
        """All blobs, streaming. What comes or goes meanwhile may be among them or not."""
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "listing blobs"):
                for entry in folder.blob_entries():
                    if is_blob_name(entry.name):
                        yield bytes.fromhex(entry.name)

    def refs(self, dataset: str) -> Iterator[str]:
        """Refs of a dataset, streaming, in an order unrelated to paths and use. They may be unlinked meanwhile."""
        checked_links([(dataset, dataset)])
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "listing refs"):
                for entry in folder.ref_entries(dataset):
                    yield entry.name

    def datasets(self) -> Iterator[str]:
        """Datasets that have refs."""
        seen: set[str] = set()
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "listing datasets"):
                for dataset in folder.datasets():
                    if dataset not in seen:
                        seen.add(dataset)
                        yield dataset

    def open_book(self, dataset: str) -> Book:
        """The book of a dataset, which is charged from now on and counted before this returns; see ledger.py."""
        book = self.ledger.open(dataset)
        if not book.counted:
            for lock in self._locks:  # whoever changes a ref without having seen the book has done so after this
                with lock:
                    pass
            book.count(self.directories.live, dataset)
        return book

    def holds(self, book: Book, file: str, info: os.stat_result) -> bool:
        """Whether another ref to the blob at `file` costs the dataset of the book nothing."""
        folder = next((f for f in self.directories.live if file.startswith(f.places.blobs)), None)
        return folder is not None and book.holds(folder, info.st_ino)

    def sweep(self) -> int:
        """Remove what no one can reach: blobs without refs, refs whose blob was dropped, stray files. Bytes freed.

        Looks at every file and ref. To be run now and then, and before `usage` rather than after it: bytes that
        only the refs of a dropped blob hold are not in its count.
        """
        freed = 0
        for folder in self.directories.live:
            with self.directories.tolerant(folder, "sweeping"):
                freed += sweep_folder(folder, self._lock, self.ledger)
        return freed

    # --- for the rest of the room ---

    def came(self, count: int) -> None:
        self._arrivals.append(count)

    def publish(self, folder: Folder, source: str, key: bytes, digests: list[bytes], links: list[Link]) -> bool:
        """Move the sealed file `source` of `folder` to its place, unless another thread was faster; link its refs.
        Whether it was moved: then its bytes came, or had come before.

        Raises OSError, and then `source` is gone and no ref was made.
        """
        name = key.hex()
        attached: list[Link] = []
        before: list[str | None] = []
        with self._lock(key):
            fresh = False
            try:
                info = folder.stat_blob(name)
                if info is not None and info.st_mtime_ns != self.seal:
                    self.came(-folder.remove_blob(name, info))  # damaged since `link_intact` looked
                    info = None
                if info is None:
                    folder.publish(source, name, digests)
                    fresh = True
                else:
                    os.unlink(source)
                for dataset, ref in links:
                    before.append(self.ledger.attach(folder, name, dataset, ref))
                    attached.append((dataset, ref))
            except BaseException:
                # Not at all, then: no bytes stay that the caller believes are not there. The failure above is the
                # one to tell, whatever else fails here.
                with contextlib.suppress(OSError):
                    if fresh:
                        for dataset, ref in attached:
                            self.ledger.unlink(folder, dataset, ref)
                        folder.remove_unheld(name)
                    else:
                        remove(source)
                raise
        if fresh and len(digests) > 1:
            self.came(charge(KEY_BYTES * len(digests)))
        self._forget_replaced(folder, links, before)
        return fresh

    def link_intact(self, key: bytes, links: list[Link]) -> bool:
        """Link to the blob if it is there and may be served; one from before the boot is checked first.

        A damaged one is dropped: the caller has its content in hand.
        """
        folder = self._find(key)
        if folder is None:
            return False
        with self.directories.tolerant(folder, "looking at a blob"):
            info = folder.stat_blob(key.hex())
            if info is not None and (info.st_mtime_ns == self.seal or check_blob(folder, key)):
                return self.link(key, links)
        self.came(-self.drop(key))
        return False

    def _lock(self, key: bytes) -> threading.Lock:
        return self._locks[key[0] % _LOCKS]

    def _find(self, key: bytes) -> Folder | None:
        name = _name(key)
        for folder in self.directories.ranked(key):
            with self.directories.tolerant(folder, "looking for a blob"):
                if folder.stat_blob(name) is not None:
                    return folder
        return None

    def _part_folders(self, ref: str, size: int) -> list[Folder]:
        """Live directories, the one that has this part first, those that have room for it next."""

        def reluctance(folder: Folder) -> tuple[bool, bool]:
            try:
                return not os.path.exists(folder.places.part(ref)), self.directories.room(folder) < size
            except OSError:
                return True, True  # failing: opening a part in it will say so

        return sorted(self.directories.ranked(bytes.fromhex(ref)), key=reluctance)

    def _forget_replaced(self, folder: Folder, links: list[Link], before: list[str | None]) -> None:
        """The blobs that these refs named before: dropped where they are held by no other ref."""
        for old in filter(None, before):
            with self._lock(bytes.fromhex(old)):
                self.came(-folder.remove_unheld(old))
        for other in self.directories.live:
            if other is not folder:
                # A reader that looks between the two finds the old content or the new, in one case neither: a miss.
                for dataset, ref in links:
                    self.came(-self._unlink_in(other, dataset, ref))

    def _unlink_in(self, folder: Folder, dataset: str, ref: str) -> int:
        path = folder.places.ref(dataset, ref)
        with self.directories.tolerant(folder, "unlinking a ref"):
            while True:
                info = os.stat(path)
                name = folder.key_at(path, info)
                if name is None:
                    # A content of its own: its blob was dropped, or had too many links. Should another thread
                    # make it a ref of another blob just now, that ref is unlinked: a miss, and work for `sweep`.
                    with self._locks[0]:  # for `open_book`
                        self.ledger.unlink(folder, dataset, ref)
                    return allocated(info) if info.st_nlink == 1 else 0
                with self._lock(bytes.fromhex(name)):
                    if os.stat(path).st_ino != info.st_ino:
                        continue  # replaced between the look and the lock: look again
                    self.ledger.unlink(folder, dataset, ref)
                    return folder.remove_unheld(name)
        return 0


def _name(key: bytes) -> str:
    if len(key) not in (KEY_BYTES, KEY_BYTES + TAG_BYTES):
        raise CacheError(f"a key has {KEY_BYTES} bytes, or {TAG_BYTES} more for a tenant, not {len(key)}")
    return key.hex()

"""A large object on its way in: blocks arrive in any order, survive restarts, and are served one by one.

Its bytes lie in a sparse file of the object's full length, at their final offsets, so that completing it is a
rename and descriptors that readers were given stay good. What is there is said by a map (blockmap.py).

The file carries the seal (layout.py) like a blob, set again after each block. One that lost it was written to by
somebody else, or its fetcher died between a block and the seal: then every block is compared with its digest anew.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.digest import BLOCK_SIZE, block_count, block_range, digest
from cachefs.errors import CacheError, DamagedBlob
from cachefs.store.blockmap import BlockMap
from cachefs.store.folder import WORKING_MODE, Data, Folder, allocated, discard, key_of, write_all
from cachefs.store.layout import checked_links
from cachefs.store.ledger import charge

if TYPE_CHECKING:
    from cachefs.store.writer import Store


class Part:
    """An incomplete object of `size` bytes. Made by Store.part. Any thread may call it.

    One lock per object, held while bytes are written and digested: 8 MiB take about 3 ms, and a second writer of
    the same block must not mix its bytes into the first one's.
    """

    def __init__(self, store: Store, folder: Folder, ref: str, size: int, owner: str) -> None:
        """owner: the dataset that is charged, if the object is begun by this. Raises OSError."""
        self.ref = ref
        self.size = size
        self.folder = folder
        self.path = Path(folder.places.part(ref))
        self._store = store
        self._lock = threading.Lock()
        self._fd, self._map = _open(store, folder, ref, size, owner)
        self.closed = False
        self._inode = os.fstat(self._fd).st_ino
        self._held = bytearray(found is not None for found in self._map.digests)  # blocks that take room on the disk
        self._held_bytes = sum(self._charge(block) for block, held in enumerate(self._held) if held)

    def __repr__(self) -> str:
        return f"Part({self.ref}, {self.size} bytes)"

    def __del__(self) -> None:
        if hasattr(self, "closed"):  # __init__ may have failed
            self._close_files()

    # --- what is there ---

    def present(self, block: int) -> bool:
        """Whether the block was written; one of an earlier boot may yet turn out damaged: see `checked`."""
        return self._map.digests[block] is not None

    @property
    def complete(self) -> bool:
        """Whether every block is present."""
        return None not in self._map.digests

    @property
    def key(self) -> bytes | None:
        """The content key that it will have, by the digests of its blocks; None when not all are present."""
        digests = [found for found in self._map.digests if found is not None]
        return key_of(digests, self.size) if len(digests) == len(self._map.digests) else None

    @property
    def owner(self) -> str:
        """The dataset that is charged for what is there; "" = nobody knows."""
        return self._map.owner

    @property
    def lost(self) -> bool:
        """Whether somebody removed its file: what is written to it has no name that a reader could open."""
        try:
            return not self.closed and os.fstat(self._fd).st_nlink == 0
        except OSError:  # closed by another thread just now
            return False

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks that are not present."""
        return [block for block, found in enumerate(self._map.digests) if found is None]

    def checked(self, block: int, *, again: bool = False) -> bool:
        """Whether the block may be served. One not written or compared in this boot is read and compared first.

        again: compare in any case (a reader complained). A block that does not match is not present any more.
        """
        with contextlib.suppress(OSError):  # closed meanwhile: said below
            if self._map.fresh[block] and not again and self._sealed():
                return True
        with self._working("checking a block"):
            self._require_seal()
            return self._check(block, again)

    def run(self, start: int, stop: int) -> tuple[int, int]:
        """The largest range of bytes around [start, stop) that may be served now, without reading anything.

        It contains `start` and may end before `stop`; (start, start) when the block of `start` is not `checked`.
        """
        fresh, block = self._map.fresh, start // BLOCK_SIZE
        if not 0 <= start < min(stop, self.size) or not fresh[block]:
            return start, start
        first = fresh.rfind(0, 0, block) + 1
        after = fresh.find(0, block)
        last = (len(fresh) if after < 0 else after) - 1
        return block_range(first, self.size)[0], block_range(last, self.size)[1]

    @property
    def allocated(self) -> int:
        """Bytes that file and map take on disk."""
        with self._working("looking at an incomplete object"):
            return allocated(os.fstat(self._fd)) + allocated(os.fstat(self._map.fd))

    # --- what changes it ---

    def write(self, block: int, data: Data) -> None:
        """Store a block. It is present when this returns; a failure leaves it absent.

        Raises CacheFull, CacheError, and CacheError for data that are not exactly the block's length.
        """
        start, stop = block_range(block, self.size)
        if not 0 <= start < self.size:
            raise CacheError(f"an object of {self.size} bytes has no block {block}")
        if len(data) != stop - start:
            raise CacheError(f"block {block} of {self.size} bytes has {stop - start} bytes, not {len(data)}")
        found = digest(data)
        with self._working("storing a block"):
            self._require_seal()
            if self._map.fresh[block] and self._map.digests[block] == found:
                return
            self._store.directories.require_room(self.folder, len(data))
            self._map.forget(block)  # before its bytes change: see blockmap.py
            try:
                write_all(self._fd, data, start)
            finally:
                self.folder.set_seal(self._fd)
            self._map.record(block, found)
            if not self._held[block]:
                self._held[block] = 1
                self._held_bytes += self._charge(block)
                self._store.came(self._charge(block))
            self._store.ledger.set_part(self.owner, self.folder, self._inode, self._held_bytes)

    def finish(self, links: Iterable[tuple[str, str]] = (), tag: bytes = b"") -> bytes:
        """Make the complete object a blob with these refs; returns its key, as Store.put. The part is closed then.

        Raises DamagedBlob, and stays open, when a block is not there, or is of an earlier boot and does not match
        its digest: `missing` says what to fetch. After CacheFull or CacheError its bytes are gone.
        """
        links = checked_links(links)
        with self._working("completing an object"):
            self._require_seal()
            for block in range(block_count(self.size)):
                if not self._check(block, again=False):
                    raise DamagedBlob(f"{self.path}: block {block} is missing or damaged; it must be fetched again")
            digests = [found for found in self._map.digests if found is not None]
            key = key_of(digests, self.size) + tag
            try:
                if not self._store.link_intact(key, links):
                    self.folder.finish(self._fd, key.hex())
                    self._store.publish(self.folder, str(self.path), key, digests, links)
            finally:
                self._store.came(-self._remove())
        return key

    def discard(self) -> int:
        """Forget the object. Bytes freed on disk (by this process; a reader may hold its descriptor a while)."""
        with self._working("discarding an incomplete object"):
            return self._remove()

    def close(self) -> None:
        """Close its files. They stay on disk, and Store.part opens them again."""
        with self._lock:
            self._close_files()

    # --- the parts of the above, under the lock ---

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[None]:
        with self._store.directories.guard(self.folder, what), self._lock:
            if self.closed:
                raise CacheError(f"{self.path}: was completed or discarded")
            yield

    def _sealed(self) -> bool:
        return os.fstat(self._fd).st_mtime_ns == self.folder.seal

    def _require_seal(self) -> None:
        """Believe no block that was there before, if anybody else wrote to the file. Under the lock, so no write of
        ours is on its way. The seal comes before the comparisons: what is written after it is noticed next time."""
        if not self._sealed():
            self._map.doubt()
            os.ftruncate(self._fd, self.size)
            self.folder.set_seal(self._fd)

    def _check(self, block: int, again: bool) -> bool:
        expected = self._map.digests[block]
        if expected is None:
            return False
        if self._map.fresh[block] and not again:
            return True
        start, stop = block_range(block, self.size)
        if _digest_at(self._fd, start, stop) == expected:
            self._map.record(block, expected)
            return True
        self._map.forget(block)
        return False

    def _remove(self) -> int:
        freed = self._store.ledger.remove_part(self.folder, self.ref, self._inode)
        self._close_files()
        return freed

    def _charge(self, block: int) -> int:
        start, stop = block_range(block, self.size)
        return charge(stop - start)

    def _close_files(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)
            os.close(self._map.fd)


def _digest_at(fd: int, start: int, stop: int) -> bytes | None:
    try:
        return digest(os.pread(fd, stop - start, start))
    except OSError:
        return None  # a bad sector: the block is damaged, and fetched again


def _open(store: Store, folder: Folder, ref: str, size: int, owner: str) -> tuple[int, BlockMap]:
    """Bytes and map of a part: those on disk when they belong together and to an object of this size, else new ones."""
    path, map_path = folder.places.part(ref), folder.places.map(ref)
    with contextlib.ExitStack() as undo:
        try:
            os.chmod(path, WORKING_MODE)  # killed in `finish`, it may be read-only already
            fd = _keep(undo, os.open(path, os.O_RDWR | os.O_CLOEXEC))
            blocks = BlockMap(_keep(undo, os.open(map_path, os.O_RDWR | os.O_CLOEXEC)), size, folder.seal)
            known = os.fstat(fd).st_size == size and blocks.load()
        except FileNotFoundError:
            known = False
        if known:
            undo.pop_all()
            return fd, blocks
    store.came(-store.ledger.remove_part(folder, ref))  # not emptied: a reader may hold the old one
    with contextlib.ExitStack() as undo:
        undo.callback(discard, path)
        undo.callback(discard, map_path)
        fd = _keep(undo, folder.create(path))
        os.ftruncate(fd, size)
        blocks = BlockMap(_keep(undo, folder.create(map_path)), size, folder.seal, owner)
        folder.set_seal(fd)
        blocks.begin()
        store.came(charge(1))  # the map
        undo.pop_all()
        return fd, blocks


def _keep(undo: contextlib.ExitStack, fd: int) -> int:
    undo.callback(os.close, fd)
    return fd

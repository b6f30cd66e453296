"""What a request asks for, as a piece of an open file.

Finding is opening: a ref, or a blob by its key, with the seal that says it may be served (store/layout). The key and
the digests of blocks are what was noted when the content was stored, so nothing is read here, and what rotted on this
disk is found by whoever receives it.
"""

from __future__ import annotations

import os
from binascii import unhexlify
from dataclasses import dataclass
from pathlib import Path

from cachefs.cluster.peers.server.resident import open_resident
from cachefs.cluster.peers.wire import NO_KEY, Item
from cachefs.digest import BLOCK_SIZE, KEY_BYTES, TAG_BYTES, version_ref
from cachefs.store.folder import KEY_XATTR
from cachefs.store.layout import Places, seal_ns
from cachefs.store.reader import Reader


@dataclass(slots=True, eq=False)
class Piece:
    """Bytes of a file, for item `index` of a request. It owns `fd`.

    at, length: where in the file. offset, size: where in the object, and how large that is. digest: of the bytes, None
    where it is not known and must be computed. large: no bytes, the object is to be asked for by block. look: they are
    to be read and compared before they are given.
    """

    index: int
    fd: int
    at: int
    length: int
    offset: int
    size: int
    key: bytes = NO_KEY
    digest: bytes | None = None
    version: str = ""
    large: bool = False
    look: bool = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Blobs:
    """The read side of a cache, for peers. May be used by any thread."""

    def __init__(self, dirs: tuple[Path, ...]) -> None:
        self._reader = Reader(dirs)
        self._places = tuple(Places(d) for d in dirs)
        self._seal = seal_ns()

    def find(self, index: int, item: Item) -> Piece | None:
        """None: it is not here (or may not be served unchecked). Raises OSError when the disk fails."""
        if item.key:
            fd, size = self._by_key(item.key)
        elif item.version and item.dataset:
            found = self._reader.open(item.dataset, version_ref(item.path, item.version))
            fd, size = (found[0], found[1].st_size) if found else (-1, 0)
        else:
            fd, size = -1, 0  # of which version, only the fetcher knows
        return self.cut(index, item, fd, size) if fd >= 0 else None

    def find_resident(self, index: int, item: Item) -> Piece:
        """The same, without waiting for a disk. Raises BlockingIOError when that cannot be said so."""
        ref = version_ref(item.path, item.version)
        found = self._reader.open(item.dataset, ref, open_resident) if item.version and not item.key else None
        if found is None:
            raise BlockingIOError
        return self.cut(index, item, found[0], found[1].st_size)

    def cut(self, index: int, item: Item, fd: int, size: int) -> Piece:
        """What `item` asks for of a whole blob. Takes `fd` over."""
        name = _noted_name(fd)
        key = name[:KEY_BYTES]  # what follows says whose it is
        if item.length < 0:
            if size > BLOCK_SIZE:
                return Piece(index, fd, 0, 0, 0, size, key, large=True)
            return Piece(index, fd, 0, size, 0, size, key, key if key != NO_KEY else None, look=item.look)
        offset = min(item.offset, size)
        length = min(item.length, size - offset)
        digest = None
        if key != NO_KEY:
            if size <= BLOCK_SIZE:
                digest = key if length == size else None
            elif offset % BLOCK_SIZE == 0 and length == min(BLOCK_SIZE, size - offset):
                digest = self._block_digest(name, offset // BLOCK_SIZE)
        return Piece(index, fd, offset, length, offset, size, key, digest, look=item.look)

    def _by_key(self, key: bytes) -> tuple[int, int]:
        """(descriptor, size), or (-1, 0)."""
        if len(key) != KEY_BYTES:
            return -1, 0
        for places in self._places:
            try:
                fd = os.open(places.blob(key.hex()), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            info = os.fstat(fd)
            if info.st_mtime_ns == self._seal:
                return fd, info.st_size
            os.close(fd)
        return -1, 0

    def _block_digest(self, name: bytes, block: int) -> bytes | None:
        for places in self._places:
            try:
                with open(places.blocks(name.hex()), "rb") as file:
                    file.seek(block * KEY_BYTES)
                    digest = file.read(KEY_BYTES)
            except OSError:
                continue
            if len(digest) == KEY_BYTES:
                return digest
        return None


def _noted_name(fd: int) -> bytes:
    """The blob's name, which the store wrote beside the content; NO_KEY where the file system keeps no such notes."""
    try:
        name = unhexlify(os.getxattr(fd, KEY_XATTR))
    except (OSError, ValueError):
        return NO_KEY
    return name if len(name) in (KEY_BYTES, KEY_BYTES + TAG_BYTES) else NO_KEY

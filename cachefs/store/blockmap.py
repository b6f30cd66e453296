"""Which blocks of an incomplete object are there, with their digests: the file beside its bytes.

Format 1, little-endian. A header of 64 bytes:

    16s  b"cachefs blockmap"
    I    format (1)
    I    block size in bytes
    Q    size of the object in bytes
    16s  dataset that began it (digest.dataset_id), zeros = not known
    16s  XXH3-128 of the 48 bytes before

then one record of 32 bytes per block, in order; one that was never written reads as zeros (the file is sparse) or
lies beyond the end:

    16s  XXH3-128 of the block
    q    seal (layout.py) of the boot in which those bytes were written or last compared with the digest
    8s   first half of the XXH3-128 of: number of the block (Q), the 24 bytes before

A record is written after the bytes it speaks of, and removed before they are written again. So when the fetcher is
killed, a record means that its block is whole, unless the record itself is torn, which its last field shows: then
the block is not there. When the machine went down the disk may hold the record and not the bytes; that is what the
seal is for: a block of an earlier boot is compared with its digest before anyone is served it. Records never
straddle a page, so the 32 bytes of one are never half old and half new while the machine lives.
"""

from __future__ import annotations

import os
import struct

from cachefs.digest import BLOCK_SIZE, block_count, block_range, digest
from cachefs.store.folder import write_all

FORMAT = 1
_MAGIC = b"cachefs blockmap"
_HEADER = struct.Struct("<16sIIQ16s")
_HEADER_BYTES = 64
_RECORD = struct.Struct("<16sq")
_RECORD_BYTES = 32
_ABSENT = bytes(_RECORD_BYTES)


class BlockMap:
    """The map in an open file, and what it says in memory. Not locked: its Part is.

    digests: per block, None = not there. fresh: per block, 1 = compared with its digest in this boot. owner: the
    dataset that began the object, "" = not known.
    """

    def __init__(self, fd: int, size: int, seal: int, owner: str = "") -> None:
        self.fd = fd
        self.size = size
        self.owner = owner
        self._seal = seal
        self.digests: list[bytes | None] = [None] * block_count(size)
        self.fresh = bytearray(block_count(size))

    def begin(self) -> None:
        """Start an empty map."""
        os.ftruncate(self.fd, 0)
        write_all(self.fd, _header(self.size, self.owner))

    def load(self) -> bool:
        """Read the file. False: it is no map of an object of this size, and nothing it says counts."""
        length = _HEADER_BYTES + _RECORD_BYTES * len(self.digests)
        data = os.pread(self.fd, length, 0)
        owner = _owner(data, self.size)
        if owner is None:
            return False
        self.owner = owner
        for block in range(len(self.digests)):
            at = _HEADER_BYTES + block * _RECORD_BYTES
            record = data[at : at + _RECORD_BYTES]
            if len(record) < _RECORD_BYTES or record == _ABSENT:
                continue
            found, seal = _RECORD.unpack_from(record)
            if record == _record(block, found, seal):
                self.digests[block] = found
                self.fresh[block] = seal == self._seal
        return True

    def record(self, block: int, value: bytes) -> None:
        """The bytes of `block` are in the file, and this is their digest."""
        write_all(self.fd, _record(block, value, self._seal), _HEADER_BYTES + block * _RECORD_BYTES)
        self.digests[block] = value
        self.fresh[block] = 1

    def doubt(self) -> None:
        """The bytes may have changed: compare each block with its digest before it is served."""
        self.fresh[:] = bytes(len(self.fresh))

    def forget(self, block: int) -> None:
        """The bytes of `block` are not to be used (any more)."""
        self.fresh[block] = 0
        if self.digests[block] is not None:
            self.digests[block] = None
            write_all(self.fd, _ABSENT, _HEADER_BYTES + block * _RECORD_BYTES)


def held_blocks(path: str, owner: str) -> list[int]:
    """Sizes of the blocks that are there, by the map at `path`, if it is a map of an object that `owner` began."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        head = os.pread(fd, _HEADER_BYTES, 0)
        if len(head) < _HEADER_BYTES:
            return []
        size = _HEADER.unpack_from(head)[3]
        if _owner(head, size) != owner:
            return []
        blocks = BlockMap(fd, size, 0)
        blocks.load()
    finally:
        os.close(fd)
    ranges = (block_range(block, size) for block, found in enumerate(blocks.digests) if found is not None)
    return [stop - start for start, stop in ranges]


def _header(size: int, owner: str) -> bytes:
    body = _HEADER.pack(_MAGIC, FORMAT, BLOCK_SIZE, size, bytes.fromhex(owner))
    return body + digest(body)


def _owner(data: bytes, size: int) -> str | None:
    """Whose map these bytes begin; None when they are no map of an object of this size."""
    if len(data) < _HEADER_BYTES:
        return None
    owner = _HEADER.unpack_from(data)[4]
    found = owner.hex() if any(owner) else ""
    return found if data[:_HEADER_BYTES] == _header(size, found) else None


def _record(block: int, value: bytes, seal: int) -> bytes:
    body = _RECORD.pack(value, seal)
    return body + digest(struct.pack("<Q", block) + body)[:8]

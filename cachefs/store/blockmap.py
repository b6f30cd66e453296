"""Which blocks of an incomplete object are there, with their digests: the file beside its bytes.

Format 1, little-endian. A header of 64 bytes:

    16s  b"cachefs blockmap"
    I    format (1)
    I    block size in bytes
    Q    size of the object in bytes
    16x
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

from cachefs.digest import BLOCK_SIZE, block_count, digest
from cachefs.store.folder import write_all

FORMAT = 1
_MAGIC = b"cachefs blockmap"
_HEADER = struct.Struct("<16sIIQ16x")
_HEADER_BYTES = 64
_RECORD = struct.Struct("<16sq")
_RECORD_BYTES = 32
_ABSENT = bytes(_RECORD_BYTES)


class BlockMap:
    """The map in an open file, and what it says in memory. Not locked: its Part is.

    digests: per block, None = not there. fresh: per block, 1 = compared with its digest in this boot.
    """

    def __init__(self, fd: int, size: int, seal: int) -> None:
        self.fd = fd
        self.size = size
        self._seal = seal
        self.digests: list[bytes | None] = [None] * block_count(size)
        self.fresh = bytearray(block_count(size))

    def begin(self) -> None:
        """Start an empty map."""
        os.ftruncate(self.fd, 0)
        write_all(self.fd, _header(self.size))

    def load(self) -> bool:
        """Read the file. False: it is no map of an object of this size, and nothing it says counts."""
        length = _HEADER_BYTES + _RECORD_BYTES * len(self.digests)
        data = os.pread(self.fd, length, 0)
        if data[:_HEADER_BYTES] != _header(self.size):
            return False
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


def _header(size: int) -> bytes:
    body = _HEADER.pack(_MAGIC, FORMAT, BLOCK_SIZE, size)
    return body + digest(body)


def _record(block: int, value: bytes, seal: int) -> bytes:
    body = _RECORD.pack(value, seal)
    return body + digest(struct.pack("<Q", block) + body)[:8]

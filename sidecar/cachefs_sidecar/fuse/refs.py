"""Under which name the bytes of a node are in the store: known to all workers of a mount once one of them found out.

A cold read must know the object's path, its version and what these come to as a ref (digest.py). That takes a query of
the catalog and a hash, and a worker that has just waited for a disk does them on cold caches: 11 us of the 70 that a
cold read costs it. A node's ref never changes, since ids are never used again, so what was found out once is right for
good.
"""

from __future__ import annotations

import mmap
import struct
import zlib

# A ref is 32 hex digits. Its record: ref, size of the object, CRC-32 of these two. A record that was never written is
# zeros, whose sum would not be 0; one that is being written, or whose writer was killed, does not have its sum. So
# nothing depends on the order in which another core sees the bytes.
_BODY = struct.Struct("=16sQ")
_RECORD = struct.Struct("=24sI4x")


class Refs:
    """Memory that forked processes share; only what was written takes any. Nodes from `nodes` on are not remembered."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._memory = mmap.mmap(-1, max(1, nodes) * _RECORD.size)

    @classmethod
    def of(cls, last_node: int, most_bytes: int) -> Refs:
        """For a catalog, with room for the names that refreshes bring; fewer where that were more than `most_bytes`."""
        return cls(min(last_node + last_node // 4 + 1024, most_bytes // _RECORD.size))

    def get(self, node: int) -> tuple[str, int] | None:
        """(ref, size of the object in bytes)."""
        if node >= self.nodes:
            return None
        body, checksum = _RECORD.unpack_from(self._memory, node * _RECORD.size)
        if zlib.crc32(body) != checksum:
            return None
        ref, size = _BODY.unpack(body)
        return ref.hex(), size

    def put(self, node: int, ref: str, size: int) -> None:
        if node < self.nodes:
            body = _BODY.pack(bytes.fromhex(ref), size)
            _RECORD.pack_into(self._memory, node * _RECORD.size, body, zlib.crc32(body))

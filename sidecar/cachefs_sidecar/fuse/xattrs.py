"""Extended attributes: what `getfattr -d` shows of a file in the mount.

user.cachefs.version: the version of the object that this file is. user.cachefs.cached: 1 when all its bytes are on
the local disk, else 0. user.cachefs.digest: the content key of a cached file.
"""

from __future__ import annotations

import errno

from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.reading import Reading
from cachefs_sidecar.fuse.tree import Tree

VERSION = b"user.cachefs.version"
CACHED = b"user.cachefs.cached"
DIGEST = b"user.cachefs.digest"


class Attributes:
    def __init__(self, tree: Tree, reading: Reading) -> None:
        self._tree = tree
        self._reading = reading

    def get(self, node: int, body: memoryview) -> bytes | int:
        """The value, its size where only that is asked, or a negative errno. Raises StaleObject, WireError."""
        room, name = wire.getxattr_in(body)
        if not name.startswith(b"user."):
            # Not ENODATA: `ls -l` asks every file for its ACL and security label until it hears that this file
            # system has none.
            return -errno.EOPNOTSUPP
        value = self._values(node).get(name)
        return -errno.ENODATA if value is None else _sized(value, room)

    def list(self, node: int, body: memoryview) -> bytes | int:
        """The names, each with its NUL; else as `get`."""
        return _sized(b"".join(name + b"\0" for name in self._values(node)), wire.listxattr_in(body))

    def _values(self, node: int) -> dict[bytes, bytes]:
        row = self._tree.get(node)
        if row.directory:
            return {}
        key = self._reading.key_of(node)
        values = {VERSION: row.version.encode(), CACHED: b"0" if key is None else b"1"}
        if key:
            values[DIGEST] = key.encode()
        return values


def _sized(value: bytes, room: int) -> bytes | int:
    if room == 0:
        return wire.xattr_size_out(len(value))
    return value if len(value) <= room else -errno.ERANGE

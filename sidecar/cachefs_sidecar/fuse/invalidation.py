"""After a refresh: tell the kernel to forget exactly what changed.

The kernel remembers names, attributes and listings for good, so every difference between two catalogs is said to
it: the name that changed, and the listing of its directory. Pages of files need no word: a new version is a new
node, and the old one's pages go with its last user.

These writes wait for the lock of the directory in the kernel, and a lookup that is under way holds that lock until
a worker has answered it. So they happen in a process that answers no requests (the keeper forks one for it), else
both would wait for ever.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Protocol

from cachefs_sidecar.fuse import abi, wire


class Row(Protocol):
    @property
    def id(self) -> int: ...


# (parent id, name, row before or None, row after or None), as cachefs.catalog.changes yields them.
Change = tuple[int, bytes, Row | None, Row | None]


def invalidate(device: int, changes: Iterable[Change]) -> int:
    """Tell the kernel; the number of names that changed. Raises OSError when the connection is broken."""
    listings: set[int] = set()
    count = 0
    for parent, name, old, new in changes:
        if old is not None and new is not None and old.id == new.id:
            _notify(device, wire.notify_inval_inode(new.id))  # a directory with another time
            continue
        count += 1
        _notify(device, wire.notify_inval_entry(parent, name))
        # A name that the kernel did not know says nothing about the listing, which it may know.
        listings.add(parent)
    for directory in listings | {abi.ROOT}:  # the root at least has the time of the new catalog
        _notify(device, wire.notify_inval_inode(directory))
    return count


def _notify(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:
        # ENOENT: the kernel did not know it. The others: it forgot what it could of a directory in use.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY):
            raise

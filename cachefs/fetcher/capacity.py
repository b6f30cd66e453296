"""How much may still be written: reserved before it is written, so that capacity is never exceeded.

Two bounds: the cache's own size over all its directories, and on each file system the floor left to others. The
floor is looked at anew for each reservation, with what is reserved but not yet written taken off, because other
programs fill the disk too.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cachefs.config import Floor
from cachefs.errors import CacheFull

# Files take whole blocks of the file system; 4 KiB on every one in use for caches.
ALLOCATION = 4096

# statvfs costs 2 us, but on a loaded disk it can wait for the journal; ten looks a second follow any writer.
LOOK_SECONDS = 0.1


def allocated(size: int) -> int:
    """Bytes on disk of a file of `size` bytes."""
    return -(-size // ALLOCATION) * ALLOCATION


class Capacity:
    """Counts bytes on disk. `used` is set once from a scan of the store and kept from then on."""

    def __init__(self, limit: int | None, floor: Floor) -> None:
        self.limit = limit
        self.floor = floor
        self.used = 0
        self.reserved = 0
        self._looks: dict[Path, tuple[float, int, int]] = {}

    def reserve(self, count: int, directory: Path) -> int:
        """Set `count` bytes aside (rounded up to whole blocks) for a file in `directory`; returns them.

        Raises CacheFull. The caller ends the reservation with `commit` or `cancel`.
        """
        need = allocated(count)
        if self.limit is not None and self.used + self.reserved + need > self.limit:
            raise CacheFull(f"the cache has reached its size of {self.limit} bytes")
        available, total = self._look(directory)
        if available - self.reserved - need < self.floor.of(total):
            raise CacheFull(f"{directory}: its file system has reached the free-space floor ({self.floor})")
        self.reserved += need
        return need

    def commit(self, reserved: int, written: int | None = None) -> None:
        """The reservation was used; `written` bytes of it are on disk now (None = all)."""
        self.reserved -= reserved
        self.used += reserved if written is None else written

    def cancel(self, reserved: int) -> None:
        self.reserved -= reserved

    def free(self, count: int) -> None:
        """`count` bytes were given back to the disk."""
        self.used = max(0, self.used - count)
        self._looks.clear()

    def excess(self) -> int:
        """Bytes above the limit: after the limit was lowered. 0 otherwise."""
        return max(0, self.used + self.reserved - self.limit) if self.limit is not None else 0

    def _look(self, directory: Path) -> tuple[int, int]:
        now = time.monotonic()
        look = self._looks.get(directory)
        if look is None or now - look[0] > LOOK_SECONDS:
            try:
                info = os.statvfs(directory)
                look = (now, info.f_bavail * info.f_frsize, info.f_blocks * info.f_frsize)
            except OSError:
                # Gone, or failing. Whoever writes there now finds out, and the store takes the directory out; were
                # it called full, its objects would stream through for ever.
                look = (now, sys.maxsize, 0)
            self._looks[directory] = look
        return look[1], look[2]

"""What was fetched just now is in memory twice: its file's pages are dropped when they are on the disk.

A blob that a reader waited for was copied to it while its own pages were still to be written, and such pages cannot be
dropped. The kernel writes what is older than 30 s and looks every 5 s (vm.dirty_expire_centisecs and
vm.dirty_writeback_centisecs). So they are dropped some time later, for 15 us a file; to have them written sooner would
cost the readers of a first epoch the time of the disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachefs.digest import BLOCK_SIZE

SETTLED_SECONDS = 45.0

# The largest page that the page cache makes, in bytes. One that is dropped in part only stays: a range of which another
# worker has the rest is taken a little larger.
LARGEST_PAGE = 2 << 20

# Small files that are remembered, some 250 bytes each; beyond that the oldest are left to the kernel's own reclaim.
MOST_FILES = 16384


@dataclass
class _Range:
    """Of a large file, whose name changes when it is whole: so the file itself is held."""

    fd: int
    start: int
    stop: int
    due: float


class Settling:
    """Not for several threads at once: the session's lock is around every call. clock: seconds, never going back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._small: deque[tuple[float, str]] = deque(maxlen=MOST_FILES)
        self._large: dict[tuple[int, int], _Range] = {}

    def add(self, fd: int, position: int, length: int) -> None:
        """Bytes of a file were read through the page cache. Raises nothing: at worst they stay where they are."""
        with contextlib.suppress(OSError):
            info = os.fstat(fd)
            due = self._clock() + SETTLED_SECONDS
            if info.st_nlink == 0:
                return  # memory, or a file that goes with its pages when it is closed
            if info.st_size <= BLOCK_SIZE:
                self._small.append((due, os.readlink(f"/proc/self/fd/{fd}")))
                return
            held = self._large.get((info.st_dev, info.st_ino))
            if held is None:
                held = self._large[info.st_dev, info.st_ino] = _Range(os.dup(fd), position, position, due)
            held.start = min(held.start, position)
            held.stop = max(held.stop, position + length)

    def due(self) -> Callable[[], None]:
        """Drops what should be on the disk by now; to be called without the lock."""
        now = self._clock()
        paths = []
        while self._small and self._small[0][0] <= now:
            paths.append(self._small.popleft()[1])
        ranges = [self._large.pop(key) for key, held in list(self._large.items()) if held.due <= now]
        return lambda: _drop(paths, ranges)

    def close(self) -> None:
        for held in self._large.values():
            os.close(held.fd)
        self._large.clear()


def _drop(paths: Iterable[str], ranges: Iterable[_Range]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # evicted meanwhile, and its pages with it
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    for held in ranges:
        with contextlib.suppress(OSError):
            try:
                start = held.start // LARGEST_PAGE * LARGEST_PAGE
                stop = -(-held.stop // LARGEST_PAGE) * LARGEST_PAGE
                os.posix_fadvise(held.fd, start, stop - start, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(held.fd)

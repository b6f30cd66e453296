"""From the SSD into the page cache, shortly before it is read, so that no reader waits for a disk.

The kernel is asked to read ahead (posix_fadvise) and does so while we go on: what is opened is the file that the
consumer will open, through its mount (a mount has pages of its own; the fetcher serves no mount, so it cannot wait for
itself) or the blob. A file whose pages are there costs four system calls; where that is so for many in a row, only
some are looked at. It happens in threads, because opening a file that is cold, or on a mount that hangs, takes its
time; they are left behind when the fetcher ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading

# Two hide the time that the disk takes to find a file; more would only take the interpreter from one another.
THREADS = 2

# What is announced and not looked at yet: beyond that the disk does not keep up, and the readers are there first.
MOST_WAITING = 2048

# The kernel reads at most so much at one request, whatever is asked for (force_page_cache_ra: the device's read-ahead,
# 128 KiB unless somebody changed it); so it is asked piece by piece.
PIECE = 128 * 1024

# Larger files are read one piece after the other, and the kernel is ahead of their readers by itself.
MOST_BYTES = 8 * 1024 * 1024


class Sampling:
    """Which files are worth a look: all, until so many in a row had their pages; then one in `EVERY`."""

    IN_A_ROW, EVERY = 256, 16

    def __init__(self) -> None:
        self.over = False  # its consumer has left: what it still has in the queue is not opened any more
        self._there = 0
        self._skipped = 0

    def worth(self) -> bool:
        if self._there < self.IN_A_ROW:
            return True
        self._skipped = (self._skipped + 1) % self.EVERY
        return not self._skipped

    def found(self, there: bool) -> None:
        self._there = self._there + 1 if there else 0


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cached(ctypes.Structure):
    """struct cachestat (linux/mman.h): numbers of pages."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recent"))


# The same number on every architecture; Linux 6.5 and newer, before that the answer is ENOSYS.
_CACHESTAT = 451
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def pages_present(fd: int, size: int) -> bool:
    """Whether all of a file's first `size` bytes are in the page cache. False where the kernel does not tell."""
    cached = _Cached()
    if _syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, size)), ctypes.byref(cached), 0):
        return False
    return bool(cached.cache >= -(-size // mmap.PAGESIZE))


def read_ahead(path: str) -> bool:
    """Have the kernel read a file; whether it was there. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = min(os.fstat(fd).st_size, MOST_BYTES)
        if pages_present(fd, size):
            return True
        for at in range(0, size, PIECE):
            os.posix_fadvise(fd, at, min(PIECE, size - at), os.POSIX_FADV_WILLNEED)
        return False
    finally:
        os.close(fd)


class Pages:
    """Takes the names of files from the fetcher's loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, Sampling]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def bring(self, path: str, sampling: Sampling) -> None:
        """sampling: the consumer's; told whether the pages were there."""
        if self._queue.qsize() > MOST_WAITING:
            return
        if not self._threads:
            # Daemons: one that waits for a mount that hangs must not keep the fetcher from ending.
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()
        self._queue.put((path, sampling))

    def _work(self) -> None:
        while True:
            path, sampling = self._queue.get()
            if not path:
                return
            if sampling.over:
                continue
            try:
                there = read_ahead(path)
            except OSError:
                continue  # not on the disk (it streams through), evicted, unmounted: its reader will see
            sampling.found(there)

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(("", Sampling()))

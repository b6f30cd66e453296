"""From the SSD into the page cache, shortly before it is read, so that no reader waits for a disk.

The kernel is asked to read ahead (posix_fadvise) and does so while we go on: what is opened is the file that the
consumer will open, through its mount (a mount has pages of its own; the fetcher serves no mount, so it cannot wait for
itself) or the blob. A file whose pages are there costs four system calls; where that is so for many in a row, only
some are looked at. It happens in threads, because opening a file that is cold, or on a mount that hangs, takes its
time; they are left behind when the fetcher ends.

What the kernel reads ahead it does not report. So a thread waits for the last of the files that it takes at once, and
after so many bytes: a mount and a disk serve what was asked of them in its order, and a reader who is at the disk
already, or another consumer's, shall not wait behind a second's worth of files. And one file in some is timed: how long
it took to be in memory since it was asked for tells whether the disk keeps up.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import stat
import threading
import time

from cachefs.fetcher.prefetch.spot import SpotCheck

# Two hide the time that the disk takes to find a file; more would only take the interpreter from one another.
THREADS = 2

# Files that a thread takes at once, and waits for: twice as many are asked of the disk at a time, which hides how long
# it takes (32 in 2 ms are 16,000 a second). To wake a thread for each would cost as much as to look at a file.
AT_ONCE = 16
AT_ONCE_BYTES = 2 * 1024 * 1024

# Files that wait for a thread: what two get done between two looks, or a little more.
MOST_WAITING = 256

# The kernel reads at most so much at one request, whatever is asked for (force_page_cache_ra: the device's read-ahead,
# 128 KiB unless somebody changed it); so it is asked piece by piece.
PIECE = 128 * 1024

# Larger files are read one piece after the other, and the kernel is ahead of their readers by itself.
MOST_BYTES = 8 * 1024 * 1024


# Of the files that are cold, one in so many is timed.
TIMED = 16

# How long what was timed tells something of the disk: the consumer may have moved on to what is in memory.
RECENT_SECONDS = 5.0


class Sampling(SpotCheck):
    """Which files are worth a look, for those in memory are not; and how long the disk takes for the others."""

    IN_A_ROW, EVERY = 256, 16

    def __init__(self) -> None:
        super().__init__(self.IN_A_ROW, self.EVERY)
        self.over = False  # its consumer has left: what it still has in the queue is not opened any more
        self._cold = 0
        self._asked = 0.0  # when the file that is being timed was asked for; 0.0: none is
        self._took = self._took_at = 0.0

    def found(self, right: bool) -> None:
        """right: its pages were there."""
        super().found(right)
        self._cold += not right

    def timed(self, asked: float) -> bool:
        """Whether the next file, which was asked for then, is to be timed if it is cold. The first cold one is."""
        if self._cold % TIMED or self._asked:
            return False
        self._asked = asked
        return True

    def done(self, now: float, *, cold: bool) -> None:
        """The file that is timed is in memory, or will not be."""
        if cold:
            took = now - self._asked
            self._took = (self._took + took) / 2 if now - self._took_at < RECENT_SECONDS else took
            self._took_at = now
        self._asked = 0.0

    def seconds(self, now: float) -> float:
        """From when a cold file was asked for until it was in memory, lately; 0.0 where none was cold."""
        took = self._took if now - self._took_at < RECENT_SECONDS else 0.0
        return max(took, now - self._asked) if self._asked else took


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


def read_ahead(path: str, *, wait_from: int = MOST_BYTES + 1) -> int:
    """Have the kernel read a file; bytes that it was asked for, 0 where they were there.

    wait_from: of so many bytes it is waited until they are there. The path is a consumer's word: what is there may be
    no file at all. Raises OSError, ValueError (a NUL in it).
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a file")
    # O_NONBLOCK: a fifo put in its place meanwhile would hold this thread for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = min(info.st_size, MOST_BYTES)
        if pages_present(fd, size):
            return 0
        for at in range(0, size, PIECE):
            os.posix_fadvise(fd, at, min(PIECE, size - at), os.POSIX_FADV_WILLNEED)
        if size >= wait_from:
            for at in range(0, size, PIECE):
                os.pread(fd, 1, min(at + PIECE, size) - 1)
        return size
    finally:
        os.close(fd)


class Pages:
    """Takes the names of files from the fetcher's loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[list[str], Sampling, float]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def bring(self, paths: list[str], sampling: Sampling) -> None:
        """sampling: the consumer's; told whether the pages were there, and of some how long it took.

        paths: not none, and at most AT_ONCE.
        """
        if not self._threads:
            # Daemons: one that waits for a mount that hangs must not keep the fetcher from ending.
            self._threads = [
                threading.Thread(target=self._work, name="cachefs-pages", daemon=True) for _ in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()
        self._queue.put((paths, sampling, time.monotonic()))

    @property
    def take_more(self) -> bool:
        return self._queue.qsize() * AT_ONCE < MOST_WAITING

    def _work(self) -> None:
        while True:
            paths, sampling, asked = self._queue.get()
            if not paths:
                return
            left = AT_ONCE_BYTES
            for path in paths:
                if not sampling.over:
                    size = self._bring(path, sampling, asked, 0 if path is paths[-1] else left)
                    left = left - size if size < left else AT_ONCE_BYTES

    def _bring(self, path: str, sampling: Sampling, asked: float, wait_from: int) -> int:
        """Bytes that the kernel was asked for."""
        timed = sampling.timed(asked)
        size = 0
        try:
            size = read_ahead(path, wait_from=0 if timed else wait_from)
            sampling.found(not size)
        except (OSError, ValueError):
            pass  # not on the disk (it streams through), evicted, unmounted, no path: its reader will see
        finally:
            if timed:
                sampling.done(time.monotonic(), cold=size > 0)
        return size

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(([], Sampling(), 0.0))

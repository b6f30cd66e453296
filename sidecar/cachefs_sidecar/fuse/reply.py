"""The bytes of a reply, on their way from the disk to the kernel, in no more memory than the reader's own pages.

Read through the page cache, a blob would be in memory twice: as pages of its own file and as pages of the file in the
mount, which the kernel keeps. So what is not in memory yet is read past the page cache (O_DIRECT), and what is there
already, because it was fetched just now, is copied and then dropped (settling.py).

Nobody but the kernel needs to see the bytes, so they travel through a pipe: the disk writes into fresh pages, and the
kernel makes these the pages of the file in the mount (splice(2) with SPLICE_F_MOVE). Nothing is copied. CPU for a file
of 110 KB, all of a minimal worker's (measured, 2 cores): through the page cache 110 us, O_DIRECT into a buffer 85 us
and 5 to 10 more to look at the bytes, through a pipe 60 us.

A whole MiB is another matter. As fresh pages it is 256 pieces, more than a disk takes at once (`max_segments`), and who
reads a large file from end to end waits for it. In one piece of memory it is there sooner: 1 GiB from end to end at
1,750 MB/s instead of 1,150, for half as much CPU again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable

from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.settling import Settling

PAGE = mmap.PAGESIZE

# In one piece for the disk, where the kernel grants it (transparent huge pages).
LARGE_PAGE = 2 << 20

# Of more than so many bytes the disk makes more in one piece than copying them costs.
MOST_PIPED = 512 * 1024

# cachestat(2), Linux 6.5: one number for every architecture.
_CACHESTAT = 451

# Linux 2.6.17, <linux/splice.h>.
_SPLICE_F_MOVE = 1


_RANGE = struct.Struct("=QQ")  # struct cachestat_range: offset, length
_STAT = struct.Struct("=QQQ16x")  # struct cachestat: pages cached, dirty, under writeback; two more

# Bound once: a hit is a matter of microseconds.
_fcntl, _splice, _write = fcntl.fcntl, os.splice, os.write


class Reply:
    """One reply at a time. Not for several threads at once.

    room: the largest answer in bytes. through_pipe: whether the device can splice, as /dev/fuse can.
    buffer: room for the header of a reply, then the payload: the bytes of a reply that is `visible`.
    """

    def __init__(self, room: int, *, through_pipe: bool = False) -> None:
        # The payload begins on a page, as O_DIRECT wants it; the header ends right before.
        memory = _memory(room)
        self.buffer = memory[PAGE - wire.OUT_HEADER_BYTES :]
        self.payload = memory[PAGE:]
        pipe = _Pipe(min(room, MOST_PIPED)) if through_pipe else None
        self._pipe = pipe if pipe is not None and pipe.room else None
        self.settling = Settling()
        self._piped = False
        self._length = 0
        self._range, self._stat = bytearray(_RANGE.size), bytearray(_STAT.size)
        self._cachestat = _prepared(self._range, self._stat)

    @property
    def visible(self) -> bool:
        """Whether the bytes are in `payload`."""
        return not self._piped

    def clear(self) -> int:
        """Begin anew, with nothing: an answer of 0 bytes."""
        if self._piped:  # was filled and not sent
            assert self._pipe is not None
            self._pipe.renew()
        self._length, self._piped = 0, False
        return 0

    def fill(self, unique: int, fd: int, position: int, length: int, *, look: bool = False) -> bool:
        """Take exactly `length` bytes from a file. False when it is shorter or its disk fails.

        look: the caller wants to see the bytes. The descriptor may be left with O_DIRECT set.
        """
        if self._piped:
            self.clear()
        self._length = length
        try:
            pages = self.pages(fd, position, length)
            if pages is not None and pages[0] == 0 and position % PAGE == 0 and _goes_past_memory(fd):
                pipe = self._pipe
                if pipe is not None and length <= pipe.room and not look:
                    self._piped = pipe.fill(wire.out_header(length, 0, unique), fd, position, length)
                if self._piped or self._direct(fd, position, length):
                    return True
            if pages is not None:
                _fcntl(fd, fcntl.F_SETFL, 0)
            if not self._copy(fd, position, length):
                return False
            if pages is None or not pages[1]:
                os.posix_fadvise(fd, position, -(-length // PAGE) * PAGE, os.POSIX_FADV_DONTNEED)
            else:
                self.settling.add(fd, position, length)
        except OSError:
            return False  # a failing disk is a miss; the fetcher checks the blob and says so
        return True

    def send(self, device: int, unique: int) -> None:
        """What was filled. Raises OSError as write(2) on the device does."""
        if self._piped:
            assert self._pipe is not None
            self._piped = False
            self._pipe.empty(device, wire.OUT_HEADER_BYTES + self._length)
        else:
            wire.out_header_into(self.buffer, self._length, unique)
            os.write(device, self.buffer[: wire.OUT_HEADER_BYTES + self._length])

    def pages(self, fd: int, position: int, length: int) -> tuple[int, int] | None:
        """Of a range of a file: (pages in memory; of these, not on the disk yet or just on their way). None where the
        kernel does not say."""
        _RANGE.pack_into(self._range, 0, position, length)
        if self._cachestat(fd) != 0:
            return None
        cached, dirty, written = _STAT.unpack_from(self._stat)
        return cached, dirty + written

    def _direct(self, fd: int, position: int, length: int) -> bool:
        """False when the file system wants larger units, or has no such thing, and at the end of the file."""
        try:
            return os.preadv(fd, [self.payload[: -(-length // PAGE) * PAGE]], position) >= length
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False

    def _copy(self, fd: int, position: int, length: int) -> bool:
        done = 0
        while done < length:  # once, but for a signal
            count = os.preadv(fd, [self.payload[done:length]], position + done)
            if count == 0:
                return False
            done += count
        return True


class _Pipe:
    """room: the bytes that fit behind a header; less than asked for where this user may have no larger pipes."""

    def __init__(self, room: int) -> None:
        self._most = room
        self._open()

    def _open(self) -> None:
        self._out, self._in = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, self._most + PAGE)  # a header takes a page to itself
        self.room = min(self._most, fcntl.fcntl(self._in, fcntl.F_GETPIPE_SZ) - PAGE)

    def fill(self, header: bytes, fd: int, position: int, length: int) -> bool:
        """False, and the pipe is empty, when the file cannot be spliced or is shorter. Raises OSError: EIO and such."""
        whole = -(-length // PAGE) * PAGE
        done = 0
        try:
            _write(self._in, header)
            while done < length:  # twice where the kernel finds too few free pages at once
                count = _splice(fd, self._in, whole - done, offset_src=position + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            self.renew()
            if error.errno != errno.EINVAL:
                raise
            return False
        if done != length:
            self.renew()
        return done == length

    def empty(self, device: int, length: int) -> None:
        try:
            _splice(self._out, device, length, flags=_SPLICE_F_MOVE)
        except OSError:
            self.renew()  # the next reply must not begin with the rest of this one
            raise

    def renew(self) -> None:
        os.close(self._in)
        os.close(self._out)
        self._open()


def _memory(room: int) -> memoryview:
    """A page, and behind it `room` bytes, which begin on a large page."""
    memory = mmap.mmap(-1, 2 * LARGE_PAGE + room)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % LARGE_PAGE
    if start < PAGE:
        start += LARGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, -(-room // LARGE_PAGE) * LARGE_PAGE)
    return memoryview(memory)[start - PAGE : start + room]


def _goes_past_memory(fd: int) -> bool:
    """Turn O_DIRECT on. False where the file system has no such thing."""
    try:
        _fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return False
    return True


def _prepared(range_: bytearray, stat: bytearray) -> Callable[[int], int]:
    """cachestat(2) with these two structures, as a function of the descriptor: 1 us."""
    call = ctypes.CDLL(None).syscall
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    call.restype = ctypes.c_long
    at, into = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (range_, stat))
    return lambda fd: int(call(_CACHESTAT, fd, at, into, 0))

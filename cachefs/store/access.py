"""Whether a blob was read, by its access time: hits reach nobody who could count them.

Time of access is set to UNREAD, before the time of modification (the seal). Then the next read sets it to now, on file
systems that keep access times, relatime (the default) or not: read(2), pread, splice, O_DIRECT and the first use of a
memory map do, open(2) and stat(2) do not. What the kernel has in the page cache of a mount is read there, and not here.

Only the access time is written, never the seal beside it: of a blob that is unsealed meanwhile, nothing seals it again.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

from cachefs.store.folder import discard

# In 1970, before every seal and every clock.
UNREAD_NS = 1_000_000_000

_AT_FDCWD = -100  # linux/fcntl.h
_UTIME_OMIT = (1 << 30) - 2  # utimensat(2): leave this one as it is. Not to be had through os.utime


class _Times(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("atime", "atime_ns", "mtime", "mtime_ns"))


class Look(NamedTuple):
    """read: since the last look, or nobody looked before. links: names of the file. inode: of it."""

    read: bool
    links: int
    inode: int


def look(path: str) -> Look:
    """Whether a blob was read since the last look; from now on, what is read is read anew. Raises OSError."""
    info = os.stat(path)
    read = info.st_atime_ns != UNREAD_NS
    if read:
        mark_unread(path)
    return Look(read, info.st_nlink, info.st_ino)


def mark_unread(path: str) -> None:
    """Raises OSError."""
    times = _Times(*divmod(UNREAD_NS, 1_000_000_000), 0, _UTIME_OMIT)
    if _libc().utimensat(_AT_FDCWD, os.fsencode(path), ctypes.byref(times), 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def tells(folder: str, seal: int) -> bool:
    """Whether files of a folder tell if they are read: tried with one. False where it cannot be tried, too."""
    path = os.path.join(folder, "access-probe")
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(b"?")
        try:
            os.utime(path, ns=(UNREAD_NS, seal))
            with open(path, "rb", buffering=0) as file:
                file.read(1)
            return os.stat(path).st_atime_ns != UNREAD_NS
        finally:
            discard(path)
    except OSError:
        return False

"""Files that are in memory already, opened and read without ever waiting for a disk.

So a loop may do it by itself, where the way to a thread and back costs more than a small object. Whatever would have to
wait raises BlockingIOError, and a thread does it: the names that lead to the file are not all known to the kernel
(openat2(2), RESOLVE_CACHED), or its pages are not there (preadv2(2), RWF_NOWAIT).
"""

from __future__ import annotations

import ctypes
import os

# openat2(2) has the same number on all machines that Linux runs on today; its flag for what is known only.
_OPENAT2 = 437
_RESOLVE_CACHED = 0x20
_AT_FDCWD = -100

# Not released while it runs, the interpreter's lock: it takes no longer than taking that again.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_syscall.restype = ctypes.c_long


def open_resident(path: str, flags: int) -> int:
    """As os.open. Raises OSError: BlockingIOError, or another where the kernel (5.12) or a sandbox has no such way."""
    how = (ctypes.c_uint64 * 3)(flags, 0, _RESOLVE_CACHED)
    fd: int = _syscall(_OPENAT2, _AT_FDCWD, os.fsencode(path), ctypes.addressof(how), ctypes.sizeof(how))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return fd


def read_resident(fd: int, view: memoryview, at: int) -> None:
    """Fill `view`. Raises BlockingIOError when not all of it is in memory, or that cannot be said here."""
    try:
        got = os.preadv(fd, (view,), at, os.RWF_NOWAIT)
    except OSError:  # a file system without that way; a thread meets what is a failure
        raise BlockingIOError from None
    if got < len(view):
        raise BlockingIOError

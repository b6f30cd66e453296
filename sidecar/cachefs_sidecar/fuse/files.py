"""Which file something is, and how to look at one that has no name any more.

A blob that is open in passthrough may be evicted, and goes on being read; or it may turn out damaged, and then nobody
else must be led to it. The store takes the seal off a damaged one (store/layout.py), and a file handle
(name_to_handle_at(2)) finds it for who wants to look.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_AT_EMPTY_PATH = 0x1000
_MOST_BYTES = 128  # MAX_HANDLE_SZ
_SAME = struct.Struct("=QQ")  # device, inode
_HEAD = struct.Struct("=Ii")  # struct file_handle: bytes, type; behind it the handle itself


def identity(fd: int, info: os.stat_result) -> bytes:
    """Names an open file: two are the same file when these are equal. info: its stat."""
    return _SAME.pack(info.st_dev, info.st_ino) + _handle(fd)


def look_again(identity: bytes, directories: Iterable[Path]) -> os.stat_result | None:
    """What is open under this identity, name or no name; None when it is not, or the file system finds no handles.

    directories: of the file systems where it may be.
    """
    device, inode = _SAME.unpack_from(identity)
    handle = identity[_SAME.size :]
    for directory in directories if handle else ():
        with contextlib.suppress(OSError):
            fd = _open(directory, handle)
            try:
                info = os.fstat(fd)
            finally:
                os.close(fd)
            if (info.st_dev, info.st_ino) == (device, inode):
                return info
    return None


def _handle(fd: int) -> bytes:
    """b"" where the file system has no such thing."""
    buffer = bytearray(_HEAD.pack(_MOST_BYTES, 0) + bytes(_MOST_BYTES))
    at = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    mount_id = ctypes.c_int()
    if _libc().name_to_handle_at(fd, b"", at, ctypes.byref(mount_id), _AT_EMPTY_PATH) != 0:
        return b""
    size, _ = _HEAD.unpack_from(buffer)
    return bytes(buffer[: _HEAD.size + size])


def _open(directory: Path, handle: bytes) -> int:
    """Needs CAP_DAC_READ_SEARCH. Raises OSError."""
    anywhere = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd: int = _libc().open_by_handle_at(anywhere, ctypes.create_string_buffer(handle), flags)
    finally:
        os.close(anywhere)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return fd


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

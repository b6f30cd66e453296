"""Copying a cached object to a local file, by the kernel where it can."""

from __future__ import annotations

import os
from typing import IO, Any

# One request of copying, so that a progress bar moves and Ctrl-C is heard.
PIECE = 8 * 1024 * 1024


def copy_object(source: IO[bytes], target: Any, callback: Any = None) -> None:
    """Copy from the beginning of `source` to a path (its directory is made) or to a file object."""
    if callback is not None:
        callback.set_size(_size(source))
    if hasattr(target, "write"):
        _copy(source, target, callback)
        return
    target = os.fspath(target)
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    with open(target, "wb") as file:
        if not _copied_by_kernel(source, file, callback):
            _copy(source, file, callback)


def _size(source: Any) -> int:
    raw = getattr(source, "raw", source)
    size = getattr(raw, "size", None)
    return int(size) if size is not None else os.fstat(raw.fileno()).st_size


def _copied_by_kernel(source: Any, target: Any, callback: Any) -> bool:
    """copy_file_range(2): shares the blocks where the file system can. False when it copied nothing."""
    try:
        reading, writing = source.fileno(), target.fileno()
    except OSError:  # io.UnsupportedOperation: bytes that come in pieces
        return False
    done = 0
    while True:
        try:
            count = os.copy_file_range(reading, writing, PIECE, done, done)
        except OSError:
            if done:
                raise
            return False  # another file system, or one that cannot
        if count == 0:
            return done > 0 or os.fstat(reading).st_size == 0
        done += count
        if callback is not None:
            callback.relative_update(count)


def _copy(source: IO[bytes], target: Any, callback: Any) -> None:
    while data := source.read(PIECE):
        target.write(data)
        if callback is not None:
            callback.relative_update(len(data))

"""Where the bytes of an object can be read: the fetcher's answer, with a descriptor in hand."""

from __future__ import annotations

import os
from typing import NamedTuple

from cachefs.errors import CacheError
from cachefs.messages import Ready


class Located(NamedTuple):
    """fd: open for reading, owned by whoever holds this. file: its path, "" when it has none (not cached).

    Bytes [start, stop) of the object can be read now, byte `o` of the object at offset `o - base` of the file.
    complete: the file is the whole object, so that stop == size and base == 0. size in bytes.
    """

    fd: int
    file: str
    size: int
    version: str
    start: int
    stop: int
    base: int
    complete: bool

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset+length) of the object, cut at what is readable. Raises OSError."""
        length = min(length, self.stop - offset)
        parts: list[bytes] = []
        while length > 0:
            piece = os.pread(self.fd, length, offset - self.base)
            if not piece:
                raise CacheError(f"{self.file or 'streamed object'}: ends before byte {offset} of {self.size}")
            parts.append(piece)
            offset += len(piece)
            length -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def open_ready(ready: Ready, descriptors: list[int]) -> Located | None:
    """The located bytes of a reply; None when the file was evicted between the answer and this open."""
    fd = descriptors.pop(0) if descriptors else -1
    if fd < 0:
        try:
            fd = os.open(ready.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
    return Located(fd, ready.file, ready.size, ready.version, ready.start, ready.stop, ready.base, ready.complete)

"""How a plan lies in memory that a consumer and the fetcher share.

A plan may have ten million entries, so it never crosses the socket: the consumer writes it into a memfd and passes
the descriptor. The fetcher reads it by piece, with pread: a consumer that truncates its file gives it a short read,
where a mapping would kill it (SIGBUS). Only memory is taken (memfd_create(2)), as reading any other file may block.

The consumer's page: 8 bytes each of POSITION (items handed out since it announced itself; the consumer writes it
through a mapping, so that progress costs no system call) and FRONTIER (the first item that is not ready; the fetcher
writes it). Behind it, if it has one, its table of names.

A table of n names: n + 1 offsets of 8 bytes, then the UTF-8 text that they cut into names. An order by index: 4 bytes
each, by catalog id: 8. Everything in the byte order of the machine.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate

from cachefs.errors import PlanError

PAGE = 4096
POSITION, FRONTIER = 0, 8

# Entries of one plan: as many as an index of 4 bytes tells apart. The largest index stands for "none of the names".
MOST_ENTRIES = 2**32 - 1
NO_NAME = 2**32 - 1

# Items are counted up to here. The page has room for twice that, so that no sum of two numbers is too large for it.
LARGEST_NUMBER = 2**62

# An S3 key has at most 1 KiB, a local path 4 KiB.
LONGEST_NAME = 16 * 1024

NAMES, INDICES, IDS = "names", "indices", "ids"

# Types of array.array for the two kinds of order.
TYPES = {INDICES: "I", IDS: "Q"}

# Names encoded at a time: so many that the loop around them costs nothing, so few that they take no memory to speak of.
_SLICE = 65536

_WORD = struct.Struct("=q")
_TWO_OFFSETS = struct.Struct("=QQ")


# --- written by the consumer ---------------------------------------------------------------------------------


def shared_memory() -> int:
    """A descriptor of memory with nothing in it."""
    return os.memfd_create("cachefs-plan", os.MFD_CLOEXEC)


def write_names(fd: int, at: int, names: Sequence[str]) -> None:
    """Write a table of names to offset `at`."""
    text_at = at + 8 * (len(names) + 1)
    _write(fd, bytes(8), at)
    end = 0
    for start in range(0, len(names), _SLICE):
        # What no UTF-8 can say is written all the same and skipped by whoever reads it: the others keep their numbers.
        encoded = [name.encode("utf-8", "surrogatepass") for name in names[start : start + _SLICE]]
        offsets = array("Q", accumulate(map(len, encoded), initial=end))
        _write(fd, memoryview(offsets)[1:].cast("B"), at + 8 * (start + 1))
        _write(fd, b"".join(encoded), text_at + end)
        end = offsets[-1]


def write_order(fd: int, order: array[int]) -> None:
    """Write indices (an array of type "I") or ids ("Q")."""
    _write(fd, memoryview(order).cast("B"), 0)


def _write(fd: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view = view[count:]
        at += count


# --- read by the fetcher -------------------------------------------------------------------------------------


def is_memory(fd: int) -> bool:
    """Whether it is a file in memory, whose reads, and whose end, wait for nobody."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only files in memory have seals (fcntl(2))
    except OSError:
        return False
    return True


def require_memory(fd: int) -> int:
    """Its size in bytes. Raises PlanError for what is no shared memory, or cannot be read."""
    if not is_memory(fd):
        raise PlanError("a plan must lie in memory made with memfd_create")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise PlanError("its memory was opened for writing only: pass a descriptor that can be read too")
    return os.fstat(fd).st_size


def require_count(count: int, what: str) -> None:
    """Raises PlanError for a number of entries that no plan has."""
    if not 0 <= count <= MOST_ENTRIES:
        raise PlanError(f"{count} {what}: a plan has from 0 to at most {MOST_ENTRIES}; give more as several plans")


def require_number(number: int) -> None:
    """Raises PlanError for the number of an item that no consumer reaches."""
    if not 0 <= number <= LARGEST_NUMBER:
        raise PlanError(f"item {number}: items are numbered from 0 to at most {LARGEST_NUMBER}")


class Names:
    """A table of names in a descriptor that stays its owner's. Nothing in it is believed."""

    def __init__(self, fd: int, at: int, count: int) -> None:
        """Raises PlanError when the memory is too small for so many names."""
        require_count(count, "names")
        size = require_memory(fd)
        self._text_at = at + 8 * (count + 1)
        if count and size < self._text_at:
            raise PlanError(f"{count} names do not fit into {size} bytes: write all of the table before it is passed")
        self._fd, self._at, self.count = fd, at, count

    def raw(self, index: int) -> bytes:
        """Bytes that may be a name; b"" for what is none: an index out of range, too long, or cut off."""
        if not 0 <= index < self.count:
            return b""
        offsets = _read(self._fd, 16, self._at + 8 * index)
        if len(offsets) < 16:
            return b""
        start, stop = _TWO_OFFSETS.unpack(offsets)
        if not 0 < stop - start <= LONGEST_NAME or stop > 2**48:
            return b""
        raw = _read(self._fd, stop - start, self._text_at + start)
        return raw if len(raw) == stop - start else b""

    def name(self, index: int) -> str | None:
        """None for what is no name: also what is not UTF-8, or has a NUL."""
        raw = self.raw(index)
        if not raw or b"\0" in raw:
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return None


class Order:
    """Indices or ids in a descriptor that stays its owner's."""

    def __init__(self, fd: int, count: int, kind: str) -> None:
        """Raises PlanError when the memory is too small for so many."""
        require_count(count, "entries")
        self._type = TYPES[kind]
        self._width = array(self._type).itemsize
        if (size := require_memory(fd)) < self._width * count:
            raise PlanError(f"{count} entries do not fit into {size} bytes: write all of them before they are passed")
        self._fd, self.count = fd, count

    def piece(self, start: int, stop: int) -> array[int]:
        """Entries [start, stop), fewer where the memory was cut off since."""
        raw = _read(self._fd, max(0, self._width * (min(stop, self.count) - start)), self._width * start)
        return array(self._type, raw[: len(raw) - len(raw) % self._width])


def _read(fd: int, count: int, at: int) -> bytes:
    """Short where the memory was cut off, and empty where it cannot be read (a page of it is lost: EIO)."""
    try:
        return os.pread(fd, count, at)
    except OSError:
        return b""


def read_word(fd: int, at: int) -> int:
    """A number of the consumer's page; 0 when the page is gone."""
    raw = _read(fd, 8, at)
    return int(_WORD.unpack(raw)[0]) if len(raw) == 8 else 0


def write_word(fd: int, at: int, value: int) -> None:
    """Tell the consumer a number. Raises OSError."""
    os.pwrite(fd, _WORD.pack(value), at)

"""One frame, put together in memory: entries, and the bytes of small objects behind them.

The bytes are read to their place first; how long the table is to be is known only when all are there, so it is put
before them, up to where they begin. Of files that the kernel sends by itself only the entries are here: those whose
digest and tag are known already.
"""

from __future__ import annotations

import os
from collections import deque

from cachefs.cluster.peers.buffers import uncleared
from cachefs.cluster.peers.server.blobs import Piece
from cachefs.cluster.peers.server.resident import read_resident
from cachefs.cluster.peers.trust import Session
from cachefs.cluster.peers.wire import (
    ENTRY_BYTES,
    HEADER_BYTES,
    MOST_ENTRIES,
    MOST_NAMES,
    MOST_VERSION,
    NO_MARK,
    Status,
    pack_entry,
    pack_header,
)
from cachefs.digest import digest

# What goes together: enough that a frame's own cost does not show, and so little that it is still in a cache of the
# processor when the socket takes it. Who receives it has it in memory until the last object of it is stored.
TOGETHER_BYTES = 1024 * 1024

# Files that are open at once for one frame.
TOGETHER_FILES = 16

_TABLE_BYTES = HEADER_BYTES + MOST_ENTRIES * ENTRY_BYTES + MOST_NAMES
_USUAL_BYTES = _TABLE_BYTES + TOGETHER_BYTES


# Memory that an answer is through with, for the next: else the kernel clears it first. Of any thread.
_spare: deque[bytearray] = deque(maxlen=8)


# Looked up once: an attribute of an enumeration is slow to find.
_OK = Status.OK


class Damaged(Exception):
    """The bytes of a piece are not what was stored."""


class Frame:
    """Used again for each frame of an answer. entries: how many are in it. bodies: what the kernel is to send after it,
    which whoever takes them closes. direct: it may send files. resident: nothing is waited for; what is not in memory
    raises BlockingIOError.
    """

    def __init__(self, session: Session, *, direct: bool = False, resident: bool = False) -> None:
        self._session = session
        self._may_be_direct = direct
        self._resident = resident
        self._buffer = bytearray()
        self.clear()

    def clear(self) -> None:
        if len(self._buffer) > _USUAL_BYTES:
            self._buffer = bytearray()
        self._table: list[bytes] = []
        self._names: list[bytes] = []
        self._names_bytes = self._length = self.entries = 0
        self._direct: bool | None = None  # as its first object is
        self.bodies: list[Piece] = []

    def close(self) -> None:
        """Its memory is for others. No view of it is used any more."""
        if len(self._buffer) == _USUAL_BYTES:
            _spare.append(self._buffer)
        self._buffer = bytearray()

    def has_room(self, next: Piece | bytes) -> bool:
        """Whether it may go into this frame; the first one may, whatever it is."""
        if not self.entries:
            return True
        if self.entries >= MOST_ENTRIES or self._names_bytes + MOST_VERSION > MOST_NAMES:
            return False
        if isinstance(next, bytes):
            return True
        return self._length + next.length <= TOGETHER_BYTES and len(self.bodies) < TOGETHER_FILES

    def owns(self, piece: Piece) -> bool:
        return bool(self.bodies) and self.bodies[-1] is piece

    def add(self, entry: bytes) -> None:
        """One without bytes."""
        self._table.append(entry)
        self.entries += 1

    def add_bytes(self, piece: Piece) -> None:
        """Raises Damaged when they are not what was stored, OSError when they cannot be read."""
        if self._direct is None:
            self._direct = self._may_be_direct and self._known(piece) is not None
        found, mark = self._noted(piece) if self._direct else self._read(piece)
        name = piece.version.encode() if piece.version else b""
        self.add(
            pack_entry(
                _OK,
                piece.index,
                size=piece.size,
                offset=piece.offset,
                length=piece.length,
                name_length=len(name),
                key=piece.key,
                digest=found,
                mark=mark,
            )
        )
        if name:
            self._names.append(name)
            self._names_bytes += len(name)
        self._length += piece.length
        if self._direct:
            self.bodies.append(piece)

    def sealed(self) -> memoryview:
        """What goes to the socket; it is of the memory that the next frame is made in."""
        table = b"".join((pack_header(self.entries, self._names_bytes, self._length), *self._table, *self._names))
        if self._direct or not self._length:
            frame = memoryview(bytearray(table))
        else:
            start = _TABLE_BYTES - len(table)
            frame = memoryview(self._buffer)[start : _TABLE_BYTES + self._length]
            frame[: len(table)] = table
        self._session.seal_table(frame[: len(table)])
        return frame

    def _noted(self, piece: Piece) -> tuple[bytes, bytes]:
        """(digest, mark) as they were noted. Where they were not, it is read for them, and sent from its file all the
        same: in a frame there are files or memory.
        """
        return self._known(piece) or self._signed(piece, self._place(piece, 0))

    def _known(self, piece: Piece) -> tuple[bytes, bytes] | None:
        if piece.digest is None or piece.look:
            return None
        mark = self._session.tagger.kept(piece.digest) if self._session.tagger else NO_MARK
        return None if mark is None else (piece.digest, mark)

    def _read(self, piece: Piece) -> tuple[bytes, bytes]:
        """To its place; digest and mark of what came."""
        return self._signed(piece, self._place(piece, self._length))

    def _place(self, piece: Piece, at: int) -> memoryview:
        """Where it is read to: `at` bytes behind the table."""
        start = _TABLE_BYTES + at
        end = start + piece.length
        if len(self._buffer) < end:
            # Only the first piece of a frame can be larger than all that go together.
            self._buffer = _usual() if end <= _USUAL_BYTES else uncleared(end)
        return memoryview(self._buffer)[start:end]

    def _signed(self, piece: Piece, view: memoryview) -> tuple[bytes, bytes]:
        if self._resident:
            read_resident(piece.fd, view, piece.at)
        elif _fill(piece, view) < piece.length:
            raise Damaged
        found = digest(view)
        if piece.digest is not None and found != piece.digest:
            raise Damaged
        tagger = self._session.tagger
        return found, (tagger.kept(found) or tagger.mark(found, view)) if tagger else NO_MARK


def _fill(piece: Piece, view: memoryview) -> int:
    """Bytes read: fewer than the view holds only at the end of the file."""
    got = os.preadv(piece.fd, (view,), piece.at)
    while 0 < got < len(view):
        count = os.preadv(piece.fd, (view[got:],), piece.at + got)
        if not count:
            break
        got += count
    return got


def _usual() -> bytearray:
    try:
        return _spare.pop()
    except IndexError:
        return uncleared(_USUAL_BYTES)

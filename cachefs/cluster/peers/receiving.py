"""The answer to one request, as its frames come in: the objects of each are checked and handed on at once.

`frames` is a generator that yields where the next bytes shall go, so that they come from the socket into the memory in
which they stay (channel.fill); it knows nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cachefs.cluster.peers.buffers import uncleared
from cachefs.cluster.peers.channel import Filler
from cachefs.cluster.peers.trust import Session
from cachefs.cluster.peers.wire import (
    HEADER_BYTES,
    LAST,
    NO_KEY,
    Entry,
    Item,
    Status,
    unpack_entries,
    unpack_header,
)
from cachefs.digest import BLOCK_SIZE, digest
from cachefs.errors import PeerWrong


class Piece(NamedTuple):
    """Bytes [offset, offset+len(data)) of an object of `size` bytes, checked. data is the caller's own; small objects
    that came in one frame are parts of the same memory, which is free again when the last of them is.

    Fewer than were asked for where the owner does not have more yet, or the object ends; data is empty and `large` True
    where a whole object was asked for that is larger than a block. key: of the whole content, b"" where the owner does
    not know it. version: "" unless the request left it open.
    """

    data: memoryview
    offset: int
    size: int
    key: bytes
    version: str
    large: bool = False


class Unlike(NamedTuple):
    """Bytes that are not those of their digest, for the first time: they may have rotted on the owner's disk, which
    sends files without reading them. It is to be asked to look; if they come so again, it lies.
    """

    why: str


# Looked up once: an attribute of an enumeration costs as much as the comparison.
_OK = Status.OK

# Told (item number, what came of it) for each item once.
Arrived = Callable[[int, Piece | Status | Unlike], None]


class Answer:
    """last: the status of the last frame, once `frames` has ended, and retry: seconds, if that was BUSY.

    within: a frame has begun and not ended. begun: there was a frame.
    """

    def __init__(self, items: list[Item], session: Session, arrived: Arrived) -> None:
        self._items = items
        self._session = session
        self._arrived = arrived
        self._open = set(range(len(items)))
        self.last: Status | None = None
        self.retry = 0.0
        self.within = False
        self.begun = False

    def frames(self) -> Filler:
        """Raises PeerWrong for anything that is not an answer to this request."""
        head = bytearray(HEADER_BYTES)
        while self.last is None:
            yield memoryview(head)
            self.begun = self.within = True
            yield from self._frame(head)
            self.within = False
        if self.last is Status.END and self._open:
            raise PeerWrong(f"it says nothing of {len(self._open)} of {len(self._items)} items")

    def _frame(self, head: bytearray) -> Filler:
        header = unpack_header(head)
        table = head + bytes(header.table)
        yield memoryview(table)[HEADER_BYTES:]
        self._session.check_table(table)
        entries = unpack_entries(header, memoryview(table)[HEADER_BYTES:], len(self._items))
        for entry in entries:
            self._expect(entry)
        body = memoryview(uncleared(header.length))
        if body:
            yield body
        name_at, at = len(table) - header.names, 0
        for entry in entries:
            if entry.status is _OK:
                name = table[name_at : name_at + entry.name_length]
                self._give(entry, name, body[at : at + entry.length])
                name_at += entry.name_length
                at += entry.length
            else:
                self._say(entry)

    def _expect(self, entry: Entry) -> None:
        """Before memory is taken for bytes that nobody asked for."""
        if self.last is not None:
            raise PeerWrong("its answer goes on after its end")
        if entry.status in LAST:
            self.last = entry.status
            self.retry = entry.size / 1000
            return
        if entry.item not in self._open:
            raise PeerWrong(f"it answered item {entry.item} twice")
        self._open.discard(entry.item)
        if entry.status is not _OK:
            return
        item = self._items[entry.item]
        if item.length < 0:
            fits = entry.offset == 0 and entry.length == entry.size <= BLOCK_SIZE
        else:
            fits = entry.offset == min(item.offset, entry.size) and entry.length <= item.length
        if not fits or (item.size >= 0 and entry.size != item.size):
            raise PeerWrong("it sent another part than it was asked for, or an object of another size")

    def _say(self, entry: Entry) -> None:
        """What an entry without bytes says."""
        if entry.status is Status.LARGE:
            key = entry.key if entry.key != NO_KEY else b""
            self._arrived(entry.item, Piece(memoryview(b""), 0, entry.size, key, "", large=True))
        elif entry.status not in LAST:
            self._arrived(entry.item, entry.status)

    def _give(self, entry: Entry, name: bytearray, data: memoryview) -> None:
        item = self._items[entry.item]
        found = digest(data)
        if found != entry.digest:
            why = f"{item.path or item.key.hex()}: came with bytes that do not match their digest"
            if item.look:
                raise PeerWrong(why)
            self._arrived(entry.item, Unlike(why))
            return
        self._verify(entry, data, item, found)
        key = entry.key if entry.key != NO_KEY else b""
        version = name.decode("utf-8", "replace") if name else ""
        self._arrived(entry.item, Piece(data, entry.offset, entry.size, key, version))

    def _verify(self, entry: Entry, data: memoryview, item: Item, found: bytes) -> None:
        if self._session.checker:
            self._session.checker.check(data, entry.mark)
        whole = entry.length == entry.size <= BLOCK_SIZE
        if whole and entry.key not in (NO_KEY, found):
            raise PeerWrong(f"{item.path or item.key.hex()}: came with a key that is not that of its bytes")
        if item.key and ((whole and found != item.key) or entry.key not in (NO_KEY, item.key)):
            raise PeerWrong(f"{item.key.hex()}: it sent another blob")

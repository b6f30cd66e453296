"""What peers say to each other: a request, and the frames that answer it.

A connection begins with a handshake (`trust`). Then the client sends a request, the server answers with frames, the
last of which says END or BUSY, and the client may ask again; one request at a time. There is no text and nothing to
negotiate: both ends are cachefs, and another PROTOCOL is refused in the handshake.

A *message* (handshake, request) is its length (4 bytes), MessagePack, and in a sealed session a tag (16 bytes). A
request names up to MOST_ITEMS objects, or parts of them; all travel in one stream, in the order in which they are
ready.

A *frame* answers one item or many: a header of HEADER_BYTES, a table of entries of ENTRY_BYTES, the texts of the
entries' versions (`name_length` bytes each), and the bytes of their objects (`length` bytes each), all in the order of
the table. So what a frame costs, and the calls of the system that bring it, are shared by the small objects in it. The
digest of an entry is of its bytes (XXH3-128, as in `cachefs.digest`) and whoever receives them compares it. Its mark is
their tag (`tags`), or zeros. The tag of a frame is of header, table and texts, so they are believed before any of the
bytes are waited for. Numbers are little-endian.

Everything here comes from outside: what is not understood raises PeerWrong, and no length is believed beyond its limit.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

from cachefs.digest import BLOCK_SIZE, KEY_BYTES
from cachefs.errors import PeerWrong

PROTOCOL = 2

# One request: so many objects that its own cost does not count, so few that its answer stays within some seconds.
MOST_ITEMS = 1024
MOST_BYTES = 256 * 1024 * 1024

# The bytes of one entry, and of all in a frame: a block. A larger object is asked for by block, as it is stored.
MOST_LENGTH = BLOCK_SIZE

# The entries of a frame, and all of their versions' texts.
MOST_ENTRIES = 64
MOST_NAMES = 16 * 1024

# An S3 key has at most 1 KiB, a local path 4 KiB; versions are ETags.
MOST_PATH = 16 * 1024
MOST_VERSION = 1024

# What is said of a catalog: an edition and the name of a node.
MOST_WORD = 512

# A message before anybody has shown who it is, and a request: 1,024 keys of 1 KiB with the rest. (Of longer paths
# fewer go into one request.)
MOST_GREETING = 4096
MOST_REQUEST = 2 * 1024 * 1024

TAG_BYTES = 16
LENGTH = struct.Struct("<I")

NO_INDEX = 0xFFFFFFFF
_MAGIC = b"cf"
_HEADER = struct.Struct("<2sBxHxxII16s")
HEADER_BYTES = _HEADER.size
TAG_AT = HEADER_BYTES - TAG_BYTES
_ENTRY = struct.Struct("<BxHIqqI4x16s16s24s")
ENTRY_BYTES = _ENTRY.size
NO_KEY = bytes(KEY_BYTES)

# Of an object: the number and the tag that goes with it.
MARK_BYTES = 8 + TAG_BYTES
NO_MARK = bytes(MARK_BYTES)


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is asked for: `length` bytes of an object from `offset` on; length -1 = all of it, if at most a block.

    By (dataset, path, version), as the mount looks it up, or by the content key alone. version "" = the one that the
    owner's snapshot serves. size: of the object, where it is known, else -1. word: it is not about an object but about
    the dataset's catalog, see `catalogs`. keep: it is a block that the asker owns and has no room for: keep it for that
    node, fetched if need be, and give it; REFUSED where there is no room either. look: it came with other bytes than
    its digest says; read it before you give it again, and get it anew if it rotted on your disk.
    """

    dataset: Annotated[str, msgspec.Meta(max_length=32)] = ""
    path: Annotated[str, msgspec.Meta(max_length=MOST_PATH)] = ""
    version: Annotated[str, msgspec.Meta(max_length=MOST_VERSION)] = ""
    size: Annotated[int, msgspec.Meta(ge=-1, le=2**62)] = -1
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    length: Annotated[int, msgspec.Meta(ge=-1, le=MOST_LENGTH)] = -1
    key: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)] = b""
    word: Annotated[bytes, msgspec.Meta(max_length=MOST_WORD)] = b""
    keep: bool = False
    look: bool = False


class Request(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """fetch: what is not stored there is fetched from the origin. prefetch: nobody waits for it yet. keep: instead of
    giving these, keep them for their owner, which has no room: each is fetched from it, and answered without bytes.

    patience: milliseconds after which nobody waits for the answer any more.
    """

    items: Annotated[list[Item], msgspec.Meta(min_length=1, max_length=MOST_ITEMS)]
    fetch: bool = False
    prefetch: bool = False
    patience: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 60_000
    keep: bool = False


class Status(IntEnum):
    """OK: bytes follow. LARGE: more than a block; size and key are told, ask by block. MISSING: not there, and it was
    not to be fetched, or cannot be by that node. FAILED: the node could not get it from the origin. REFUSED: more than
    the node gives in one answer, or has room to keep. BUSY: instead of an answer; `size` = milliseconds after which to
    ask again. END: all is said. KEPT: it keeps it for its owner."""

    OK = 0
    LARGE = 1
    MISSING = 2
    FAILED = 3
    REFUSED = 4
    BUSY = 5
    END = 6
    KEPT = 7


LAST = (Status.BUSY, Status.END)
_STATUSES = tuple(Status)
_OK = Status.OK


class Header(NamedTuple):
    """entries: how many. names, length: bytes of all their versions' texts, and of all their objects."""

    entries: int
    names: int
    length: int

    @property
    def table(self) -> int:
        """Bytes of entries and names, which say what the rest is."""
        return self.entries * ENTRY_BYTES + self.names


class Entry(NamedTuple):
    """item: its number in the request. size: of the whole object, -1 where it is not known. key: its content key,
    NO_KEY where it is not known. mark: of the bytes that follow, where the session has their tags.
    """

    status: Status
    name_length: int
    item: int
    size: int
    offset: int
    length: int
    key: bytes
    digest: bytes
    mark: bytes


def pack_header(entries: int, names: int, length: int) -> bytes:
    """A header without its tag (zeros)."""
    return _HEADER.pack(_MAGIC, PROTOCOL, entries, names, length, b"")


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """Raises PeerWrong."""
    magic, protocol, entries, names, length, _ = _HEADER.unpack(data)
    if magic != _MAGIC or protocol != PROTOCOL:
        raise PeerWrong("what it sent is no frame of this protocol")
    if not 0 < entries <= MOST_ENTRIES or names > MOST_NAMES or length > MOST_LENGTH:
        raise PeerWrong("a frame of it is larger than frames are, or empty")
    return Header(entries, names, length)


def pack_entry(
    status: Status,
    index: int = NO_INDEX,
    *,
    size: int = -1,
    offset: int = 0,
    length: int = 0,
    name_length: int = 0,
    key: bytes = NO_KEY,
    digest: bytes = NO_KEY,
    mark: bytes = NO_MARK,
) -> bytes:
    return _ENTRY.pack(status, name_length, index, size, offset, length, key, digest, mark)


def unpack_entries(header: Header, table: memoryview, items: int) -> list[Entry]:
    """The entries of a frame that answers a request of `items` items; `table` is as long as the header says.

    Raises PeerWrong for whatever is none, and when all together are not what the header says.
    """
    entries = []
    names = length = 0
    for status, *rest in _ENTRY.iter_unpack(table[: header.entries * ENTRY_BYTES]):
        if status >= len(_STATUSES):
            raise PeerWrong("what it sent is no entry of a frame")
        entry = Entry(_STATUSES[status], *rest)
        _check(entry, items)
        names += entry.name_length
        length += entry.length
        entries.append(entry)
    if names != header.names or length != header.length:
        raise PeerWrong("a frame of it does not hold what its entries say")
    return entries


def _check(entry: Entry, items: int) -> None:
    if entry.status is _OK:
        if entry.item >= items:
            raise PeerWrong(f"it answered item {entry.item} of {items}")
        if entry.offset < 0 or entry.name_length > MOST_VERSION:
            raise PeerWrong("an entry of it is larger than entries are")
        if entry.size < entry.offset + entry.length:
            raise PeerWrong("an entry of it goes beyond the end of its object")
        return
    last = entry.status in LAST
    if last != (entry.item == NO_INDEX) or (not last and entry.item >= items):
        raise PeerWrong(f"it answered item {entry.item} of {items}")
    if entry.size < -1 or entry.length or entry.name_length:
        raise PeerWrong("an entry of it has bytes and does not say of what")


encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(Request).decode


def decode_request(data: bytes) -> Request:
    """Raises PeerWrong for what is none."""
    try:
        return _decode_request(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerWrong(f"what it sent is no request ({error})") from None

"""What peers say to each other of catalogs: the word of an item, and the state that answers it.

A catalog may be gigabytes and takes hours to list, so nothing of it is one question and one answer. `Ask`, `Renew` and
`Take` begin work, or find it under way, and are asked again until the state says how it ended; `Block` brings the file
block by block, each with its digest as any bytes of peers. Which file, is said by its `Edition`.

An edition is a catalog as one node has it. snapshot: the digest of its names, sizes and versions, the same on every
node. number: see `datasets.DatasetRecord`; the greatest is the newest, and where two are equal the greater snapshot
counts, so that all nodes come to the same. size, key: of the file on that node (content key, as in `cachefs.digest`):
inode numbers, and so the bytes, may be others elsewhere. keys: so many content keys are in it (`cachefs seal`); a node
that has the snapshot brings it again where that is more than it has.

All of this comes from outside: it is bounded, and what is not understood raises PeerWrong.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Annotated

import msgspec

from cachefs.catalog import Catalog
from cachefs.cluster.peers.wire import encode
from cachefs.digest import BLOCK_SIZE, KEY_BYTES, digest, key_of_blocks
from cachefs.errors import CatalogError, PeerWrong

# A catalog of 10^10 names of 100 bytes.
MOST_SIZE = 2**40

# Microseconds since the epoch until the year 2255; what a double can count.
MOST_NUMBER = 2**53

# Nodes that a state names as left behind; the others are counted.
MOST_BEHIND = 64

# Of an answer: so many names and reasons.
MOST_ANSWER = 64 * 1024

_Snapshot = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}\\Z")]
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
_Text = Annotated[str, msgspec.Meta(max_length=400)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Edition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """See above."""

    number: Annotated[int, msgspec.Meta(ge=0, le=MOST_NUMBER)]
    snapshot: _Snapshot
    size: Annotated[int, msgspec.Meta(ge=1, le=MOST_SIZE)]
    key: _Key
    keys: _Count = 0

    @property
    def order(self) -> tuple[int, str]:
        return self.number, self.snapshot


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ask"):
    """Which edition do you have? make: list, if you have none."""

    make: bool = False


class Renew(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="renew"):
    """List again, and let the whole cluster serve that. ticket: drawn by lot, the same each time this is asked."""

    ticket: _Key


class Take(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="take"):
    """The cluster goes over to this edition, which `node` has: bring it. switch: and serve it from now on."""

    node: _Name
    edition: Edition
    switch: bool


class Block(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="block"):
    """Bytes of the file of that snapshot and key: which, say offset and length of the item."""

    snapshot: _Snapshot
    key: _Key


Word = Ask | Renew | Take | Block

HAS, NONE, WORKS, FAILED = "has", "none", "works", "failed"


class State(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """is_: "has" edition; "none", and nothing is under way; "works", and how far it is; "failed", and why.

    After Take: "has" when it was brought (or served), "none" where the dataset has no catalog and needs none. behind:
    nodes that a Renew could not take along and why; behind_total counts them all.
    """

    is_: Annotated[str, msgspec.Meta(pattern="^(has|none|works|failed)\\Z")]
    edition: Edition | None = None
    done: _Count = 0
    total: _Count = 0
    bytes: _Count = 0
    what: Annotated[str, msgspec.Meta(max_length=40)] = ""
    why: _Text = ""
    behind: Annotated[list[tuple[_Name, _Text]], msgspec.Meta(max_length=MOST_BEHIND)] = []
    behind_total: _Count = 0

    @property
    def progress(self) -> tuple[int, int, int, str]:
        return self.done, self.total, self.bytes, self.what


_decode_word = msgspec.msgpack.Decoder(Word).decode
_decode_state = msgspec.msgpack.Decoder(State).decode


def word_of(data: bytes) -> Word:
    """Raises PeerWrong for what is none."""
    try:
        word: Word = _decode_word(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerWrong(f"what it says of a catalog is nothing known ({error})") from None
    return word


def state_of(data: bytes | memoryview) -> State:
    """Raises PeerWrong for what is none."""
    try:
        if len(data) > MOST_ANSWER:
            raise PeerWrong("its answer about a catalog is larger than answers are")
        state: State = _decode_state(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerWrong(f"its answer about a catalog is none ({error})") from None
    if state.is_ == HAS and state.edition is None:
        raise PeerWrong("it has a catalog and does not say which")
    return state


def packed(what: Word | State) -> bytes:
    return encode(what)


def cut(text: str, most: int = 400) -> str:
    """So much of a reason as may travel."""
    return text[:most]


def checked_edition(number: int, snapshot: str, size: int, key: bytes, keys: int) -> Edition:
    """Raises PeerWrong for what cannot be one."""
    try:
        return msgspec.convert((number, snapshot, size, key, keys), Edition)
    except msgspec.ValidationError as error:
        raise PeerWrong(f"what it says of a catalog cannot be ({error})") from None


def edition_of(number: int, snapshot: str, file: Path) -> Edition:
    """The edition that this file is. Reads all of it. Raises OSError."""
    return Edition(number, snapshot, os.stat(file).st_size, _key_of(file), keys_in(file))


def keys_in(file: Path) -> int:
    """Of how many files a catalog has the content key; 0 where it cannot be read. Walks a part of it."""
    try:
        with Catalog.open(file) as catalog:
            return catalog.count_keys()
    except CatalogError:
        return 0


def _key_of(file: Path) -> bytes:
    """The content key of a file, read block by block."""
    digests = []
    view = memoryview(bytearray(BLOCK_SIZE))
    with open(file, "rb", buffering=0) as stream:
        while count := _fill(stream, view):
            digests.append(digest(view[:count]))
    return digests[0] if len(digests) == 1 else key_of_blocks(digests)


def _fill(stream: FileIO, view: memoryview) -> int:
    got = 0
    while got < len(view) and (count := stream.readinto(view[got:])):
        got += count
    return got

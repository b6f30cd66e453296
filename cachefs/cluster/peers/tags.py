"""Tags of objects' bytes: made once by the node that gives an object, kept, and checked by whoever receives it.

A tag per frame would be of the bytes of one answer, and so the server would have to read all bytes for each answer. A
tag per object is the same for every receiver, so a node that has made it once lets the kernel send the file (sendfile).
The table that names the tags is sealed in each session (`trust`), so none can be put to another object or used again.

Tags are AES-256-GMAC (NIST SP 800-38D). A number is used once under a key, and a key lives as long as a process: it is
made from the cluster's secret and 32 bytes drawn by lot, which the server says in its handshake.
"""

from __future__ import annotations

import hmac
import itertools
import mmap
import struct

from cachefs.cluster.peers.wire import MARK_BYTES
from cachefs.errors import PeerWrong

# Objects whose tag is remembered: 20 MiB at most, taken as they come. Others are read once more for each answer.
SLOTS = 1 << 19

_SLOT = 16 + MARK_BYTES
_NUMBER = struct.Struct("<Q")


class Tagger:
    """Of a node that gives objects; one for all its sessions, and of any thread.

    A mark is the number and the tag, MARK_BYTES in all. Marks lie in a table where the digest says (a later object with
    the same place takes it): nothing to keep in order, and 40 bytes each instead of the 250 of a dictionary.
    """

    def __init__(self, key: bytes, *, slots: int = SLOTS) -> None:
        self._gmac = _Gmac(key)
        self._slots = slots
        self._table = mmap.mmap(-1, slots * _SLOT)
        self._numbers = itertools.count(1)

    def kept(self, digest: bytes) -> bytes | None:
        """The mark of the bytes that have this digest (16 bytes), if it was made and is still there."""
        at = self._at(digest)
        slot = self._table[at : at + _SLOT]
        return slot[16:] if slot[:16] == digest else None

    def mark(self, digest: bytes, data: bytes | bytearray | memoryview) -> bytes:
        """Make the mark of `data`, which has this digest."""
        number = _NUMBER.pack(next(self._numbers))
        mark = number + self._gmac.tag(number, data)
        at = self._at(digest)
        self._table[at : at + _SLOT] = digest + mark
        return mark

    def _at(self, digest: bytes) -> int:
        return int.from_bytes(digest[:8], "big") % self._slots * _SLOT


class Checker:
    """Of a node that receives objects, for one session."""

    def __init__(self, key: bytes) -> None:
        self._gmac = _Gmac(key)

    def check(self, data: bytes | bytearray | memoryview, mark: bytes) -> None:
        """Raises PeerWrong when it is not the mark of these bytes."""
        if not hmac.compare_digest(self._gmac.tag(mark[: _NUMBER.size], data), mark[_NUMBER.size :]):
            raise PeerWrong("what came does not bear its sign: it was changed on the way")


class _Gmac:
    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._gcm = AESGCM(key)

    def tag(self, number: bytes, data: bytes | bytearray | memoryview) -> bytes:
        return self._gcm.encrypt(bytes(4) + number, b"", data)

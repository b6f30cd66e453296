"""Which content is which version of which object: what lets a fetch be avoided.

diskcache keeps it, in the cache's home. Only this process writes, in batches; a lost batch or a lost index costs
fetches, never correctness, because what is served is found through refs and checked by digest.

diskcache's default Disk pickles (CVE-2025-69872); RawDisk stores and returns bytes only and refuses the rest.
Policy "none" and cull_limit=0: what is dropped is decided by residency, not by diskcache.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from diskcache import UNKNOWN, Cache, Disk

log = logging.getLogger("cachefs.index")

# Never reached: diskcache's size_limit counts its own database, and culling is off. Its default is 1 GiB.
_SIZE_LIMIT = 1 << 50
_MODE_RAW = 1

# Records per transaction. One transaction costs about as much as 100 inserts, so larger batches gain little,
# and what a kill -9 loses is at most this many records (each costs one look at the ref, or one fetch).
BATCH = 256

# While the disk is full, so many wait for it; more are dropped, and cost what a lost batch costs.
MOST_WAITING = 16 * BATCH


class RawDisk(Disk):  # type: ignore[misc]  # diskcache is untyped
    """Keys and values are bytes, stored inline. Nothing is ever pickled or unpickled."""

    def put(self, key: bytes) -> tuple[Any, bool]:
        return sqlite3.Binary(key), True

    def get(self, key: Any, raw: bool) -> bytes:
        return bytes(key)

    def store(self, value: bytes, read: bool, key: Any = UNKNOWN) -> tuple[int, int, None, Any]:
        if not isinstance(value, bytes):
            raise TypeError("the index stores bytes only")
        return 0, _MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> bytes:
        if mode != _MODE_RAW or filename is not None:
            raise sqlite3.DatabaseError("the index holds a record that cachefs did not write")
        return bytes(value)


class Known(msgspec.Struct, frozen=True, array_like=True):
    """One version of one object that is, or was, stored. key: 16 bytes. size: bytes."""

    key: bytes
    size: int
    mtime_ns: int
    version: str
    path: str
    dataset: str


class Seen(NamedTuple):
    """The version of an object that a snapshot without a catalog serves."""

    version: str
    size: int
    mtime_ns: int


_GUEST = b"g"

_encode = msgspec.msgpack.Encoder().encode
_decode_known = msgspec.msgpack.Decoder(Known).decode
_decode_seen = msgspec.msgpack.Decoder(tuple[str, int, int]).decode


def _name(*parts: str) -> bytes:
    return blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).digest()


class Index:
    """Reads see what was written before them, flushed or not. Not thread-safe: the fetcher's loop owns it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unsaved: dict[bytes, bytes | None] = {}
        self._full = False
        self._cache = self._open()

    def _open(self) -> Cache:
        try:
            return self._make()
        except (sqlite3.DatabaseError, OSError) as error:
            return self._rebuild(error)

    def _make(self) -> Cache:
        return Cache(
            str(self._folder),
            disk=RawDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=_SIZE_LIMIT,
            statistics=False,
        )

    def _rebuild(self, error: Exception) -> Cache:
        log.warning("%s: the index is damaged (%s); starting a new one, stored objects stay", self._folder, error)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._make()

    # --- versions ---

    @staticmethod
    def name(domain: str, path: str, version: str) -> bytes:
        """16 bytes by which a version of an object is found again: `named`."""
        return _name(domain, path, version)

    def named(self, name: bytes) -> Known | None:
        """May be used from another thread, and then misses now and then what is being written just then."""
        raw = self._get(b"v" + name)
        return _decode_known(raw) if raw is not None else None

    def known(self, domain: str, path: str, version: str) -> Known | None:
        return self.named(_name(domain, path, version))

    def learn(self, domain: str, known: Known) -> None:
        self._set(b"v" + _name(domain, known.path, known.version), _encode(known))

    def forget(self, domain: str, path: str, version: str) -> None:
        self._set(b"v" + _name(domain, path, version), None)

    def records(self) -> Iterator[Known]:
        """Every version known as of the last flush, in no order, streaming. May be used from another thread."""
        return (known for _, known in self.named_records())

    def named_records(self) -> Iterator[tuple[bytes, Known]]:
        """The same, each with its name."""
        for name in self._cache.iterkeys():
            if name[:1] == b"v" and (raw := self._get(name)) is not None:
                yield name[1:], _decode_known(raw)

    # --- content that can be recognised before it is fetched ---

    def same_content(self, hint: str, size: int) -> bytes | None:
        """Content key of an object whose origin described its content by `hint` (an MD5, say) and `size`."""
        return self._get(b"h" + _name(hint, str(size)))

    def learn_content(self, hint: str, size: int, key: bytes) -> None:
        self._set(b"h" + _name(hint, str(size)), key)

    # --- what nodes of the cluster keep for each other ---

    def lodged_with(self, key: bytes) -> str:
        """The name of that node; "" = nobody keeps it."""
        raw = self._get(b"l" + key)
        return raw.decode("utf-8", "replace") if raw is not None else ""

    def lodge(self, key: bytes, node: str | None) -> None:
        """None: nobody keeps it any more."""
        self._set(b"l" + key, None if node is None else node.encode("utf-8", "replace"))

    def host(self, key: bytes, owner: str | None) -> None:
        """This node keeps it for `owner`, or for nobody any more."""
        self._set(_GUEST + key, None if owner is None else owner.encode("utf-8", "replace"))

    def guests(self) -> Iterator[tuple[bytes, str]]:
        """(key, owner) of what this node keeps for others, as of the last flush. May be used from another thread."""
        for name in self._cache.iterkeys():  # in order: theirs are among the first
            if name[:1] > _GUEST:
                return
            if name[:1] == _GUEST and (raw := self._get(name)) is not None:
                yield name[1:], raw.decode("utf-8", "replace")

    # --- snapshots without a catalog ---

    def seen(self, dataset: str, snapshot: str, path: str) -> Seen | None:
        raw = self._get(b"n" + _name(dataset, snapshot, path))
        return Seen(*_decode_seen(raw)) if raw is not None else None

    def see(self, dataset: str, snapshot: str, path: str, seen: Seen) -> None:
        self._set(b"n" + _name(dataset, snapshot, path), _encode(tuple(seen)))

    # --- storage ---

    def _get(self, name: bytes) -> bytes | None:
        if name in self._unsaved:
            return self._unsaved[name]
        try:
            value = self._cache.get(name)
        except sqlite3.DatabaseError as error:
            self._cache = self._rebuild(error)
            return None
        return value if value is None else bytes(value)

    def _set(self, name: bytes, value: bytes | None) -> None:
        self._unsaved[name] = value
        if len(self._unsaved) % BATCH == 0:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in one transaction. A full disk makes it wait, or drops it, with a log line."""
        batch, self._unsaved = self._unsaved, {}
        if not batch:
            return
        try:
            with self._cache.transact(retry=True):
                for name, value in batch.items():
                    if value is None:
                        self._cache.delete(name)
                    else:
                        self._cache.set(name, value)
        except (sqlite3.OperationalError, OSError) as error:
            kept = len(batch) <= MOST_WAITING
            if kept:
                self._unsaved = batch | self._unsaved
            if not kept or not self._full:
                word = "wait" if kept else "are dropped"
                log.warning("%s: %d records of the index %s: %s", self._folder, len(batch), word, error)
            self._full = True
            return
        except sqlite3.DatabaseError as error:
            self._cache = self._rebuild(error)
        self._full = False

    def close(self) -> None:
        self.flush()
        self._cache.close()

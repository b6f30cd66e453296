"""What a fetcher works with that may not write the cache: a store that has nothing and no room, an index in memory.

Everything it fetches passes through memory then. Its answers are those of a cache that is full.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cachefs.config import CacheConfig
from cachefs.errors import CacheError, CacheFull
from cachefs.fetcher.index import Index
from cachefs.store import Part, Store, Usage
from cachefs.store.ledger import Book, Ledger

_WHY = "another process has this cache, so nothing is stored here"


class NoStore(Store):
    """Has nothing, keeps nothing. A test compares its methods with those of Store."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.seal = 0
        self.ledger = Ledger()

    @property
    def out(self) -> dict[Path, str]:
        return {}

    @property
    def live(self) -> tuple[Path, ...]:
        return ()

    def usage(self) -> Usage:
        return Usage(0, 0)

    def path(self, key: bytes) -> Path:
        return self.config.home

    def put(self, data: Any, *, links: Iterable[tuple[str, str]] = (), tag: bytes = b"") -> bytes:
        raise CacheFull(_WHY)

    def part(self, ref: str, size: int, owner: str = "") -> Part:
        raise CacheError(_WHY)

    def publish(self, folder: Any, source: str, key: bytes, digests: list[bytes], links: list[tuple[str, str]]) -> bool:
        raise CacheError(_WHY)

    def came(self, count: int) -> None:
        raise CacheError(_WHY)

    def arrived(self) -> int:
        return 0

    def has(self, key: bytes) -> bool:
        return False

    def sealed(self, key: bytes) -> bool:
        return False

    def check(self, key: bytes) -> bool:
        return False

    def link(self, key: bytes, links: Iterable[tuple[str, str]]) -> bool:
        return False

    def link_intact(self, key: bytes, links: list[tuple[str, str]]) -> bool:
        return False

    def key_of(self, dataset: str, ref: str) -> bytes | None:
        return None

    def drop(self, key: bytes) -> int:
        return 0

    def unlink_ref(self, dataset: str, ref: str) -> int:
        return 0

    def discard_part(self, ref: str) -> int:
        return 0

    def open_book(self, dataset: str) -> Book:
        return Book()

    def holds(self, book: Book, file: str, info: os.stat_result) -> bool:
        return False

    def has_part(self, ref: str) -> bool:
        return False

    def parts_of(self, dataset: str) -> Iterator[str]:
        return iter(())

    def sweep(self) -> int:
        return 0

    def keys(self) -> Iterator[bytes]:
        return iter(())

    def parts(self) -> Iterator[str]:
        return iter(())

    def refs(self, dataset: str) -> Iterator[str]:
        return iter(())

    def datasets(self) -> Iterator[str]:
        return iter(())


class _Table(dict[bytes, bytes]):
    """The few methods of diskcache that Index uses, in memory."""

    def set(self, name: bytes, value: bytes) -> None:
        self[name] = value

    def delete(self, name: bytes) -> None:
        self.pop(name, None)

    def transact(self, retry: bool = False) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def iterkeys(self) -> Iterator[bytes]:
        return iter(list(self))

    def close(self) -> None:
        self.clear()


class MemoryIndex(Index):
    def __init__(self) -> None:
        super().__init__(Path())

    def _make(self) -> Any:
        return _Table()

"""What a consumer said that it will read, as the fetcher looks it up: by number, one piece at a time.

Nothing of it is believed. A name that is none, that the catalog does not have or that lies outside the dataset is
None here, and so is a number whose memory was cut off since.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from cachefs.errors import ObjectNotFound, PlanError
from cachefs.fetcher.attachments import Attachment
from cachefs.messages import Announce, Plan
from cachefs.plans import (
    FRONTIER,
    IDS,
    INDICES,
    NAMES,
    PAGE,
    POSITION,
    Names,
    Order,
    read_word,
    require_count,
    require_memory,
    write_word,
)

# Parts of a plan that a consumer may have open: an epoch and the next are two, a stream of names some dozens.
MOST_PARTS = 256


class Wanted(NamedTuple):
    """An object that will be read. version "" and size -1: not known before it is fetched."""

    path: str
    version: str
    size: int


class _Part(NamedTuple):
    """Items [start, stop) of a consumer."""

    start: int
    stop: int
    kind: str
    fd: int
    entries: Names | Order


class Announced:
    """Owns its descriptors; `close` it. Numbers count items since the consumer announced itself."""

    def __init__(self, attachment: Attachment, home: Path, request: Announce, fd: int) -> None:
        """Takes `fd` over when it succeeds. Raises PlanError, StaleObject (the snapshot is gone)."""
        self.attachment = attachment
        self._catalog = attachment.catalog(home)
        if require_memory(fd) < PAGE:
            raise PlanError("a consumer's page is missing")
        self._names = Names(fd, PAGE, request.names)
        self._prefix = request.prefix
        self._page = fd
        self._parts: list[_Part] = []
        self._begin = max(0, request.begin)

    @property
    def end(self) -> int:
        return self._parts[-1].stop if self._parts else self._begin

    def plan(self, request: Plan, fd: int) -> None:
        """From number `request.at` on, these. Takes `fd` over when it succeeds. Raises PlanError."""
        if not 0 <= request.at <= self.end:
            raise PlanError(f"a plan that goes on at item {request.at}, where {self.end} are known")
        require_count(request.count, "entries")
        entries: Names | Order
        if request.kind == NAMES:
            entries = Names(fd, 0, request.count)
        elif request.kind == IDS and self._catalog is None:
            raise PlanError("ids were given, and this snapshot of the dataset has no catalog that they could be of")
        elif request.kind in (INDICES, IDS):
            entries = Order(fd, request.count, request.kind)
        else:
            raise PlanError(f"entries of a kind that this fetcher does not know: {request.kind[:40]!r}")
        if len(self._parts) >= MOST_PARTS:
            raise PlanError(f"more than {MOST_PARTS} parts of a plan at once")
        self._cut(request.at)
        self._begin = request.at
        self._parts.append(_Part(request.at, request.at + request.count, request.kind, fd, entries))

    def _cut(self, at: int) -> None:
        kept = []
        for part in self._parts:
            if part.start >= at:
                os.close(part.fd)
            else:
                kept.append(part._replace(stop=min(part.stop, at)))
        self._parts = kept

    def forget(self, before: int) -> None:
        """Parts that lie wholly before this number are not looked at again."""
        while self._parts and self._parts[0].stop <= before:
            part = self._parts.pop(0)
            self._begin = part.stop
            os.close(part.fd)

    def position(self) -> int:
        """Items that the consumer has handed out, as far as that can be."""
        return max(0, min(self.end, read_word(self._page, POSITION)))

    def tell(self, frontier: int) -> None:
        """Let the consumer know the first item that is not ready."""
        with contextlib.suppress(OSError):  # it sealed its page: then it does not want to know
            write_word(self._page, FRONTIER, frontier)

    def wanted(self, start: int, stop: int) -> list[Wanted | None]:
        """Items [start, stop), None for what is no object of the dataset. Raises CatalogError."""
        found: list[Wanted | None] = []
        for part in self._parts:
            if part.stop <= start or part.start >= stop:
                continue
            first, last = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if isinstance(part.entries, Names):
                found += [self._by_name(part.entries.name(n)) for n in range(first, last)]
                continue
            numbers = part.entries.piece(first, last)
            look = self._by_id if part.kind == IDS else self._by_index
            found += [look(number) for number in numbers]
            found += [None] * (last - first - len(numbers))
        return found

    def _by_index(self, index: int) -> Wanted | None:
        return self._by_name(self._names.name(index))

    def _by_name(self, name: str | None) -> Wanted | None:
        if name is None:
            return None
        path = self._prefix + name
        if not self.attachment.record.covers(path):
            return None
        if self._catalog is None:
            return Wanted(path, "", -1)
        row = self._catalog.find(path)
        return None if row is None or row.directory else Wanted(path, row.version, row.size)

    def _by_id(self, id: int) -> Wanted | None:
        row = self._catalog.get(id) if self._catalog is not None else None
        if row is None or row.directory:
            return None
        assert self._catalog is not None
        try:
            return Wanted(self._catalog.object_path(id), row.version, row.size)
        except ObjectNotFound:
            return None

    def close(self) -> None:
        self._cut(-1)
        os.close(self._page)

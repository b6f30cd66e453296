"""What a consumer said that it will read, as the fetcher looks it up: by number, one piece at a time.

Nothing of it is believed. A name that is none, that the catalog does not have or that lies outside the dataset is
None here, and so is a number whose memory was cut off since.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachefs.errors import ObjectNotFound, PlanError
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.prefetch.release import release
from cachefs.fetcher.prefetch.timetable import Timetable
from cachefs.messages import Announce, Plan
from cachefs.plans import (
    FRONTIER,
    IDS,
    INDICES,
    LONGEST_NAME,
    NAMES,
    PAGE,
    POSITION,
    Names,
    Order,
    read_word,
    require_count,
    require_memory,
    require_number,
    write_word,
)

# Parts of a plan that a consumer may have open: an epoch and the next are two, a stream of names some dozens.
MOST_PARTS = 256

# Where every name is a key, `..` is one like any other. At all other origins it leads out of the dataset.
_KEYS = ("s3", "gs", "az")


class Wanted(NamedTuple):
    """An object that will be read. version "" and size -1: not known before it is fetched."""

    path: str
    version: str
    size: int


@dataclass(eq=False)
class Part:
    """Items [start, stop) of a consumer. count: of its entries, some of which may have been replaced since.

    table: where in it each name is; None as long as nobody has looked it through.
    """

    start: int
    stop: int
    kind: str
    fd: int
    count: int
    entries: Names | Order
    table: Timetable | None = None


class Loose:
    """What one part is read by in a thread. It has descriptors of its own: those of a plan may be closed, and their
    numbers be other files', at any moment. `close` it, on the fetcher's loop. Raises PlanError, OSError."""

    def __init__(self, part: Part, page: int, names: int) -> None:
        self._kind = part.kind
        self._fds = [os.dup(part.fd)]
        try:
            self._fds.append(os.dup(page))
            own, page = self._fds
            self._order = Order(own, part.count, part.kind) if part.kind != NAMES else None
            self._names = Names(own, 0, part.count) if part.kind == NAMES else Names(page, PAGE, names)
        except BaseException:
            self.close()
            raise

    def names(self, start: int, stop: int) -> Iterator[bytes]:
        """Of entries [start, stop), as `Announced.next_use` looks for them; b"" for what is none."""
        if self._order is None:
            return map(self._names.raw, range(start, stop))
        numbers = self._order.piece(start, stop)
        return map(_id_name, numbers) if self._kind == IDS else map(self._names.raw, numbers)

    def close(self) -> None:
        for fd in self._fds:
            release(fd)


def _id_name(id: int) -> bytes:
    return id.to_bytes(8, "little")


class Announced:
    """Owns its descriptors; `close` it. Numbers count items since the consumer announced itself."""

    def __init__(self, attachment: Attachment, home: Path, request: Announce, fd: int) -> None:
        """Takes `fd` over when it succeeds. Raises PlanError, StaleObject (the snapshot is gone)."""
        self.attachment = attachment
        self._keys = attachment.identity.partition(" ")[0] in _KEYS
        self._catalog = attachment.catalog(home)
        if require_memory(fd) < PAGE:
            raise PlanError(f"its page is missing: the memory that it passes begins with {PAGE} bytes for its position")
        require_number(request.begin)
        if "\0" in request.prefix or len(request.prefix) > LONGEST_NAME:
            raise PlanError(
                f"no name begins with its prefix: there is a NUL in it, or more than {LONGEST_NAME} letters"
            )
        self._names = Names(fd, PAGE, request.names)
        self._prefix = request.prefix
        self._page = fd
        self._parts: list[Part] = []
        self._begin = request.begin

    @property
    def begin(self) -> int:
        """The first number that is known, or will be."""
        return self._parts[0].start if self._parts else self._begin

    @property
    def end(self) -> int:
        return self._parts[-1].stop if self._parts else self._begin

    @property
    def parts(self) -> Sequence[Part]:
        return self._parts

    @property
    def descriptors(self) -> int:
        return 1 + len(self._parts)

    def plan(self, request: Plan, fd: int) -> None:
        """From number `request.at` on, these. Takes `fd` over when it succeeds. Raises PlanError."""
        if not 0 <= request.at <= self.end:
            raise PlanError(f"it goes on at item {request.at}, where {self.end} are known: leave none out")
        require_count(request.count, "entries")
        require_number(request.at + request.count)
        entries: Names | Order
        if request.kind == NAMES:
            entries = Names(fd, 0, request.count)
        elif request.kind == IDS and self._catalog is None:
            raise PlanError(
                "ids were given, and this snapshot of the dataset has no catalog that they could be of: give names, or "
                "list the dataset first (`cachefs warm`)"
            )
        elif request.kind in (INDICES, IDS):
            entries = Order(fd, request.count, request.kind)
        else:
            raise PlanError(
                f"entries of a kind that this fetcher does not know: {request.kind[:40]!r}; it knows {INDICES}, {IDS} "
                f"and {NAMES}"
            )
        if len(self._parts) >= MOST_PARTS:
            raise PlanError(
                f"more than {MOST_PARTS} parts of a plan at once: give larger ones, or wait until some are over"
            )
        self._cut(request.at)
        self._begin = request.at
        end = request.at + request.count
        self._parts.append(Part(request.at, end, request.kind, fd, request.count, entries))

    def _cut(self, at: int) -> None:
        kept = []
        for part in self._parts:
            if part.start >= at:
                release(part.fd)
            else:
                part.stop = min(part.stop, at)
                kept.append(part)
        self._parts = kept

    def forget(self, before: int) -> None:
        """Parts that lie wholly before this number are not looked at again."""
        while self._parts and self._parts[0].stop <= before:
            part = self._parts.pop(0)
            self._begin = part.stop
            release(part.fd)

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

    def next_use(self, path: str, number: int) -> int | None:
        """The first item from `number` on that is this object; None: there is none, as far as is known."""
        if not path.startswith(self._prefix):
            return None
        name = hash(path[len(self._prefix) :].encode())
        for part in self._parts:
            if part.table is None or part.stop <= number:
                continue
            key = name if part.kind != IDS else self._id_key(path)
            found = part.table.next(key, max(0, number - part.start)) if key is not None else None
            if found is not None and part.start + found < part.stop:
                return part.start + found
        return None

    def _id_key(self, path: str) -> int | None:
        row = self._catalog.find(path) if self._catalog is not None else None
        return hash(_id_name(row.id)) if row is not None else None

    def loose(self, part: Part) -> Loose:
        """Raises PlanError, OSError."""
        return Loose(part, self._page, self._names.count)

    def _by_index(self, index: int) -> Wanted | None:
        return self._by_name(self._names.name(index))

    def _by_name(self, name: str | None) -> Wanted | None:
        if name is None:
            return None
        path = self._prefix + name
        if not self.attachment.record.covers(path):
            return None
        if self._catalog is None:
            return Wanted(path, "", -1) if self._keys or "/../" not in f"{path}/" else None
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
        release(self._page)

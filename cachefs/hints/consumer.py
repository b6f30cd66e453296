"""A program that says what it will read, and how far it is.

Items are numbered from the moment it announces itself; a plan says which object each number is. Progress is a number in
shared memory: telling it costs 0.1 us and no system call. The names of a dataset are written once, so that the order of
an epoch is four bytes per item.

A fetcher that dies takes the plans with it. Once a second, while progress is told, the consumer looks whether its
fetcher is still there, and tells the next one everything again. It starts none for that: whoever misses something does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from cachefs.client.session import RETRY_FIRST, RETRY_LAST, LostFetcher, Session
from cachefs.config import CacheConfig
from cachefs.errors import CacheFSError, FetcherError, PlanError
from cachefs.hints.line import Line
from cachefs.messages import Announce, Announced, Done, Plan, Withdraw
from cachefs.plans import FRONTIER, IDS, INDICES, NAMES, PAGE, POSITION, shared_memory, write_names, write_order

# How often the fetcher's life is looked at, and how long the training process may be held up to tell a new one.
LOOK_SECONDS = 1.0
AGAIN_SECONDS = 2.0

# The longest that the first plan may wait for a fetcher to start: training can do without.
FIRST_SECONDS = 30.0


@dataclass
class _Part:
    """Items [at, at + count): memory that the fetcher has, or will have."""

    at: int
    count: int
    kind: str
    fd: int


@dataclass
class _Kept:
    """What must be given back at the end, by the process that made it."""

    pid: int
    page: int
    parts: list[_Part]
    line: Line | None = None

    def give_back(self) -> None:
        if os.getpid() != self.pid:
            return  # a child's copies: the parent's connection is not ours to end
        if self.line is not None:
            self.line.close()
        for fd in (self.page, *(part.fd for part in self.parts)):
            os.close(fd)


class Consumer:
    """One reader of one dataset: a rank of a job, or a program whose reads are known.

    names: object paths without `prefix`, for plans that are indices into them. label: what `cachefs status` calls it.
    mountpoint: of the mount that it reads through, if it does. follow: it will not tell its progress; what it names is
    fetched as fast as it comes. Does nothing in a child made by fork. Methods raise the errors of cachefs.errors; `at`
    none.
    """

    def __init__(
        self,
        config: CacheConfig,
        session: Session,
        names: Sequence[str] = (),
        *,
        prefix: str = "",
        label: str = "",
        follow: bool = False,
        mountpoint: str = "",
    ) -> None:
        self.config = config
        self.session = session
        self._announce = Announce(
            attachment=0, label=label, names=len(names), prefix=prefix, follow=follow, mountpoint=mountpoint
        )
        self._lock = threading.Lock()
        self._consumer = 0
        self._look_at = 0.0
        self._kept = _Kept(os.getpid(), shared_memory(), [])
        self._end = weakref.finalize(self, self._kept.give_back)
        os.ftruncate(self._kept.page, PAGE)
        if names:
            write_names(self._kept.page, PAGE, names)
        self._words = memoryview(mmap.mmap(self._kept.page, PAGE)).cast("q")

    # --- what it will read ---

    @property
    def end(self) -> int:
        """The number of the first item that no plan says."""
        parts = self._kept.parts
        return parts[-1].at + parts[-1].count if parts else self.position

    @property
    def parts(self) -> int:
        """Of how many pieces the plan is. A fetcher takes a few hundred."""
        return len(self._kept.parts)

    def plan(self, order: array[int], *, at: int | None = None) -> None:
        """From item `at` on (None: after all that is planned) these indices into the names.

        order: of type "I". What was planned from there on is void.
        """
        self._plan_order(order, INDICES, at)

    def plan_ids(self, ids: array[int], *, at: int | None = None) -> None:
        """The same by inode numbers of a mount, of type "Q"."""
        self._plan_order(ids, IDS, at)

    def plan_names(self, names: Sequence[str], *, at: int | None = None) -> None:
        """The same by names that were not given before."""
        fd = shared_memory()
        write_names(fd, 0, names)
        self._add(_Part(self.end if at is None else at, len(names), NAMES, fd))

    def _plan_order(self, order: array[int], kind: str, at: int | None) -> None:
        fd = shared_memory()
        write_order(fd, order)
        self._add(_Part(self.end if at is None else at, len(order), kind, fd))

    def _add(self, part: _Part) -> None:
        if not self._end.alive or os.getpid() != self._kept.pid:
            os.close(part.fd)
            return
        with self._lock:
            kept = self._kept
            passed = self.frontier if self._announce.follow else self.position
            for old in [p for p in kept.parts if p.at >= part.at or p.at + p.count <= passed]:
                os.close(old.fd)
                kept.parts.remove(old)
            for old in kept.parts:
                old.count = min(old.count, part.at - old.at)
            kept.parts.append(part)
            try:
                self._tell_or_begin(part)
            except PlanError:
                # The next fetcher would refuse it too, and whatever comes after it.
                kept.parts.remove(part)
                os.close(part.fd)
                raise

    def _tell_or_begin(self, part: _Part) -> None:
        line = self._kept.line
        if line is not None and line.alive:
            with contextlib.suppress(LostFetcher):
                self._tell(line, part)
                return
        self._tell_persisting(min(FIRST_SECONDS, self.config.deadline))

    # --- how far it is ---

    @property
    def position(self) -> int:
        return int(self._words[POSITION // 8])

    @property
    def frontier(self) -> int:
        """The first item that the fetcher has not made ready yet, as of its last look."""
        return int(self._words[FRONTIER // 8])

    def at(self, number: int) -> None:
        """All items before this number have been handed out. Never fails."""
        self._words[POSITION // 8] = number
        if time.monotonic() > self._look_at:
            self.look()

    def look(self) -> None:
        """Tell a new fetcher everything when the last one is gone. Never fails, and starts none."""
        self._look_at = time.monotonic() + LOOK_SECONDS
        kept = self._kept
        if not self._end.alive or os.getpid() != kept.pid or not kept.parts:
            return
        with self._lock, contextlib.suppress(CacheFSError, LostFetcher, OSError):
            if kept.line is None or not kept.line.alive:
                running = self.config if self.config.fetcher == "inprocess" else replace(self.config, fetcher="require")
                self._tell_all(running, AGAIN_SECONDS)

    def _tell_persisting(self, patience: float) -> None:
        """Tell everything, to the next fetcher if need be: one that was told to stop may still take a connection."""
        end, pause = time.monotonic() + patience, RETRY_FIRST
        while True:
            try:
                return self._tell_all(self.config, patience)
            except LostFetcher as error:
                if time.monotonic() + pause > end:
                    raise FetcherError(f"{self.config.home}: its fetcher dies again and again") from error
            time.sleep(pause)
            pause = min(RETRY_LAST, pause * 2)

    def _tell_all(self, config: CacheConfig, patience: float) -> None:
        self._hang_up()
        kept = self._kept
        try:
            line = kept.line = Line(config, self.session, patience)
            begin = kept.parts[0].at if kept.parts else self.position
            request = structs.replace(self._announce, id=line.new_id(), attachment=line.attachment, begin=begin)
            self._consumer = line.ask(request, Announced, kept.page).consumer
            for part in kept.parts:
                self._tell(line, part)
        except BaseException:
            self._hang_up()
            raise

    def _tell(self, line: Line, part: _Part) -> None:
        request = Plan(id=line.new_id(), consumer=self._consumer, at=part.at, count=part.count, kind=part.kind)
        line.ask(request, Done, part.fd)

    def _hang_up(self) -> None:
        if self._kept.line is not None:
            self._kept.line.close()
            self._kept.line = None

    # --- the end ---

    def withdraw(self) -> Done:
        """End it; what was fetched ahead, and what could not be."""
        line = self._kept.line
        try:
            if self._end.alive and os.getpid() == self._kept.pid and line is not None:
                with self._lock, contextlib.suppress(LostFetcher):
                    return line.ask(Withdraw(id=line.new_id(), consumer=self._consumer), Done)
        finally:
            self.close()
        return Done(id=0)

    def close(self) -> None:
        """End it. Its plans are forgotten."""
        self._end()

"""Brings what consumers will read, the one that is needed soonest first, and never in the way of a read.

Among all consumers the item with the least time left until its reader comes goes first, which is fair by
construction: a fast consumer gets more, a slow one never less than it needs. How many fly at once is the pace's to
say, per origin. Bytes go the way of every miss (`Service.bytes_of`), so an object that is being prefetched is never
read twice: whoever wants it joins the flight. An item that fails is left to whoever reads it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from cachefs import memory
from cachefs.errors import (
    CacheError,
    CacheFSError,
    CacheFull,
    IsADirectory,
    ObjectNotFound,
    OriginAccessDenied,
    OriginError,
    PlanError,
    StaleObject,
)
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.lanes import AHEAD
from cachefs.fetcher.objects import Stored
from cachefs.fetcher.prefetch.announced import Announced
from cachefs.fetcher.prefetch.course import LOOKED_AT, STORED_IN_A_ROW, Course
from cachefs.fetcher.prefetch.foresight import Foresight
from cachefs.fetcher.prefetch.item import Board, Item, State
from cachefs.fetcher.prefetch.pace import Pace
from cachefs.fetcher.prefetch.pages import AT_ONCE, Pages
from cachefs.fetcher.prefetch.report import report
from cachefs.fetcher.prefetch.spot import SpotCheck
from cachefs.fetcher.prefetch.verdict import Disk
from cachefs.fetcher.room import Room
from cachefs.fetcher.transit import Transit
from cachefs.messages import Announce, Done, Need, Plan

log = logging.getLogger("cachefs.fetcher")

# Positions are looked at this often while something happens: 100 items at 5,000 a second, a tenth of a window. A look
# costs some us per consumer.
LOOK_SECONDS = 0.02
IDLE_SECONDS = 0.2

# Bytes in memory that wait for their readers because they do not fit into the cache; shared by all consumers.
HOLD_BYTES = 64 * 1024 * 1024

# Where memory is short: a share of it.
HOLD_SHARE, HOLD_LEAST = 64, 16 * 1024 * 1024

# What an image has, until the first ones of a consumer are known.
USUAL_BYTES = 128 * 1024

# Ranks of the largest nodes, several jobs over. Each may have some 2,000 items of its window in memory here.
MOST_CONSUMERS = 256

# Of the files that this process may have open, plans may take one in so many: readers' sockets, blobs and connections
# to the origin need theirs.
FILES_SHARE = 4

T = TypeVar("T")
Bring = Callable[[Attachment, Need, int], Awaitable[Any]]


class Prefetcher:
    """bring: Service.bytes_of. Belongs to the fetcher's loop."""

    def __init__(self, room: Room, bring: Bring) -> None:
        self._room = room
        self._bring = bring
        self._courses: list[Course] = []
        self._board: Board = {}
        self._storage: WeakValueDictionary[tuple[str, str, bool], SpotCheck] = WeakValueDictionary()
        self.foresight = Foresight(self._courses, self._board)
        self._paces: dict[str, Pace] = {}
        self._flying: dict[str, int] = {}
        self._hold = memory.share(HOLD_SHARE, least=HOLD_LEAST, most=HOLD_BYTES)
        self._disk = Disk()
        self._pages = Pages()
        self._page_turns = 0
        self._task: asyncio.Task[None] | None = None
        self._soon: asyncio.Handle | None = None

    # --- what consumers say ---

    def announce(self, attachment: Attachment, request: Announce, fd: int, pid: int) -> Course:
        """Takes `fd` over when it succeeds. Raises PlanError, StaleObject."""
        if len(self._courses) >= MOST_CONSUMERS:
            raise PlanError(f"more than {MOST_CONSUMERS} consumers at once: withdraw some, or close their programs")
        self._require_descriptor()
        announced = Announced(attachment, self._room.config.home, request, fd)
        storage = self._storage.setdefault(
            (attachment.dataset, attachment.snapshot, bool(request.mountpoint)), SpotCheck(STORED_IN_A_ROW, LOOKED_AT)
        )
        course = Course(announced, request, pid, self._room.reader, self._board, storage)
        course.on_release = self._room.transit.release
        self._courses.append(course)
        self._paces.setdefault(attachment.identity, Pace(time.monotonic()))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        return course

    def plan(self, course: Course, request: Plan, fd: int) -> None:
        """Takes `fd` over when it succeeds. Raises PlanError."""
        if course not in self._courses:
            raise PlanError("this consumer was withdrawn: announce it anew")
        self._require_descriptor()
        course.plan(request, fd)
        self._turn_soon()

    def _require_descriptor(self) -> None:
        """Raises PlanError where consumers have passed as many descriptors as they may, all together."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = files // FILES_SHARE
        if files != resource.RLIM_INFINITY and sum(course.announced.descriptors for course in self._courses) >= most:
            raise PlanError(
                f"the plans of all consumers are in more than {most} pieces: give larger ones, or let the fetcher open "
                "more files (ulimit -n, LimitNOFILE= in systemd)"
            )

    def withdraw(self, course: Course, id: int = 0) -> Done:
        """Forget it; what it came to."""
        done = Done(
            id=id,
            count=course.prefetched,
            bytes=course.prefetched_bytes,
            failed=course.failures.named,
            failed_total=course.failures.total + course.unknown,
        )
        if course in self._courses:
            self._courses.remove(course)
            for task in list(course.tasks):
                task.cancel()
            course.close()
            for other in self._courses:
                other.look_again()
        return done

    # --- what readers ask ---

    @contextmanager
    def asked(self, attachment: Attachment, request: Need) -> Iterator[None]:
        """A reader asks the fetcher for this, and waits as long as the block takes."""
        item = self._board.get((attachment.dataset, request.path))
        if item is not None:
            # One that is held is released a moment before it is looked for, and then among the most recent: it is
            # still there.
            item.course.asked(item)
        else:
            for course in self._courses:
                if course.attachment.dataset == attachment.dataset:
                    course.doubt()
        if item is None or item.state is State.OVER:
            yield
            return
        began = time.monotonic()
        try:
            yield
        finally:
            item.course.waiting(item, time.monotonic() - began)

    # --- the work ---

    async def _run(self) -> None:
        while self._courses:
            busy = True
            try:
                busy = self._turn()
            except Exception:
                # A defect here must cost hints, never the fetcher.
                log.exception("the prefetcher failed; it goes on")
            await asyncio.sleep(LOOK_SECONDS if busy else IDLE_SECONDS)
        self._task = None

    def _turn_soon(self) -> None:
        """Before the next look: once for all plans that come together, for a turn takes milliseconds."""

        def turn() -> None:
            self._soon = None
            self._turn()

        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(turn)

    def _turn(self) -> bool:
        """Look at every consumer and start what should fly; whether anything moves."""
        now = time.monotonic()
        self._disk.look(now, self._room.storing.spent)
        for course in list(self._courses):
            self._guarded(course, partial(course.look, now))
        self._page_in()
        self._start(now)
        return any(c.flying or now - c.rate.moved < 5 or not c.over for c in self._courses)

    def _guarded(self, course: Course, work: Callable[[], T]) -> T | None:
        """What comes of it; None: an error, which costs this consumer its hints and nobody else anything."""
        try:
            return work()
        except CacheFSError as error:  # its catalog is damaged
            course.stop(str(error))
        except Exception:
            # A defect of ours that one consumer brings to light must not cost the others their hints.
            log.exception("consumer %r: its hints end here", course.label)
            self.withdraw(course)
        return None

    def _page_in(self) -> None:
        """Consumers take turns, so that nobody's files wait behind all of another's; whose turn it is stays known."""
        first = self._page_turns % max(1, len(self._courses))
        courses = self._courses[first:] + self._courses[:first]
        while courses:
            more = []
            for course in courses:
                if not self._pages.take_more:
                    return
                self._page_turns += 1
                files = self._guarded(course, partial(course.files_to_page_in, AT_ONCE))
                if files:
                    self._pages.bring(files, course.sampling)
                    more.append(course)
            courses = more

    def _start(self, now: float) -> None:
        while (item := self._next(now)) is not None:
            course = item.course
            course.start(item)
            identity = course.attachment.identity
            self._flying[identity] = self._flying.get(identity, 0) + 1
            task = asyncio.get_running_loop().create_task(self._fetch(course, item))
            course.tasks.add(task)
            task.add_done_callback(course.tasks.discard)
        for identity, pace in self._paces.items():
            if self._flying.get(identity, 0) < pace.limit:
                pace.starved()

    def _next(self, now: float) -> Item | None:
        """What is needed soonest of all that may be fetched now."""
        best: Item | None = None
        least = 0.0
        for course in self._courses:
            identity = course.attachment.identity
            pace = self._paces[identity]
            if self._flying.get(identity, 0) >= pace.limit or now < pace.paused_until:
                continue
            item = course.next()
            if item is None or not self._has_room(course, item):
                continue
            urgency = course.urgency(item)
            if best is None or urgency < least:
                best, least = item, urgency
        return best

    def _has_room(self, course: Course, item: Item) -> bool:
        """Whether memory is left for what will not fit into the cache, and trust. (What fits needs neither.)"""
        course.bound_by_memory = False
        if course.streams is False:
            return True
        if not course.may_fetch():
            return False
        share = self._hold // len(self._courses)
        usual = course.prefetched_bytes // course.prefetched if course.prefetched else USUAL_BYTES
        wanted = course.flying * usual + (item.size if item.size >= 0 else usual)
        course.bound_by_memory = course.held_bytes + wanted > share and course.held_bytes + course.flying > 0
        return not course.bound_by_memory

    async def _fetch(self, course: Course, item: Item) -> None:
        identity = course.attachment.identity
        pace = self._paces[identity]
        began = time.monotonic()
        need = Need(attachment=0, path=item.path, version=item.version, size=item.size, everywhere=bool(item.version))
        landed = True
        try:
            place = await self._bring(course.attachment, need, AHEAD)
            now = time.monotonic()
            size = place.size if isinstance(place, (Stored, Transit)) else max(0, item.size)
            pace.done(now, size, now - began, self._flying[identity])
            course.streams = isinstance(place, Transit)
            course.fetched(size)
            if isinstance(place, Transit):
                landed = not self._keep(course, item, place)
        except CacheFull:
            course.left_out += 1  # a large object, which a reader takes in pieces
            course.streams = True
        except CacheFSError as error:
            self._failed(course, item, error, pace)
        except Exception:
            log.exception("%s: could not be fetched ahead", item.path)
        finally:
            self._flying[identity] -= 1
            if landed:
                course.landed(item)
        if course in self._courses:
            self._start(time.monotonic())

    def _keep(self, course: Course, item: Item, transit: Transit) -> bool:
        """Hold what did not fit until it is read; whether it is held."""
        if course.follow:
            course.left_out += 1
            course.failures.add(item.path, "does not fit: the cache is full; what comes after it is left out too")
            course.stop("the cache is full, and nobody says when what streams through would be read")
            return False
        if item.asked or course not in self._courses:
            return False  # its reader has it
        key = (course.attachment.domain, item.path, transit.version)
        size = self._room.transit.hold(key)
        if size:
            course.keep(item, key, size)
        return bool(size)

    def _failed(self, course: Course, item: Item, error: CacheFSError, pace: Pace) -> None:
        course.failures.add(item.path, str(error))
        course.failed(f"too many of its items cannot be fetched, the last because {error}")
        if isinstance(error, OriginAccessDenied):
            # It came without credentials, before anybody who has some.
            self._room.attachments.renew(course.attachment)
        about_the_object = isinstance(error, (ObjectNotFound, StaleObject, IsADirectory, CacheError))
        if isinstance(error, OriginError) and not about_the_object:
            pace.failed(time.monotonic())

    # --- what the user sees ---

    def report(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        reports = []
        for course in self._courses:
            identity = course.attachment.identity
            pace = self._paces[identity]
            bound = self._flying.get(identity, 0) >= pace.limit or now < pace.paused_until
            reports.append(report(course, now, pace.rate, pace.limit, bound_by_origin=bound, slow_disk=self._disk.slow))
        return reports

    async def close(self) -> None:
        tasks = [task for course in self._courses for task in course.tasks]
        for course in list(self._courses):
            self.withdraw(course)
        if self._task is not None:
            self._task.cancel()
            tasks.append(self._task)
        if self._soon is not None:
            self._soon.cancel()
        self._pages.close()
        await self.foresight.close()
        await asyncio.gather(*tasks, return_exceptions=True)

"""When will this node read an object? Asked where copies of what other nodes keep have no room (`fetcher/copies`).

The answer is that of the consumer that reads it soonest, of those that were seen to read what they say, in seconds of
what each has consumed so far. It takes a plan turned round (`timetable`), which is made when it is asked for first, by
a thread, one at a time and the smallest first; until then, and of plans for which there is no memory, nothing is known.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from cachefs import memory
from cachefs.errors import PlanError
from cachefs.fetcher.copies import NEVER
from cachefs.fetcher.prefetch.announced import Loose, Part
from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.item import Board
from cachefs.fetcher.prefetch.timetable import Timetable, memory_for

log = logging.getLogger("cachefs.fetcher")

# Memory of all timetables: the most are plans of 20 million items.
TABLES_SHARE, TABLES_LEAST, TABLES_MOST = 64, 8 * 1024 * 1024, 128 * 1024 * 1024

# A node has as many consumers of a dataset as it has GPUs; who announces hundreds does not make each decision slow.
MOST_ASKED = 32

# Entries between two rests of the thread: some milliseconds. It rests as long as it worked, for readers' sake.
SLICE = 1024


class Foresight:
    """A fetcher.copies.Plans over the prefetcher's consumers. Belongs to the fetcher's loop; `close` it."""

    def __init__(self, courses: Sequence[Course], board: Board) -> None:
        self._courses = courses
        self._board = board
        self._most = memory.share(TABLES_SHARE, least=TABLES_LEAST, most=TABLES_MOST)
        self._making: asyncio.Task[None] | None = None
        self._closing = False

    def next_use(self, dataset: str, path: str) -> float:
        soonest = NEVER
        for course in self._believed(dataset):
            # What was handed out a moment ago may still be read.
            first = max(0, course.position - course.lag.seen)
            if (number := course.announced.next_use(path, first)) is not None:
                soonest = min(soonest, self._until(course, number))
        return soonest

    def used_again(self, dataset: str, path: str) -> float:
        self._make_tables()
        soonest = NEVER
        item = self._board.get((dataset, path))
        for course in self._believed(dataset):
            # Without an item it was handed out before; with one it is fetched for that.
            first = item.number + 1 if item is not None and item.course is course else course.position
            if (number := course.announced.next_use(path, first)) is not None:
                soonest = min(soonest, self._until(course, number))
        return soonest

    def _believed(self, dataset: str) -> Iterator[Course]:
        return islice((c for c in self._courses if c.attachment.dataset == dataset and c.believed), MOST_ASKED)

    def _until(self, course: Course, number: int) -> float:
        """How long it takes to that item, at its own pace; at that of the quickest, before its first item."""
        now = time.monotonic()
        pace = course.pace(now) or max(other.pace(now) for other in self._courses) or 1.0
        return max(0, number - course.position) / pace

    # --- plans turned round ---

    def _make_tables(self) -> None:
        """Begin with the next one, if none is being made and there is memory for it."""
        if self._making is not None or self._closing:
            return
        parts = [(course, part) for course in self._courses for part in course.announced.parts]
        missing = [(course, part) for course, part in parts if part.table is None and course.believed]
        if not missing:
            return
        course, part = min(missing, key=lambda pair: pair[1].count)
        made = sum(memory_for(part.count) for _, part in parts if part.table is not None)
        if made + memory_for(part.count) > self._most:
            return
        self._making = asyncio.get_running_loop().create_task(self._make(course, part))

    async def _make(self, course: Course, part: Part) -> None:
        try:
            if part not in course.announced.parts:
                return  # withdrawn just now: its descriptors are closed, and may be other files'
            part.table = Timetable(0)  # what fails is not tried again
            loose = course.announced.loose(part)
            try:
                part.table = await asyncio.to_thread(self._turned_round, loose, course, part)
            finally:
                loose.close()
        except (PlanError, OSError) as error:
            log.info("consumer %r: its plan cannot be looked through: %s", course.label, error)
        except Exception:
            # A defect here must cost what copies save, never the fetcher.
            log.exception("consumer %r: its plan cannot be looked through", course.label)
        finally:
            self._making = None
            self._make_tables()

    def _turned_round(self, loose: Loose, course: Course, part: Part) -> Timetable:
        table = Timetable(part.count)
        for start in range(0, part.count, SLICE):
            if self._closing or part not in course.announced.parts:
                break
            began = time.monotonic()
            table.fill(start, loose.names(start, min(start + SLICE, part.count)))
            time.sleep(min(0.1, time.monotonic() - began))
        return table

    async def close(self) -> None:
        self._closing = True
        if self._making is not None:
            await asyncio.gather(self._making, return_exceptions=True)

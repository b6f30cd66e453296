"""How far one consumer is, and what of its plan is to be fetched next.

Each item of the window is looked at once, when the window reaches it: stored already (a stat of its refs), no object at
all, or missing. The missing ones are fetched in order; those that do not fit into the cache are held in memory until
they are read. Everything here happens between two awaits of the fetcher's loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from enum import Enum, auto
from typing import Any

from cachefs.digest import BLOCK_SIZE, snapshot_ref, version_ref
from cachefs.fetcher.prefetch.announced import Announced
from cachefs.fetcher.prefetch.pages import Pages, Sampling
from cachefs.fetcher.prefetch.verdict import Figures, verdict
from cachefs.fetcher.prefetch.window import (
    LAG_ITEMS,
    LEAST_LARGE,
    MOST_BYTES,
    MOST_ITEMS,
    Rate,
    page_window,
    window,
)
from cachefs.fetcher.tally import Failures
from cachefs.messages import Announce, Plan
from cachefs.store import Reader

# An item that is looked up takes some 20 us of the loop's time; readers wait for no more than a handful of ms.
LOOKS = 128

# So many that were fetched ahead for nothing, or could not be, one after the other: the plan is not what is read.
PATIENCE = 64

# Reads that had to wait are judged over so many seconds.
RECENT_SECONDS = 10.0


class State(Enum):
    MISSING = auto()
    FLYING = auto()
    TAKEN = auto()  # a reader came first: its read brings the bytes
    HELD = auto()  # in memory until it is read
    OVER = auto()


class Item:
    """One item that is not on the disk yet."""

    __slots__ = ("course", "key", "late", "number", "path", "size", "state", "transit", "version")

    def __init__(self, course: Course, number: int, key: tuple[str, str], path: str, version: str, size: int) -> None:
        self.course = course
        self.number = number
        self.key = key
        self.path = path
        self.version = version
        self.size = size
        self.state = State.MISSING
        self.late = False
        self.transit: Hashable = None


# Items that are not over, of all consumers, by (dataset, path): what a reader asks for is looked up here.
Board = dict[tuple[str, str], Item]


class Course:
    """One consumer. Its counters are what `cachefs status` shows."""

    def __init__(self, announced: Announced, request: Announce, pid: int, reader: Reader, board: Board) -> None:
        now = time.monotonic()
        self.announced = announced
        self.attachment = announced.attachment
        self.label = request.label[:200]
        self.follow = request.follow
        self.pid = pid
        self._reader = reader
        self._board = board
        self.rate = Rate(now)
        self.position = 0
        self.window = window(0.0)
        self.stopped = ""
        self.items: dict[int, Item] = {}
        self.held: dict[int, Item] = {}
        self.held_bytes = 0
        self.flying = 0
        self.streams = False  # the last one fetched did not fit into the cache
        self.tasks: set[Any] = set()
        self.failures = Failures()
        self._missing: deque[Item] = deque()
        self._scanned = announced.end
        self._large: deque[tuple[int, int]] = deque()
        self._unpaged: deque[tuple[int, str]] = deque()  # (number, object path) of what is not in memory yet
        self._sampling = Sampling()
        self._mountpoint = request.mountpoint.rstrip("/")
        self._in_vain = 0
        # What it came to:
        self.prefetched = self.prefetched_bytes = self.stored = self.unknown = self.left_out = 0
        self.late = 0
        self.waited = 0.0
        self._recent: deque[tuple[float, int, float]] = deque()  # (time, late, waited) of the last seconds
        self.bound_by_memory = False

    # --- what the consumer says ---

    def plan(self, request: Plan, fd: int) -> None:
        """Raises PlanError."""
        self.announced.plan(request, fd)
        for number in [n for n in self.items if n >= request.at]:
            if self.items[number].state is State.MISSING:
                self._over(self.items[number])
        self._scanned = min(self._scanned, request.at)
        self._large.clear()
        while self._unpaged and self._unpaged[-1][0] >= request.at:
            self._unpaged.pop()
        self.stopped = ""
        self.streams = False
        self._in_vain = 0

    def look(self, now: float) -> None:
        """See how far the consumer is, and look up what has come into the window."""
        self.position = self.frontier if self.follow else self.announced.position()
        self.rate.look(now, self.position)
        self.window = MOST_ITEMS if self.follow else window(self.rate.value)
        passed = self.position - (0 if self.follow else LAG_ITEMS)
        self.announced.forget(passed)
        self._scanned = max(self._scanned, min(passed, self.announced.end))
        while self.items and (first := next(iter(self.items.values()))).number < passed:
            if first.state is not State.MISSING:
                break
            self._over(first)
        while self.held and (oldest := next(iter(self.held.values()))).number < passed:
            self.release(oldest, read=False)
        while self._large and self._large[0][0] < self.position:
            self._large.popleft()
        self._scan(LOOKS)
        self.announced.tell(self.frontier)

    @property
    def frontier(self) -> int:
        """The first item that is not ready."""
        return min(self.items, default=self._scanned)

    @property
    def over(self) -> bool:
        """Nothing is left to be done until the consumer moves or says more."""
        return not self.items and self._scanned >= self.announced.end

    def page_in(self, pages: Pages) -> None:
        """Have what is read within the next second brought into memory."""
        if self.follow:
            self._unpaged.clear()  # nobody says when it is read
        until = min(self.frontier, self.position + page_window(self.rate.value))
        while self._unpaged and self._unpaged[0][0] < until:
            number, path = self._unpaged.popleft()
            if number not in self.held and self._sampling.worth() and (file := self._file(path)):
                pages.bring(file, self._sampling)

    def _file(self, path: str) -> str | None:
        """What the consumer opens to read an object; None when it is not on the disk."""
        if self._mountpoint:
            root = self.attachment.record.root
            return f"{self._mountpoint}/{path[len(root) + 1 if root else 0 :]}"
        ref = snapshot_ref(path, self.attachment.snapshot)
        return self._reader.file(self.attachment.dataset, ref)

    # --- what is next ---

    def next(self) -> Item | None:
        """The next one to be fetched; it stays the next until it is started."""
        while True:
            while self._missing and self._missing[0].state is not State.MISSING:
                self._missing.popleft()
            if self._missing:
                return self._missing[0]
            if not self._scan(LOOKS // 4):
                return None

    def urgency(self, item: Item) -> float:
        """Seconds until it is needed, as far as one knows. What nobody waits for comes after everything else."""
        if self.follow:
            return 1e9 + item.number
        return (item.number - self.position) / max(1.0, self.rate.value)

    def _scan(self, count: int) -> bool:
        """Look up at most so many items; whether there were any."""
        until = min(self.announced.end, self.position + self.window, self._scanned + count)
        if self.stopped or until <= self._scanned or len(self._missing) > LOOKS:
            return False
        if len(self._large) >= LEAST_LARGE and sum(size for _, size in self._large) > MOST_BYTES:
            return False
        attachment = self.attachment
        for wanted in self.announced.wanted(self._scanned, until):
            number, self._scanned = self._scanned, self._scanned + 1
            if wanted is None:
                self.unknown += 1
                continue
            path, version, size = wanted
            self._unpaged.append((number, path))
            key = (attachment.dataset, path)
            if key in self._board:
                continue  # another consumer's, or this one's twice: it is being brought
            if size > BLOCK_SIZE and self.streams:
                self.left_out += 1  # what a reader takes in pieces is not worth holding whole
                continue
            if size > BLOCK_SIZE and number >= self.position:
                self._large.append((number, size))
            ref = snapshot_ref(path, attachment.snapshot)
            if self._reader.file(attachment.dataset, ref) and (
                not version or self._reader.file(attachment.dataset, version_ref(path, version))
            ):
                self.stored += 1
                continue
            item = Item(self, number, key, path, version, size)
            self.items[number] = self._board[key] = item
            self._missing.append(item)
        return True

    # --- what becomes of an item ---

    def start(self, item: Item) -> None:
        item.state = State.FLYING
        self.flying += 1

    def landed(self, item: Item) -> None:
        """On the disk, or to be left to whoever reads it."""
        self.flying -= 1
        self._over(item)

    def keep(self, item: Item, transit: Hashable, size: int) -> None:
        """Fetched, but in memory only."""
        self.flying -= 1
        self.items.pop(item.number, None)
        item.state, item.transit, item.size = State.HELD, transit, size
        self.held[item.number] = item
        self.held_bytes += size

    def release(self, item: Item, *, read: bool) -> None:
        """It need not be held any longer: it was read, or nobody came."""
        self.held.pop(item.number, None)
        self.held_bytes -= item.size
        self._over(item)
        if read:
            self._in_vain = 0
        else:
            self.in_vain("what was fetched ahead is not read: its plan is not what it reads")
        self.on_release(item.transit)

    on_release: Any = staticmethod(lambda transit: None)

    def in_vain(self, why: str) -> None:
        self._in_vain += 1
        if self._in_vain >= PATIENCE:
            self.stop(why)

    def fetched(self, size: int) -> None:
        self.prefetched += 1
        self.prefetched_bytes += size
        if not self.streams:
            self._in_vain = 0

    def look_again(self) -> None:
        """Somebody who was bringing items that are ours too has left."""
        self._scanned = min(self._scanned, max(0, self.position - LAG_ITEMS))

    def stop(self, why: str) -> None:
        """Fetch nothing more until the consumer says something new."""
        self.stopped = why
        for item in [i for i in self.items.values() if i.state is State.MISSING]:
            self._over(item)
        self._scanned = self.announced.end

    def waiting(self, item: Item, seconds: float) -> None:
        """A reader had to wait for it."""
        first = not item.late
        item.late = True
        self.late += first
        self.waited += seconds
        self._recent.append((time.monotonic(), int(first), seconds))
        if item.state is State.TAKEN:
            self._over(item)

    def _over(self, item: Item) -> None:
        item.state = State.OVER
        self.items.pop(item.number, None)
        if self._board.get(item.key) is item:
            del self._board[item.key]

    def close(self) -> None:
        self._sampling.over = True
        for item in list(self.held.values()):
            self.release(item, read=True)
        for item in list(self.items.values()):
            self._over(item)
        self.announced.close()

    # --- what the user sees ---

    def report(
        self, now: float, origin_rate: float, at_once: int, *, bound_by_origin: bool, slow_disk: bool
    ) -> dict[str, Any]:
        """For `cachefs status`. origin_rate: bytes per second fetched ahead, at_once: in how many requests."""
        while self._recent and self._recent[0][0] < now - RECENT_SECONDS:
            self._recent.popleft()
        ahead = max(0, self.frontier - self.position)
        word, sentence = verdict(
            Figures(
                rate=self.rate.value,
                idle=now - self.rate.moved,
                left=self.announced.end - self.position,
                ahead=ahead,
                window=min(self.window, self.announced.end - self.position),
                late=sum(late for _, late, _ in self._recent),
                waited=sum(waited for _, _, waited in self._recent),
                origin_rate=origin_rate,
                at_once=at_once,
                bound_by_origin=bound_by_origin,
                bound_by_memory=self.bound_by_memory,
                slow_disk=slow_disk,
                follow=self.follow,
                stopped=self.stopped,
            )
        )
        return {
            "label": self.label,
            "pid": self.pid,
            "dataset": self.attachment.dataset,
            "position": self.position,
            "end": self.announced.end,
            "rate": round(self.rate.value, 1),
            "window": self.window,
            "ahead": ahead,
            "prefetched": self.prefetched,
            "prefetched_bytes": self.prefetched_bytes,
            "stored": self.stored,
            "held_bytes": self.held_bytes,
            "late": self.late,
            "waited": round(self.waited, 3),
            "failed": self.failures.total,
            "unknown": self.unknown,
            "left_out": self.left_out,
            "bottleneck": word,
            "says": sentence,
        }

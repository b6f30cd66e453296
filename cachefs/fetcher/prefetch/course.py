"""How far one consumer is, and what of its plan is to be fetched next.

Each item of the window is looked at once, when the window reaches it: stored already (a stat of its refs), no object at
all, or missing. The missing ones are fetched in order; those that do not fit into the cache are held in memory until
they are read, and what becomes of them says how many more may be (`trust`). Everything here happens between two awaits
of the fetcher's loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from typing import Any

from cachefs.digest import BLOCK_SIZE, snapshot_ref, version_ref
from cachefs.fetcher.prefetch.announced import Announced
from cachefs.fetcher.prefetch.item import Board, Item, State
from cachefs.fetcher.prefetch.pages import Sampling
from cachefs.fetcher.prefetch.spot import SpotCheck
from cachefs.fetcher.prefetch.trust import COST, Trust
from cachefs.fetcher.prefetch.window import (
    LEAST_ITEMS,
    LEAST_LARGE,
    MOST_BYTES,
    MOST_ITEMS,
    Lag,
    Rate,
    page_window,
    window,
)
from cachefs.fetcher.tally import REASON_LENGTH, Failures
from cachefs.messages import Announce, Plan
from cachefs.store import Reader

# An item that is looked up takes some 20 us of the loop's time; readers wait for no more than a handful of ms.
LOOKS = 128

# Where all of a dataset is stored, these 20 us an item are all that hints come to: 10% of a core at 5,000 a second. So
# after so many in a row that are stored (of a plan of which 1% is missing there are some as many once in 3 million
# items), one in some is looked at, until one is missing or a reader asks for anything.
STORED_IN_A_ROW, LOOKED_AT = 1024, 16

# So many that could not be fetched, one after the other: the plan is not worth anything.
PATIENCE = 64

# Of a plan that is not believed, one item in so many is looked out for. A prime, which is no period of any loader.
WATCHED = 7

# So many at most: they are not fetched, so nothing else bounds them.
MOST_WATCHED = 2048


class Course:
    """One consumer. Its counters are what `cachefs status` shows."""

    def __init__(
        self, announced: Announced, request: Announce, pid: int, reader: Reader, board: Board, storage: SpotCheck
    ) -> None:
        """storage: of all consumers that read one snapshot, what they saw of it on the disk."""
        now = time.monotonic()
        self.announced = announced
        self.attachment = announced.attachment
        self.label = request.label[:200]
        self.follow = request.follow
        self.pid = pid
        self._reader = reader
        self._board = board
        self.rate = Rate(now)
        self._announced_at = now
        self.position = 0
        self._begin = max(0, request.begin)
        self.window = window(0.0)
        self.stopped = ""
        self.items: dict[int, Item] = {}
        self.held: dict[int, Item] = {}
        self.held_bytes = 0
        self.watched: dict[int, Item] = {}
        self.trust = Trust()
        self.lag = Lag()
        self.flying = 0
        self.streams: bool | None = None  # the last one fetched did not fit into the cache; None: not known yet
        self.tasks: set[Any] = set()
        self.failures = Failures()
        self._missing: deque[Item] = deque()
        self._scanned = announced.end
        self._large: deque[tuple[int, int]] = deque()
        # (number, object path, "" = not looked up) of what is not in memory yet.
        self._unpaged: deque[tuple[int, str]] = deque()
        self.sampling = Sampling()
        self._storage = storage
        self._skimmed: int | None = None  # the first item that was taken for stored unseen
        self._doubted = 0  # items before this one make nothing sure: they were taken for stored once
        self._mountpoint = request.mountpoint.rstrip("/")
        self._failing = 0
        # What it came to:
        self.prefetched = self.prefetched_bytes = self.in_vain = self.stored = self.unknown = self.left_out = 0
        self.late = 0
        self.waited = 0.0
        self.recent: deque[tuple[float, int, float]] = deque()  # (time, late, waited) of the last seconds
        self.bound_by_memory = False

    # --- what the consumer says ---

    def plan(self, request: Plan, fd: int) -> None:
        """Raises PlanError."""
        self.announced.plan(request, fd)
        for number in [n for n in self.items if n >= request.at]:
            item = self.items.pop(number)
            item.asked = True  # of one that is flying: it is not held when it comes
            if item.state is State.MISSING:
                self._over(item)
        self._scanned = min(self._scanned, request.at)
        self._large.clear()
        while self._unpaged and self._unpaged[-1][0] >= request.at:
            self._unpaged.pop()
        for number in [n for n in self.held if n >= request.at]:
            self.release(self.held[number], unread=1)  # in vain, and yet that plan may have been right
        for number in [n for n in self.watched if n >= request.at]:
            self._over(self.watched[number])
        self.stopped = ""
        self._failing = 0

    def look(self, now: float) -> None:
        """See how far the consumer is, and look up what has come into the window."""
        self.position = self.frontier if self.follow else self.announced.position()
        self.rate.look(now, self.position)
        taken = self.position - self._begin if self.streams else None
        self.window = MOST_ITEMS if self.follow else window(self.rate.value, taken)
        passed = self.position - (0 if self.follow else self.lag.items)
        self.announced.forget(passed)
        self._scanned = max(self._scanned, min(passed, self.announced.end))
        while self.items and (first := next(iter(self.items.values()))).number < passed:
            if first.state is not State.MISSING:
                break
            self._watch(first)
        self._pass_by(self.position - self.lag.surely)
        while self._large and self._large[0][0] < self.position:
            self._large.popleft()
        while self._unpaged and self._unpaged[0][0] < passed:  # nobody had them brought: a mount hangs, say
            self._unpaged.popleft()
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

    @property
    def believed(self) -> bool:
        """Whether what it says it will read later is worth anything."""
        return not self.follow and not self.stopped and self.trust.earned

    def pace(self, now: float) -> float:
        """Items per second since it announced itself, its pauses included; 0.0 before the first."""
        return max(0, self.position - self._begin) / max(now - self._announced_at, 1e-3)

    def _pass_by(self, number: int) -> None:
        """Nobody reads the items before this number any more."""
        while self.held and (oldest := next(iter(self.held.values()))).number < number:
            self.release(oldest, unread=COST)
        while self.watched and (oldest := next(iter(self.watched.values()))).number < number:
            self._over(oldest)

    def files_to_page_in(self, most: int) -> list[str]:
        """Up to so many files of what is read within the next second, to be brought into memory, and not named before.

        Raises CatalogError.
        """
        until = min(self.frontier, self.position + page_window(self.rate.value))
        files: list[str] = []
        while self._unpaged and self._unpaged[0][0] < until and len(files) < most:
            number, path = self._unpaged.popleft()
            if number in self.held or not self.sampling.worth():
                continue
            path = path or self._path(number)
            if path and (file := self._file(path)):
                files.append(file)
        return files

    def _file(self, path: str) -> str | None:
        """What the consumer opens to read an object; None when it is not on the disk."""
        if self._mountpoint:
            root = self.attachment.record.root
            return f"{self._mountpoint}/{path[len(root) + 1 if root else 0 :]}"
        ref = snapshot_ref(path, self.attachment.snapshot)
        return self._reader.file(self.attachment.dataset, ref)

    def _path(self, number: int) -> str:
        """ "" = it is none of the dataset, or not known any more."""
        (wanted,) = self.announced.wanted(number, number + 1) or (None,)
        return "" if wanted is None else wanted.path

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
        # A consumer that went back may be where its plan was forgotten: of that nothing is known any more.
        self._scanned = max(self._scanned, self.announced.begin)
        watching = self.streams and self.trust.lost
        ahead = LEAST_ITEMS if watching else self.window
        until = min(self.announced.end, self.position + ahead, self._scanned + count)
        if self.stopped or until <= self._scanned or len(self._missing) > LOOKS:
            return False
        if len(self._large) >= LEAST_LARGE and sum(size for _, size in self._large) > MOST_BYTES:
            return False
        if not self._storage.sure:
            self._back_to_the_skimmed()
        if skimming := self._storage.sure and not self.follow:
            until = self._skim(until)
        attachment = self.attachment
        for wanted in self.announced.wanted(self._scanned, until):
            number, self._scanned = self._scanned, self._scanned + 1
            if wanted is None:
                self.unknown += 1
                continue
            path, version, size = wanted
            if watching and number % WATCHED:
                continue
            if not watching and not self.follow:  # then nobody says when it is read
                self._unpaged.append((number, path))
            key = (attachment.dataset, path)
            bringing = key in self._board
            if skimming and (bringing or not self._stored(path, version)):
                self.doubt()
                return True
            if bringing:
                continue  # another consumer's, or this one's twice
            if size > BLOCK_SIZE and self.streams:
                self.left_out += 1  # what a reader takes in pieces is not worth holding whole
                continue
            if size > BLOCK_SIZE and number >= self.position:
                self._large.append((number, size))
            there = self._stored(path, version)
            if number >= self._doubted or not there:
                self._storage.found(there)
            if there:
                self.stored += 1
                continue
            item = self._board[key] = Item(self, number, self.trust.look_out(), key, path, version, size)
            if watching:
                self._watch(item)
                continue
            self.items[number] = item
            self._missing.append(item)
        return True

    def _skim(self, until: int) -> int:
        """Take most items for stored, as all before them were; whereto the next one is to be looked up."""
        while self._scanned < until and not self._storage.worth():
            if self._skimmed is None:
                self._skimmed = self._scanned
            self._unpaged.append((self._scanned, ""))
            self.stored += 1
            self._scanned += 1
        return min(until, self._scanned + 1)

    def doubt(self) -> None:
        """Not all is stored: what was taken for that is looked up after all, in its order."""
        self._storage.found(False)
        self._back_to_the_skimmed()

    def _back_to_the_skimmed(self) -> None:
        if self._skimmed is not None:
            self._doubted = self._scanned
            # Not from further back, where what is known to be missing would be a reason to doubt again, and again.
            self._scanned = min(self._scanned, max(self._skimmed, self.position - self.lag.items))
            self._skimmed = None

    def _stored(self, path: str, version: str) -> bool:
        """Whether the consumer finds it on the disk. One that told no mount may read by URL or through one."""
        dataset = self.attachment.dataset
        if version and not self._reader.file(dataset, version_ref(path, version)):
            return False
        if version and self._mountpoint:  # a mount looks by version only
            return True
        return bool(self._reader.file(dataset, snapshot_ref(path, self.attachment.snapshot)))

    # --- what becomes of an item ---

    def start(self, item: Item) -> None:
        item.state = State.FLYING
        self.flying += 1

    def landed(self, item: Item) -> None:
        """On the disk, or to be left to whoever reads it."""
        self.flying -= 1
        self.trust.settled(item.among)
        self._over(item)

    def keep(self, item: Item, transit: Hashable, size: int) -> None:
        """Fetched, but in memory only."""
        self.flying -= 1
        self.items.pop(item.number, None)  # it is none of an earlier plan: those are not held
        item.state, item.transit, item.size = State.HELD, transit, size
        self.held[item.number] = item
        self.held_bytes += size

    def asked(self, item: Item) -> None:
        """A reader asks for an item that is not on the disk."""
        if not item.asked:
            item.asked = True
            self.lag.asked(self.position - item.number)
            if self.streams:
                self.trust.asked(item.among)
        if item.state is State.HELD:
            self.release(item)
        elif item.state is State.WATCHED:
            self._over(item)
        elif item.state is State.MISSING:
            item.state = State.TAKEN

    def release(self, item: Item, *, unread: int = 0) -> None:
        """It need not be held any longer. unread: what that costs of the trust, when nobody came."""
        self.held.pop(item.number, None)
        self.held_bytes -= item.size
        self._over(item)
        if unread:
            self.in_vain += 1
            self.trust.in_vain(unread)
        self.on_release(item.transit)

    on_release: Any = staticmethod(lambda transit: None)

    def _watch(self, item: Item) -> None:
        """It is not to be fetched (any more)."""
        self.items.pop(item.number, None)
        if self.streams and len(self.watched) < MOST_WATCHED:
            item.state = State.WATCHED
            self.watched[item.number] = item
        else:
            self.trust.settled(item.among)
            self._over(item)

    def may_fetch(self) -> bool:
        """Whether what will not fit into the cache may be fetched, as far as this consumer is to be believed."""
        if self.trust.lost:
            for item in [i for i in self.items.values() if i.state is State.MISSING]:
                self._watch(item)
        return self.trust.allows(len(self.held) + self.flying)

    def failed(self, why: str) -> None:
        self._failing += 1
        if self._failing >= PATIENCE:
            self.stop(why)

    def fetched(self, size: int) -> None:
        self.prefetched += 1
        self.prefetched_bytes += size
        self._failing = 0

    def look_again(self) -> None:
        """Somebody who was bringing items that are ours too has left."""
        self._scanned = min(self._scanned, max(0, self.position - self.lag.items))

    def stop(self, why: str) -> None:
        """Fetch nothing more until the consumer says something new."""
        self.stopped = why[:REASON_LENGTH]
        for item in [i for i in self.items.values() if i.state is State.MISSING]:
            self._over(item)
        self._scanned = self.announced.end

    def waiting(self, item: Item, seconds: float) -> None:
        """A reader had to wait for it."""
        first = not item.late
        item.late = True
        self.late += first
        self.waited += seconds
        self.recent.append((time.monotonic(), int(first), seconds))
        if item.state is State.TAKEN:
            self._over(item)

    def _over(self, item: Item) -> None:
        item.state = State.OVER
        for items in (self.items, self.watched):
            if items.get(item.number) is item:  # a later plan may have another of that number
                del items[item.number]
        if self._board.get(item.key) is item:
            del self._board[item.key]

    def close(self) -> None:
        self.sampling.over = True
        for item in list(self.held.values()):
            self.release(item)
        for item in [*self.items.values(), *self.watched.values()]:
            self._over(item)
        self.announced.close()

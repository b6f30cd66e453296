"""How far ahead of a consumer to be: a few seconds of what it consumes, so that a slow second at the origin does not
show, and no more, so that what is fetched ahead takes little room and several consumers share what there is.
"""

from __future__ import annotations

import math

# Hides a retry of the origin client, and what comes after a pause of the consumer (validation, a checkpoint).
SECONDS = 4.0

# Twice what is in flight at most, before the rate is known and for slow consumers.
LEAST_ITEMS = 128

# DESIGN: a look-ahead of 64 items adds 0.05% to an epoch; more than a thousand buys nothing.
MOST_ITEMS = 1024

# Where the cache is full, the window becomes that long by and by: by one item for so many that the consumer takes.
# Filled at once, it would be what a tenth of a small epoch asks the origin for.
GROWTH = 16

# The same for shards: bytes that lie ahead of one consumer, but at least two items.
MOST_BYTES = 1024 * 1024 * 1024
LEAST_LARGE = 2

# A loader takes its order before it reads: workers times prefetch_factor times batch size items lie between the
# position it tells and what was read. So what is that far behind the position may still be read, and is fetched: the
# least at first, then what was seen of that consumer. What was fetched is kept for a loader of eight workers that have
# two batches of 512 each, or it would never be seen.
LEAST_LAG, MOST_LAG = 1024, 8192

# What is on the SSD is brought into memory this long before it is read: a disk takes milliseconds, and memory is for
# those who use it now.
PAGES_SECONDS = 1.0
LEAST_PAGES, MOST_PAGES = 64, 512

# The rate follows a change within this many seconds; a loader takes batches, not items, so one look says little.
_MEMORY = 2.0


def window(rate: float, taken: int | None = None) -> int:
    """Items to be ahead of a consumer of `rate` items per second. taken: by it so far, where the cache is full."""
    most = MOST_ITEMS if taken is None else LEAST_ITEMS + taken // GROWTH
    return min(MOST_ITEMS, most, max(LEAST_ITEMS, math.ceil(rate * SECONDS)))


def page_window(rate: float) -> int:
    """Of these, the items whose bytes are to be in the page cache."""
    return min(MOST_PAGES, max(LEAST_PAGES, math.ceil(rate * PAGES_SECONDS)))


class Rate:
    """Items per second from looks at a position, older ones counting less."""

    def __init__(self, now: float, position: int = 0) -> None:
        self.value = 0.0
        self.moved = now  # when the position was last seen to move
        self._began = now
        self._at, self._position = now, position

    def look(self, now: float, position: int) -> None:
        passed = now - self._at
        if passed <= 0:
            return
        if position != self._position:
            self.moved = now
        # At first the memory is as long as the time since the beginning, else a few looks would pass for the rate.
        memory = min(_MEMORY, max(passed, now - self._began))
        share = 1 - math.exp(-passed / memory)
        self.value += share * ((position - self._position) / passed - self.value)
        self._at, self._position = now, position


class Lag:
    """How far behind the position that a consumer tells its readers are, in items: half as much again as the most that
    was seen of late."""

    _FORGET = 1 / 4096  # at the end of an epoch a loader has nothing to take, and its workers catch up

    _ENOUGH = 64

    def __init__(self) -> None:
        self._most = 0.0
        self._seen = 0

    def asked(self, behind: int) -> None:
        """A reader asked for an item that is so far behind."""
        self._seen += 1
        self._most += (behind - self._most) * (1 if behind > self._most else self._FORGET)

    @property
    def seen(self) -> int:
        return min(MOST_LAG, math.ceil(1.5 * self._most))

    @property
    def items(self) -> int:
        return max(LEAST_LAG, self.seen)

    @property
    def surely(self) -> int:
        """No reader is further behind, as far as one knows."""
        return self.items if self._seen >= self._ENOUGH else MOST_LAG

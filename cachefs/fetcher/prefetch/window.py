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

# The same for shards: bytes that lie ahead of one consumer, but at least two items.
MOST_BYTES = 1024 * 1024 * 1024
LEAST_LARGE = 2

# A loader takes its order before it reads: workers times prefetch_factor times batch size items lie between the
# position it tells and what was read. So what is that far behind the position may still be read.
LAG_ITEMS = 1024

# What is on the SSD is brought into memory this long before it is read: a disk takes milliseconds, and memory is for
# those who use it now.
PAGES_SECONDS = 1.0
LEAST_PAGES, MOST_PAGES = 64, 512

# The rate follows a change within this many seconds; a loader takes batches, not items, so one look says little.
_MEMORY = 2.0


def window(rate: float) -> int:
    """Items to be ahead of a consumer of `rate` items per second."""
    return min(MOST_ITEMS, max(LEAST_ITEMS, math.ceil(rate * SECONDS)))


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

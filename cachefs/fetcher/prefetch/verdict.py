"""What holds a consumer up, in a word and in one plain sentence. Arithmetic only."""

from __future__ import annotations

from typing import NamedTuple

from cachefs.config import format_size

# A consumer that has not moved for this long does something else: it validates, saves, compiles.
IDLE_SECONDS = 10.0

# Reads that had to wait, all together, in seconds per second: less than that nobody notices.
NOTICEABLE = 0.01

# Half of the time somebody writes: an SSD that keeps up takes a few percent.
BUSY_SHARE = 0.5

# Of the time between asking an SSD for a file and its read. One that keeps up takes milliseconds; before one that does
# not, all that was asked for waits in a queue, which is as long as that time.
LATE_SHARE = 0.5


class Disk:
    """Whether writing is what takes the time, over some seconds."""

    _SECONDS = 5.0

    def __init__(self) -> None:
        self._at = self._spent = 0.0
        self.slow = False

    def look(self, now: float, spent: float) -> None:
        """spent: seconds that writing has taken so far."""
        if now - self._at > self._SECONDS:
            self.slow = self._at > 0 and (spent - self._spent) / (now - self._at) > BUSY_SHARE
            self._at, self._spent = now, spent


class Figures(NamedTuple):
    """rate: items per second. idle: seconds since it moved. left: items until the end of its plan. ahead: of these,
    ready without a gap; window: how many should be. late, waited: reads of the last 10 s that had to wait, seconds.
    paged: seconds from asking the SSD for a file until it was in memory, lead: how long before its read it is asked.
    origin_rate: bytes per second fetched ahead for all, in at_once requests.
    """

    rate: float
    idle: float
    left: int
    ahead: int
    window: int
    late: int
    waited: float
    paged: float
    lead: float
    origin_rate: float
    at_once: int
    bound_by_origin: bool
    bound_by_memory: bool
    slow_disk: bool
    follow: bool
    stopped: str


def verdict(f: Figures) -> tuple[str, str]:
    """(origin, memory, SSD, plan, idle or none; the sentence)."""
    if f.stopped:
        return "plan", f"nothing is fetched ahead any more: {f.stopped}"
    if f.follow:
        if f.left <= 0:
            return "none", "everything it named is fetched"
        return "none", f"fetching what it named, {f.at_once} at a time: {format_size(f.origin_rate)}/s"
    if f.left <= 0:
        return "none", "all of its plan has been handed out"
    if f.waited / 10 <= NOTICEABLE:
        if f.idle > IDLE_SECONDS:
            return "idle", f"it has taken nothing for {f.idle:.0f} s, and the next {f.ahead:,} items are ready"
        if f.paged > LATE_SHARE * f.lead:
            return "SSD", (
                f"its files take {f.paged:.1f} s from the SSD into memory, and are read {f.lead:.1f} s after they are "
                "asked for: the SSD gives bytes more slowly than they are read"
            )
        return "none", f"the next {f.ahead:,} items are ready: decoding or the GPU sets the pace"
    waits = f"{f.late:,} reads of the last 10 s had to wait"
    if f.slow_disk:
        return "SSD", f"{waits}: the SSD takes bytes more slowly than the origin gives them"
    if f.bound_by_memory:
        return "memory", f"{waits}: the cache is full, and what streams through has reached its budget of memory"
    if f.bound_by_origin or f.ahead < f.window:
        return "origin", (
            f"{waits}: the origin gives {format_size(f.origin_rate)}/s in {f.at_once} requests at a time, "
            "and more is wanted"
        )
    return "plan", f"{waits}, though the next {f.ahead:,} items of the plan are ready: it reads in another order"

"""A bounded number of requests at the origin, the ones somebody waits for first."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from cachefs.budget import Budget, Urgency

# Somebody waits for these bytes; somebody will soon (read-ahead); somebody asked for them ahead of time (warm).
FOREGROUND, AHEAD, BACKGROUND = 0, 1, 2

# Enough to fill 1 Gbit/s with 110 KB objects at 50 ms (57 in flight); object stores take hundreds per client.
DEFAULT_LANES = 64


class Lanes:
    """`limit` may travel at once; waiters go by urgency, then by arrival."""

    def __init__(self, limit: int = DEFAULT_LANES) -> None:
        self._lanes = Budget(limit)

    def lane(self, urgency: Urgency | int = FOREGROUND) -> AbstractAsyncContextManager[None]:
        return self._lanes.hold(1, urgency)

"""How many requests at once are made ahead of time: as many as make the origin deliver more, and no more than that.

Too few leave a distant origin idle (110 KB at 50 ms need 57 in flight for 1 Gbit/s); more than fill the line only
queue there, before the reads that somebody waits for. Neither the latency nor the bandwidth is known, so both are
found out by trying: one step up, and if more comes, another; else back, and after a while a step down, which stays if
as much comes.
"""

from __future__ import annotations

FIRST = 16
LEAST = 1

# Of the 64 lanes to an origin, some are left to whoever waits for bytes.
MOST = 56

# A trial is judged after this many seconds and this many times the latency of a request, so that what was started
# before it is out of the way and the noise of single requests has evened out.
_LEAST_SECONDS = 0.2
_LATENCIES = 2.5
_LEAST_COUNT = 8

# A step up pays when a quarter of what it could bring at best is there; a step down when all but this is still there.
_WORTH = 0.25
_STILL = 0.98

# Requests that take so many times as long as the quickest did wait somewhere: only then may fewer do as well.
_QUEUED = 1.25

_UP, _DOWN = 1.5, 0.75

# Intervals between trials once the place was found: looking costs something either way.
_REST = 10

# After errors in a row, no request for so many seconds, doubling: an origin that is down need not be asked 56 times.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0


class Pace:
    """limit: requests that may be in flight. Told of every request that ended; has no clock of its own."""

    def __init__(self, now: float = 0.0) -> None:
        self.limit = FIRST
        self.paused_until = 0.0
        self.rate = 0.0  # bytes per second, as last measured
        self._before = 0  # the limit before the trial under way; 0: none is
        self._kept = 0.0  # the rate that a trial is compared with
        self._rest = 0
        self._direction = _UP
        self._errors = 0
        self._quickest = float("inf")
        self._idled = False
        self._begin(now)

    def done(self, now: float, size: int, seconds: float, flying: int) -> None:
        """A request brought `size` bytes in `seconds`; `flying` were in flight as it ended, itself included."""
        self._errors = 0
        if now < self._began:
            return  # started before the trial
        self._bytes += size
        self._count += 1
        self._latency += seconds
        self._bound += flying >= self.limit
        passed, mean = now - self._began, self._latency / self._count
        if self._count >= max(_LEAST_COUNT, self.limit // 2) and passed >= max(_LEAST_SECONDS, _LATENCIES * mean):
            self.rate = self._bytes / passed
            # Forgotten by and by: the way to the origin may have become longer.
            self._quickest = min(self._quickest * 1.01, mean)
            # Else the limit was not what held us up, and nothing is learnt.
            if self._bound >= 0.8 * self._count and not self._starved:
                if self._idled:
                    self._idled, self._before, self._rest, self._direction = False, 0, 0, _UP
                self._judge()
            self._begin(now + mean)

    def starved(self) -> None:
        """Fewer are in flight than may be: nothing else is wanted. How fast it comes is then for the consumers to say,
        not for us, and with fewer at once it would seem to come as fast. When more is wanted again, more are tried at
        once: then somebody is behind."""
        self._starved = self._idled = True

    def failed(self, now: float) -> None:
        """The origin failed: half as many, and after several in a row none for a while."""
        self._errors += 1
        if self._errors > 2:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(10, self._errors - 3))
            self.paused_until = max(self.paused_until, now + pause)
        if now >= self._began:  # once for those that failed together
            self.limit = max(LEAST, self.limit // 2)
            self._before, self._rest = 0, _REST // 2
            self._begin(now + _LEAST_SECONDS)

    def _begin(self, now: float) -> None:
        self._began = now
        self._bytes = self._count = self._bound = 0
        self._latency = 0.0
        self._starved = False

    def _judge(self) -> None:
        if not self._before:
            self._kept = self.rate
            self._rest -= 1
            mean = self._latency / self._count
            if self._direction == _DOWN and mean < _QUEUED * self._quickest:
                self._turn()
            elif self._rest < 0:
                self._try(self._direction)
            return
        share = self.limit / self._before
        worth = 1 + _WORTH * (share - 1) if share > 1 else _STILL
        if self.rate >= worth * self._kept:
            self._kept = self.rate
            self._try(self._direction)  # it paid: on in the same direction
        else:
            self.limit, self._before = self._before, 0
            self._turn()

    def _try(self, factor: float) -> None:
        wanted = round(self.limit * factor)
        wanted = max(self.limit + 1, wanted) if factor > 1 else min(self.limit - 1, wanted)
        wanted = max(LEAST, min(MOST, wanted))
        self._before = self.limit if wanted != self.limit else 0
        if not self._before:
            self._turn()
        self.limit = wanted

    def _turn(self) -> None:
        self._rest = _REST if self._direction == _DOWN else 1
        self._direction = _DOWN if self._direction == _UP else _UP

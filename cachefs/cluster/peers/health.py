"""How a peer is doing: whether to ask it at all, how long it takes, how soon to ask the origin beside it.

Closed: it is asked. Open: it failed several times in a row, or sent wrong bytes, and is left alone for a while, twice
as long each time. Half open: that while is over, one request tries. What is kept here is in the memory of one process:
nodes need not agree on who is slow.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable

import msgspec

log = logging.getLogger("cachefs.peers")

# So many failures in a row are no accident; a busy peer (503, so to speak) is no failure.
MOST_FAILURES = 3

# A peer that the origin overtakes so often costs each reader its hedge delay, and gives nothing.
MOST_LATE = 8

# How long a peer that failed is left alone, first and at most. Whoever cannot ask it asks the origin, which is right
# and only costs; a node that restarts is back within seconds.
LEAST_PAUSE, MOST_PAUSE = 1.0, 60.0

# Wrong bytes are no accident of the moment: a disk, memory, or worse.
WRONG_PAUSE = 60.0
MOST_WRONG_PAUSE = 3600.0

# A peer reads what it does not have from the origin that we would ask, so it is slow when it takes longer than that
# usually takes. (What the peer itself usually takes says nothing: of one whose link is slow it would be waited for all
# the longer.) Asked sooner, every slow second of the origin would make each node read everything. The usual time is as
# this process sees it, so where all machines are busy all are patient.
ORIGIN_TIMES = 3.0

# And never sooner than this: a busy peer is no dead one, and each object that is asked for twice is one read of the
# origin too many.
LEAST_HEDGE = 0.5

# Before anything is known of the peer, or of the origin. All begin at once when a job does, and whoever is hasty reads
# twice.
FIRST_HEDGE = 2.0

# What is told of a peer is of the last minute: who was slow an hour ago may be well, and the other way round.
LATELY = 60.0

# When the origin was asked beside a peer in vain and is slow, too, the next reader waits twice as long before it does
# that, and with each answer a little less: where everything is slow, asking twice makes it slower still. That the peer
# had it first does not say that the origin is slow: it may have come in that very moment, but not so often in a row.
MOST_CAUTION = 8.0
MOST_IN_VAIN = 3
_CALMER = 0.98

_SAMPLES = 512
_ENOUGH_SAMPLES = 16


class PeerState(msgspec.Struct, frozen=True):
    """One row of `cachefs cluster status`. latency: seconds from request to object. rate: bytes/s while it sent.

    Of the last minute: late, how often the origin was faster; lately, how many objects it gave (or some of them, where
    they are very many), and how long these took.
    """

    node: str
    state: str
    requests: int
    objects: int
    bytes: int
    failures: int
    wrong: int
    busy: int
    latency_p50: float
    latency_p99: float
    rate: float
    last_failure: str
    late: int
    lately: int
    lately_p50: float
    lately_p99: float


class Health:
    """Of one peer. clock: monotonic seconds."""

    def __init__(self, node: str, clock: Callable[[], float]) -> None:
        self.node = node
        self._clock = clock
        self._latencies: deque[float] = deque(maxlen=_SAMPLES)
        self._answered: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._overtaken: deque[float] = deque(maxlen=_SAMPLES)
        self._in_a_row = self._late = self._empty = self._in_vain = 0
        self._pause = LEAST_PAUSE
        self._wrong_pause = WRONG_PAUSE
        self._until = self._distrusted_until = 0.0
        self.caution = 1.0  # times the usual hedge
        self._open = False
        self._trying = False
        self._busy_until = self._busy_for_prefetch_until = 0.0
        self.requests = self.objects = self.bytes = self.failures = self.wrong = self.busy = 0
        self.seconds = 0.0
        self.last_failure = ""

    @property
    def state(self) -> str:
        if not self._open:
            return "closed"
        return "half open" if self._clock() >= self._until else "open"

    def why_not(self, *, prefetch: bool = False) -> str:
        """Why it is not to be asked now; "" = ask. prefetch: for what nobody waits for yet."""
        if self._open and (self._clock() < self._until or self._trying):
            return f"is left alone ({self.last_failure})"
        return "is busy" if self.busy_for(prefetch=prefetch) else ""

    def busy_for(self, *, prefetch: bool = False) -> float:
        """Seconds in which it is not to be asked because it said that it had too much to do."""
        until = max(self._busy_until, self._busy_for_prefetch_until) if prefetch else self._busy_until
        return max(0.0, until - self._clock())

    def tried(self) -> None:
        """A request is sent to it."""
        self.requests += 1
        self._trying = self._open

    def given_up(self) -> None:
        """A request ended without telling anything of it: nobody wanted the answer any more."""
        self._trying = False

    def overtaken(self, took: float, usual: float) -> None:
        """The origin was asked beside it, and was faster: within `took`, where it takes `usual`."""
        if took <= ORIGIN_TIMES * usual:
            self.caution, self._in_vain = 1.0, 0
        self._trying = False
        self._late += 1
        self._overtaken.append(self._clock())
        if self._late >= MOST_LATE:
            self.last_failure = "the origin was faster many times in a row"
            self._leave_alone(self._pause)
            self._pause = min(MOST_PAUSE, 2 * self._pause)
            self._late = 0

    def hedged_in_vain(self, took: float, usual: float) -> None:
        """The origin was asked beside it, and had not answered after `took`, where it takes `usual`."""
        self._in_vain += 1
        if took > ORIGIN_TIMES * usual or self._in_vain >= MOST_IN_VAIN:
            self.caution, self._in_vain = min(MOST_CAUTION, 2 * self.caution), 0

    def gave_nothing(self) -> None:
        """It answered that it could not get what the origin then gave us: it may be cut off from the origin."""
        self.failures += 1
        self.last_failure = "could not get what the origin gives others"
        self._empty += 1
        if self._empty >= MOST_FAILURES:
            self._leave_alone(self._pause)
            self._pause = min(MOST_PAUSE, 2 * self._pause)

    def answered(self, latency: float, size: int) -> None:
        self.objects += 1
        self.bytes += size
        self._latencies.append(latency)
        self._answered.append((self._clock(), latency))
        self._late = self._empty = 0
        self.caution = max(1.0, _CALMER * self.caution)
        self._trying = False  # it does give bytes: others may ask, before this answer has ended

    def well(self, seconds: float) -> None:
        """It gave a whole answer, within `seconds`."""
        self.seconds += seconds
        self._in_a_row = 0
        self._trying = False
        # What was under way when it sent something wrong says nothing against that.
        if self._empty < MOST_FAILURES and self._clock() >= self._distrusted_until:
            self._open = False
            self._pause = LEAST_PAUSE

    def was_busy(self, seconds: float, *, prefetch: bool = False) -> None:
        """prefetch: it was what nobody waits for yet that it refused; the rest it may take."""
        self.busy += 1
        self._trying = False
        until = self._clock() + min(max(seconds, 0.01), MOST_PAUSE)
        if prefetch:
            self._busy_for_prefetch_until = until
        else:
            self._busy_until = until

    def failed(self, why: str) -> None:
        self.failures += 1
        self.last_failure = why
        self._in_a_row += 1
        if self._open or self._in_a_row >= MOST_FAILURES:
            self._leave_alone(self._pause)
            self._pause = min(MOST_PAUSE, 2 * self._pause)

    def sent_wrong(self, why: str) -> None:
        """It sent what is not right. Left alone at once."""
        self.failures += 1
        self.wrong += 1
        self.last_failure = why
        self._leave_alone(self._wrong_pause)
        self._distrusted_until = self._until
        self._wrong_pause = min(MOST_WRONG_PAUSE, 2 * self._wrong_pause)

    def _leave_alone(self, seconds: float) -> None:
        if not self._open:
            log.warning("%s: is left alone for some %.0f s (%s)", self.node, seconds, self.last_failure)
        self._open = True
        self._trying = False
        # By chance, so that all who saw it fail do not come back together.
        self._until = max(self._until, self._clock() + seconds * random.uniform(0.8, 1.2))  # noqa: S311 - no secret

    def hedge(self, usual: float) -> float:
        """Seconds after which the origin is worth asking too. usual: what that takes; 0.0 = it is not known."""
        known = usual > 0.0 and len(self._latencies) >= _ENOUGH_SAMPLES
        return self.caution * max(LEAST_HEDGE if known else FIRST_HEDGE, ORIGIN_TIMES * usual)

    def latency(self, quantile: float) -> float:
        """Of the last answers; 0.0 when there are none."""
        return _quantile(sorted(self._latencies), quantile)

    def row(self) -> PeerState:
        since = self._clock() - LATELY
        lately = sorted(latency for at, latency in self._answered if at > since)
        return PeerState(
            node=self.node,
            state=self.state,
            requests=self.requests,
            objects=self.objects,
            bytes=self.bytes,
            failures=self.failures,
            wrong=self.wrong,
            busy=self.busy,
            latency_p50=self.latency(0.5),
            latency_p99=self.latency(0.99),
            rate=self.bytes / self.seconds if self.seconds else 0.0,
            last_failure=self.last_failure,
            late=sum(at > since for at in self._overtaken),
            lately=len(lately),
            lately_p50=_quantile(lately, 0.5),
            lately_p99=_quantile(lately, 0.99),
        )


def _quantile(ordered: list[float], quantile: float) -> float:
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0

"""How far ahead and how many at once, decided by what the fetcher runs, for origins that exist on paper only."""

from __future__ import annotations

import heapq
import random

import pytest

from cachefs.fetcher.prefetch.pace import LEAST, MOST, Pace
from cachefs.fetcher.prefetch.verdict import Disk, Figures, verdict
from cachefs.fetcher.prefetch.window import LEAST_ITEMS, LEAST_PAGES, MOST_ITEMS, Rate, page_window, window

SIZE = 110_000


class Line:
    """An origin that answers after `latency` and has one line of `bandwidth` bytes per second for all answers."""

    def __init__(self, latency: float, bandwidth: float) -> None:
        self.latency, self.bandwidth = latency, bandwidth
        self.failing = False
        self.now = 0.0
        self.asked = 0
        self.most = 0
        self._free = 0.0
        self._dice = random.Random(0)

    def drive(self, pace: Pace, seconds: float) -> float:
        """Keep as many in flight as the pace says. The bytes per second of the last half; `most`: its limit then."""
        events: list[tuple[float, float, int, bool]] = []  # (when, begun, size, whether it has passed the line)
        end, half, came, flying = self.now + seconds, self.now + seconds / 2, 0, 0
        self.asked = self.most = 0
        while self.now < end:
            while flying < pace.limit and self.now >= pace.paused_until:
                size = self._dice.randint(SIZE // 2, SIZE * 3 // 2)
                arrives = self.now + self.latency * self._dice.uniform(0.9, 1.3)
                heapq.heappush(events, (arrives, self.now, size, False))
                flying += 1
                self.asked += 1
            if not events:
                self.now = pace.paused_until
                continue
            self.now, began, size, passed = heapq.heappop(events)
            if not passed and not self.failing:
                self._free = max(self._free, self.now) + size / self.bandwidth
                heapq.heappush(events, (self._free, began, size, True))
                continue
            if self.failing:
                pace.failed(self.now)
            else:
                pace.done(self.now, size, self.now - began, flying)
                came += size if self.now > half else 0
            flying -= 1
            self.most = max(self.most, pace.limit) if self.now > half else 0
        return came / (self.now - half)


@pytest.mark.parametrize("latency", [0.002, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("bandwidth", [2e6, 10e6, 40e6, 120e6])
def test_the_line_is_filled_and_not_much_more(latency: float, bandwidth: float):
    pace, line = Pace(), Line(latency, bandwidth)
    rate = line.drive(pace, 40)
    enough = 1.1 * latency * bandwidth / SIZE  # as many as are on the way when the line is never idle
    possible = min(1.0, MOST / enough) * bandwidth
    assert rate >= 0.93 * possible
    assert line.most <= max(24, 4 * enough)


def test_it_is_found_within_seconds():
    pace, line = Pace(), Line(0.05, 60e6)
    line.drive(pace, 3)
    assert pace.limit >= 0.9 * 0.05 * 60e6 / SIZE


def test_it_follows_the_origin():
    pace, line = Pace(), Line(0.05, 80e6)
    line.drive(pace, 20)
    many = pace.limit
    line.bandwidth = 8e6
    rate = line.drive(pace, 120)
    assert pace.limit < many / 2, "a line that got narrower is not queued upon"
    assert rate >= 0.93 * 8e6
    line.bandwidth = 80e6
    rate = line.drive(pace, 60)
    assert rate >= 0.9 * 80e6


def test_errors_make_it_careful_and_their_end_bold():
    pace, line = Pace(), Line(0.05, 40e6)
    line.drive(pace, 10)
    line.failing = True
    line.drive(pace, 60)
    assert line.asked < 100, "an origin that is down is asked now and then"
    assert LEAST <= pace.limit <= 4
    line.failing = False
    rate = line.drive(pace, 60)
    assert rate >= 0.9 * 40e6


def test_a_pace_that_is_not_the_limit_stays():
    pace = Pace()
    for n in range(1000):
        pace.done(n * 0.01, SIZE, 0.05, flying=2)
    assert pace.limit == Pace().limit


def test_after_a_time_in_which_little_was_wanted_more_are_tried_at_once():
    pace, line = Pace(), Line(0.05, 80e6)
    pace.failed(0.0)
    for _ in range(2):
        pace.failed(1.0)
        pace.failed(2.0)
    few = pace.limit
    line.now = 10.0
    pace.starved()
    line.drive(pace, 1)
    assert pace.limit > few


def test_what_comes_while_little_is_wanted_says_nothing():
    """Requests wait for a busy processor, and with fewer at a time as much would come."""
    pace = Pace()
    for n in range(4000):
        pace.starved()
        pace.done(n * 0.01, SIZE, 0.05 if n < 200 else 0.2, flying=pace.limit)
    assert pace.limit == Pace().limit


def test_the_window_is_seconds_of_consumption():
    assert window(0) == LEAST_ITEMS
    assert window(100) == 400
    assert window(1e6) == MOST_ITEMS
    assert window(1e6, 0) == LEAST_ITEMS, "the cache is full: not all of it at once"
    assert window(1e6, 1_000_000) == MOST_ITEMS
    assert page_window(0) == LEAST_PAGES
    assert page_window(300) == 300


def test_a_rate_is_found_from_batches():
    """A loader takes 256 items at once, once a second; looks come 50 times a second."""
    rate = Rate(0.0)
    for look in range(1, 1000):
        rate.look(look * 0.02, 256 * (look // 50))
    assert 150 < rate.value < 400
    assert rate.moved == pytest.approx(19.0)
    for look in range(1000, 1500):
        rate.look(look * 0.02, 256 * 19)
    assert rate.value < 10, "it has stopped"


FINE = Figures(
    rate=100,
    idle=0,
    left=5000,
    ahead=400,
    window=400,
    late=0,
    waited=0,
    paged=0.01,
    lead=1.0,
    origin_rate=20e6,
    at_once=24,
    bound_by_origin=False,
    bound_by_memory=False,
    slow_disk=False,
    follow=False,
    stopped="",
)


@pytest.mark.parametrize(
    ("changes", "word", "says"),
    [
        ({}, "none", "decoding or the GPU"),
        ({"late": 3, "waited": 0.05}, "none", "decoding or the GPU"),
        ({"late": 90, "waited": 15, "ahead": 3, "bound_by_origin": True}, "origin", "19.1 MiB/s in 24 requests"),
        ({"late": 90, "waited": 15, "ahead": 3, "slow_disk": True}, "SSD", "SSD takes bytes more slowly"),
        ({"paged": 0.9}, "SSD", "take 0.9 s from the SSD into memory, and are read 1.0 s after"),
        ({"paged": 0.9, "idle": 60}, "idle", "taken nothing"),
        ({"paged": 0.9, "late": 90, "waited": 15, "ahead": 3}, "origin", "more is wanted"),
        ({"late": 90, "waited": 15, "ahead": 3, "bound_by_memory": True}, "memory", "cache is full"),
        ({"late": 90, "waited": 15}, "plan", "another order"),
        ({"idle": 60}, "idle", "taken nothing for 60 s"),
        ({"left": 0, "late": 90, "waited": 15}, "none", "handed out"),
        ({"stopped": "the cache is full"}, "plan", "the cache is full"),
        ({"follow": True, "left": 0}, "none", "everything it named"),
    ],
)
def test_the_verdict(changes: dict[str, object], word: str, says: str):
    found, sentence = verdict(FINE._replace(**changes))  # type: ignore[arg-type]
    assert found == word
    assert says in sentence


def test_a_disk_is_slow_when_writing_takes_most_of_the_time():
    disk = Disk()
    for second in range(1, 20):
        disk.look(second, second * 0.03)
    assert not disk.slow
    for second in range(20, 40):
        disk.look(second, second * 0.9)
    assert disk.slow

"""What hints may cost the origin when the cache is full, decided by what the fetcher runs, for loaders on paper."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from cachefs.fetcher.prefetch.trust import FIRST, MOST, Trust
from cachefs.fetcher.prefetch.window import LEAST_LAG, MOST_LAG, Lag

WINDOW = 512


class Job:
    """A consumer and its fetcher, of N items of which `resident` are on the SSD; the rest is never stored.

    Its loader has `workers`, each with two batches: what it reads is up to so many batches behind the position.
    """

    def __init__(self, count: int, share: float, *, workers: int = 1, batch: int = 1, seed: int = 0) -> None:
        self.dice = random.Random(seed)
        self.resident = frozenset(self.dice.sample(range(count), int(count * share)))
        self.items = range(count)
        self.workers, self.batch = workers, batch
        self.trust, self.lag = Trust(), Lag()
        self.missing: dict[int, tuple[int, int]] = {}  # looked out for: item -> (number in the plan, in trust)
        self.held: dict[int, tuple[int, int]] = {}
        self.watched: dict[int, tuple[int, int]] = {}
        self.helped = self.reads = self.in_vain = 0
        self.scanned = self.begun = 0

    def shuffled(self) -> list[int]:
        return self.dice.sample(self.items, len(self.items))

    def epoch(self, read: Sequence[int | None], plan: list[int]) -> None:
        """Read these, None: nothing, having said those. Counters are of this epoch."""
        self.helped = self.reads = self.in_vain = 0
        ahead = 2 * self.workers * self.batch if self.batch > 1 else 0
        for count, item in enumerate(self._as_workers_do(read)):
            self._look(min(len(plan), count + ahead), plan)
            if item is not None:
                self._read(item, min(len(plan), count + ahead))
        self.begun += len(plan)
        self.scanned = 0

    def _as_workers_do(self, read: Sequence[int | None]) -> list[int | None]:
        """Batches of as many workers at once, item by item."""
        batches = [read[start : start + self.batch] for start in range(0, len(read), self.batch)]
        turns = (batches[start : start + self.workers] for start in range(0, len(batches), self.workers))
        return [batch[n] for turn in turns for n in range(self.batch) for batch in turn if n < len(batch)]

    def _look(self, position: int, plan: list[int]) -> None:
        while self.scanned < min(len(plan), position + WINDOW):
            item = plan[self.scanned]
            if item not in self.resident and not any(
                item in known for known in (self.missing, self.held, self.watched)
            ):
                self.missing[item] = (self.begun + self.scanned, self.trust.look_out())
            self.scanned += 1
        if self.trust.lost:
            self.watched |= self.missing
            self.missing.clear()
        for items, cost in ((self.missing, 0), (self.watched, 0), (self.held, 1)):
            while items and next(iter(items.values()))[0] < self.begun + position - self.lag.surely:
                del items[next(iter(items))]
                if cost:
                    self.in_vain += 1
                    self.trust.in_vain()
        while self.missing and self.trust.allows(len(self.held)):
            item = next(iter(self.missing))
            self.held[item] = self.missing.pop(item)

    def _read(self, item: int, position: int) -> None:
        if item in self.resident:
            return
        self.reads += 1
        self.helped += item in self.held
        looked_for = self.held.pop(item, None) or self.missing.pop(item, None) or self.watched.pop(item, None)
        if looked_for is not None:
            number, among = looked_for
            self.trust.asked(among)
            self.lag.asked(self.begun + position - number)


@pytest.mark.parametrize("share", [0.1, 0.75])
@pytest.mark.parametrize("count", [5000, 20_000])
def test_a_wrong_plan_is_hardly_paid_for(count: int, share: float):
    job = Job(count, share)
    for _ in range(3):
        job.epoch(job.shuffled(), job.shuffled())
        assert job.in_vain <= max(FIRST, 0.01 * share * count)
    assert job.in_vain == 0
    assert job.trust.lost


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (2, 32), (8, 32), (2, 400), (8, 256), (64, 1)])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_right_plan_is_trusted_whatever_the_loader(workers: int, batch: int, share: float):
    job = Job(16_000, share, workers=workers, batch=batch)
    for _ in range(2):
        order = job.shuffled()
        job.epoch(order, order)
    assert job.in_vain == 0
    assert job.helped > 0.8 * job.reads
    assert job.trust.credit == MOST


def test_a_plan_of_which_a_few_percent_are_skipped_keeps_its_hints():
    job = Job(20_000, 0.5)
    for _ in range(2):
        order = job.shuffled()
        job.epoch([item if job.dice.random() > 0.04 else None for item in order], order)
    assert job.helped > 0.9 * job.reads
    assert job.reads + job.in_vain <= 0.5 * 20_000, "the origin gives no more than if nothing were skipped"


def test_a_plan_that_is_half_right_is_not_followed():
    job = Job(20_000, 0.5)
    for _ in range(3):
        order, other = job.shuffled(), job.shuffled()
        job.epoch(order, [a if job.dice.random() < 0.5 else b for a, b in zip(order, other, strict=True)])
        assert job.in_vain <= 0.01 * 20_000
    assert job.in_vain == 0


def test_what_becomes_right_is_believed_again():
    job = Job(20_000, 0.5)
    job.epoch(job.shuffled(), job.shuffled())
    assert job.trust.lost
    order = job.shuffled()
    job.epoch(order, order)
    assert job.helped > 0.6 * job.reads
    job.epoch(order, order)
    assert job.helped == job.reads


def test_what_becomes_wrong_is_paid_for_once():
    job = Job(20_000, 0.5)
    order = job.shuffled()
    job.epoch(order, order)
    job.epoch(job.shuffled(), job.shuffled())
    assert job.in_vain <= 1.2 * WINDOW
    job.epoch(job.shuffled(), job.shuffled())
    assert job.in_vain <= 0.001 * 20_000


def test_a_plan_of_what_nobody_reads_gets_no_more_than_its_first_credit():
    trust, fetched = Trust(), 0
    for _ in range(10_000):
        trust.look_out()
        if trust.allows(0):
            fetched += 1
            trust.in_vain()
    assert fetched <= FIRST


@pytest.mark.parametrize(("behind", "least"), [(0, LEAST_LAG), (1600, 2400), (100_000, MOST_LAG)])
def test_how_far_behind_its_readers_are(behind: int, least: int):
    lag = Lag()
    assert (lag.items, lag.surely) == (LEAST_LAG, MOST_LAG)
    for _ in range(100):
        lag.asked(behind)
    assert lag.items == lag.surely == least
    for _ in range(30_000):
        lag.asked(0)
    assert lag.items == LEAST_LAG

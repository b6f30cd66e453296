"""What stays on the SSD, by the decisions that the fetcher makes (`Capacity`, `victims`), for jobs on paper only.

Every item of a dataset is read once per epoch in a fresh order. No policy can then hit more than C of N in the steady
state (DESIGN, section 6); keeping what is there reaches it, whatever is fetched ahead and in which order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cachefs.config import Floor
from cachefs.errors import CacheFull
from cachefs.fetcher.capacity import ALLOCATION, Capacity
from cachefs.fetcher.residency import Candidate, victims

ITEMS = 20_000


class Cache:
    """As the fetcher decides: room is reserved; where there is none, a dataset that may go gives it, or it streams."""

    def __init__(self, size: int, folder: Path) -> None:
        self.capacity = Capacity(size * ALLOCATION, Floor())
        self.stored: dict[str, set[int]] = {}
        self.last_use: dict[str, float] = {}
        self.pinned: set[str] = set()
        self._folder = folder

    def read(self, dataset: str, item: int) -> bool:
        """Whether it was there. (Fetched ahead or when it was asked for: the same decision.)"""
        if item in self.stored.setdefault(dataset, set()):
            return True
        try:
            self._reserve()
        except CacheFull:
            candidates = [
                Candidate(name, self.last_use.get(name, 0.0), name == dataset, name in self.pinned)
                for name, items in self.stored.items()
                if items
            ]
            for name in victims(candidates, dataset):
                self.capacity.free(len(self.stored.pop(name)) * ALLOCATION)
                break
            else:
                return False
            self._reserve()
        self.stored[dataset].add(item)
        return False

    def _reserve(self) -> None:
        self.capacity.commit(self.capacity.reserve(ALLOCATION, self._folder))


def epoch(seed: int, count: int = ITEMS) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def ahead(order: Iterable[int], window: int, dice: random.Random) -> Iterator[int]:
    """The order in which a prefetcher asks: that of the plan, but for what its flights overtake."""
    waiting: list[int] = []
    for item in order:
        waiting.append(item)
        if len(waiting) >= window:
            yield waiting.pop(dice.randrange(len(waiting)))
    yield from waiting


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("hints", ["off", "on", "wrong"])
def test_epochs_hit_what_can_be_hit(share: float, hints: str, tmp_path: Path):
    """FACTS has for LRU .005, .034, .153, .403, for SIEVE .026, .123, .364, .662."""
    cache = Cache(int(share * ITEMS), tmp_path)
    hits = 0
    for number in range(4):
        order = epoch(number)
        if hints == "wrong":  # another order is fetched ahead of each read
            for item in epoch(1000 + number)[: ITEMS // 2]:
                cache.read("train", item)
        asked = ahead(order, 64, random.Random(number)) if hints == "on" else order
        hits = sum(cache.read("train", item) for item in asked)
    assert hits / ITEMS >= 0.99 * share


def test_the_resident_set_is_spread_over_the_epoch(tmp_path: Path):
    """The busiest tenth of an epoch at the origin against the mean: <= 1.2. (MIN hits first and then not at all.)"""
    cache = Cache(ITEMS // 2, tmp_path)
    for number in range(2):
        for item in epoch(number):
            cache.read("train", item)
    misses = [not cache.read("train", item) for item in epoch(9)]
    tenths = [sum(misses[start : start + ITEMS // 10]) for start in range(0, ITEMS, ITEMS // 10)]
    assert max(tenths) <= 1.2 * sum(tenths) / 10


def test_a_job_that_ended_gives_room_to_the_next_and_a_pinned_one_does_not(tmp_path: Path):
    cache = Cache(1500, tmp_path)
    for now, dataset in enumerate(("validation", "old", "older")):
        cache.last_use[dataset] = float(-now)
        for item in epoch(now, 500):
            cache.read(dataset, item)
    cache.pinned.add("validation")
    for number in range(3):
        hits = sum(cache.read("new", item) for item in epoch(number, 1000))
    assert hits == 1000
    assert {name for name, items in cache.stored.items() if items} == {"validation", "new"}

"""When an object is read next, by what consumers announced: right where it is known, and of use to nobody who lies."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachefs.fetcher.copies import NEVER
from cachefs.fetcher.prefetch import foresight
from cachefs.fetcher.prefetch.foresight import MOST_ASKED
from cachefs.fetcher.prefetch.timetable import PROBES, Timetable, memory_for
from cachefs.fetcher.prefetch.trust import FIRST, MOST
from cachefs.messages import Plan
from cachefs.plans import IDS, NAMES, shared_memory, write_names
from tests.foreseeing import DATASET, Consumers

NAMES_OF = [f"bucket/{n}" for n in range(100)]


# --- timetables


def names(order: list[int]) -> list[bytes]:
    return [b"%d" % n for n in order]


def test_each_use_is_found_in_its_turn():
    """Marks are 16 bits, so of some thousand names one is taken for another, and each answer about it may be wrong."""
    order = random.Random(0).choices(range(1000), k=5000)
    table = Timetable(len(order))
    table.fill(0, names(order[:2000]))
    table.fill(2000, names(order[2000:]))
    wrong = set()
    for start in range(0, 5001, 250):
        for n in range(0, 1100, 7):
            expected = next((at for at in range(start, 5000) if order[at] == n), None)
            if table.next(hash(b"%d" % n), start) != expected:
                wrong.add(n)
    assert len(wrong) <= 3  # hashes are others in each process: of these 158 names it was none in 99 of 100


def test_in_a_long_plan_places_are_rounded_and_what_has_begun_to_pass_is_over():
    count = 300_000
    table = Timetable(count)
    assert memory_for(count) <= 8 * count + 8
    table.fill(0, names(list(range(count))))
    near = 0
    for at in random.Random(1).sample(range(count), 1000):
        found = table.next(hash(b"%d" % at), 0)
        near += found is not None and at - 8 < found <= at
        after = table.next(hash(b"%d" % at), at + 1)
        near -= after is not None
    assert near >= 990


def test_a_plan_of_one_name_takes_no_more_than_its_memory_and_a_few_steps():
    table = Timetable(100_000)
    table.fill(0, (b"again" for _ in range(100_000)))
    # Of its steps two meet in one slot in one process of a hundred, for hashes are others in each.
    assert PROBES - 4 <= sum(map(bool, table._slots)) <= PROBES
    assert table.next(hash(b"again"), 0) == 0
    assert table.next(hash(b"again"), 99_000) is None


def test_what_is_no_name_is_in_no_plan():
    table = Timetable(3)
    table.fill(0, [b"", b"a", b""])
    assert table.next(hash(b""), 0) is None
    assert table.next(hash(b"a"), 0) == 1
    assert Timetable(0).next(hash(b"a"), 0) is None


# --- consumers


@pytest.fixture
async def consumers(tmp_path: Path) -> AsyncIterator[Consumers]:
    made = Consumers(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """When all of the test happens: paces are those that it sets, however long it is held up between two lines."""
    moment = time.monotonic()
    monkeypatch.setattr(foresight, "time", SimpleNamespace(monotonic=lambda: moment, sleep=time.sleep))
    return moment


def next_use(consumers: Consumers, n: int) -> float:
    return consumers.foresight.next_use(DATASET, NAMES_OF[n])


def used_again(consumers: Consumers, n: int) -> float:
    return consumers.foresight.used_again(DATASET, NAMES_OF[n])


async def test_this_epoch_and_the_next(consumers: Consumers, now: float):
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [*range(50)])
    consumers.plan(course, [*reversed(range(50))])
    await consumers.look_through()
    # Nobody knows its pace yet: the answers are items.
    assert [next_use(consumers, n) for n in (0, 49, 50)] == [0, 49, NEVER]
    consumers.at(course, 10, now)
    course._announced_at = now - 10.0  # one per second
    assert next_use(consumers, 9) == pytest.approx(80, rel=0.01)
    assert next_use(consumers, 10) == 0
    consumers.at(course, 100, now)
    assert next_use(consumers, 0) == NEVER, "the plan is over"


async def test_the_read_that_it_is_fetched_for_is_not_the_next_one(consumers: Consumers, now: float):
    """It is looked up while its item is under way; without one the item was handed out a moment ago."""
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [*range(50), *range(50)])
    await consumers.look_through()
    consumers.at(course, 0, now)
    assert (DATASET, NAMES_OF[20]) in consumers.board
    assert next_use(consumers, 20) == 20
    assert used_again(consumers, 20) == 70
    consumers.at(course, 21, now)
    course._announced_at = now - 21.0
    course._over(consumers.board[DATASET, NAMES_OF[20]])
    assert used_again(consumers, 20) == pytest.approx(70 - 21, rel=0.01)


async def test_what_was_handed_out_a_moment_ago_is_still_to_be_read(consumers: Consumers):
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [*range(100)])
    await consumers.look_through()
    consumers.at(course, 50, time.monotonic())
    assert next_use(consumers, 45) == NEVER
    course.lag.asked(8)  # as far behind was seen to be asked for
    assert next_use(consumers, 45) == 0
    assert next_use(consumers, 30) == NEVER


async def test_who_reads_it_soonest_says_when_each_at_its_own_pace(consumers: Consumers, now: float):
    quick, slow = consumers.announce(NAMES_OF), consumers.announce(NAMES_OF)
    consumers.plan(quick, [*range(100)])
    consumers.plan(slow, [*reversed(range(100))])
    await consumers.look_through()
    for course, position, pace in ((quick, 20, 10.0), (slow, 20, 1.0)):
        consumers.at(course, position, now)
        course._announced_at = now - position / pace
    # Item 70: the quick one has 50 items until then, the slow one 9.
    assert next_use(consumers, 70) == pytest.approx(5, rel=0.05)
    assert next_use(consumers, 78) == pytest.approx(1, rel=0.05)
    assert next_use(consumers, 10) == pytest.approx(69, rel=0.05)


async def test_who_has_not_begun_is_taken_to_be_as_quick_as_the_others(consumers: Consumers, now: float):
    one, other = consumers.announce(NAMES_OF), consumers.announce(NAMES_OF)
    consumers.plan(one, [*range(50)])
    consumers.plan(other, [*range(50, 100)])
    await consumers.look_through()
    consumers.at(one, 10, now)
    one._announced_at = now - 1.0
    assert next_use(consumers, 60) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("why", ["unproven", "lost", "stopped", "follows", "another dataset"])
async def test_who_is_not_to_be_believed_says_nothing(consumers: Consumers, why: str):
    dataset = "0" * 32 if why == "another dataset" else DATASET
    course = consumers.announce(NAMES_OF, dataset=dataset, follow=why == "follows")
    consumers.plan(course, [*range(50)])
    await consumers.look_through()
    if why == "unproven":
        course.trust.credit = FIRST
    elif why == "lost":
        course.trust.in_vain(MOST)
    elif why == "stopped":
        course.stop("enough")
    assert next_use(consumers, 10) == NEVER


async def test_what_is_replaced_or_withdrawn_is_not_known_any_more(consumers: Consumers):
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [*range(50)])
    await consumers.look_through()
    consumers.plan(course, [90, 91], at=30)
    assert next_use(consumers, 29) == 29
    assert next_use(consumers, 30) == NEVER
    assert next_use(consumers, 90) == NEVER  # nobody has looked it through
    await consumers.look_through()
    assert next_use(consumers, 90) == 30
    consumers.courses.remove(course)
    assert next_use(consumers, 29) == NEVER
    course.close()


async def test_names_come_without_their_prefix(consumers: Consumers):
    course = consumers.announce([f"{n}" for n in range(100)], prefix="bucket/")
    consumers.plan(course, [*range(50)])
    await consumers.look_through()
    assert next_use(consumers, 7) == 7
    assert consumers.foresight.next_use(DATASET, "7") == NEVER


async def test_plans_of_names_and_of_numbers_of_the_catalog(consumers: Consumers):
    course = consumers.announce(NAMES_OF)
    fd = shared_memory()
    write_names(fd, 0, NAMES_OF[:10])
    course.plan(Plan(id=0, consumer=0, at=0, count=10, kind=NAMES), fd)
    catalog: Any = SimpleNamespace(find=lambda path: SimpleNamespace(id=1000 + NAMES_OF.index(path)))
    course.announced._catalog = catalog
    fd = shared_memory()
    os.pwrite(fd, b"".join((1000 + n).to_bytes(8, "little") for n in range(90, 100)), 0)
    course.plan(Plan(id=0, consumer=0, at=10, count=10, kind=IDS), fd)
    await consumers.look_through()
    assert [next_use(consumers, n) for n in (3, 93, 50)] == [3, 13, NEVER]
    course.announced._catalog = None


# --- those who do harm


async def test_what_takes_too_much_memory_is_left_out_and_the_others_are_not(consumers: Consumers):
    consumers.foresight._most = memory_for(100)
    large, small = consumers.announce(NAMES_OF), consumers.announce(NAMES_OF)
    consumers.plan(large, [50] * 90)
    consumers.plan(small, [*range(50)])
    await consumers.look_through()
    assert next_use(consumers, 10) == 10
    assert large.announced.parts[0].table is None


async def test_tables_and_orders_that_lie(consumers: Consumers, caplog: pytest.LogCaptureFixture):
    dice = random.Random(3)
    for _ in range(20):
        course = consumers.announce(NAMES_OF)
        consumers.plan(course, [dice.choice([n, 10**9, 2**32 - 1]) for n in range(100)])
        os.pwrite(course.announced._page, dice.randbytes(1600), 4096 + dice.randrange(1000))
        if dice.random() < 0.3:
            os.ftruncate(course.announced.parts[0].fd, dice.randrange(400))
        if dice.random() < 0.3:
            os.ftruncate(course.announced._page, dice.randrange(6000))
    await consumers.look_through()
    assert all(next_use(consumers, n) >= 0 for n in range(100))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert all(part.table is not None for course in consumers.courses for part in course.announced.parts)


async def test_hundreds_of_consumers_make_no_decision_slow(consumers: Consumers):
    for _ in range(2 * MOST_ASKED):
        course = consumers.announce(NAMES_OF)
        consumers.plan(course, [1])
    await consumers.look_through()
    asked = []
    for course in consumers.courses:
        course.announced.next_use = lambda path, number: asked.append(path)  # type: ignore[method-assign]
    next_use(consumers, 1)
    assert len(asked) == MOST_ASKED


async def test_what_ends_while_it_is_looked_through(consumers: Consumers, monkeypatch: pytest.MonkeyPatch):
    """The thread notices, and what it had of the plan is closed."""
    slices = []

    sleep = time.sleep

    def slowly(seconds: float) -> None:
        slices.append(seconds)
        sleep(0.01)

    monkeypatch.setattr(time, "sleep", slowly)
    gc.collect()  # what earlier tests let go of in cycles has descriptors, and would be collected at any moment
    before = len(os.listdir("/proc/self/fd"))
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [n % 100 for n in range(1_000_000)])
    consumers.foresight.used_again(DATASET, "")
    while len(slices) < 2:
        await asyncio.sleep(0.001)
    consumers.courses.remove(course)
    course.close()
    await consumers.look_through()
    assert len(slices) < 500
    assert len(os.listdir("/proc/self/fd")) == before


async def test_what_ends_before_it_is_looked_through(consumers: Consumers):
    """Its descriptors are closed, and may be other files' by the time."""
    gone, other = consumers.announce(NAMES_OF), consumers.announce(NAMES_OF)
    consumers.plan(gone, [1])
    consumers.plan(other, [2, 3])
    (part,) = gone.announced.parts
    consumers.foresight.used_again(DATASET, "")
    consumers.courses.remove(gone)
    gone.close()
    await consumers.look_through()
    assert part.table is None
    assert next_use(consumers, 3) == 1


async def test_whoever_ends_waits_for_no_long_plan(consumers: Consumers):
    course = consumers.announce(NAMES_OF)
    consumers.plan(course, [n % 100 for n in range(2_000_000)])
    consumers.foresight.used_again(DATASET, "")
    await consumers.foresight.close()
    table = course.announced.parts[0].table
    assert table is not None
    assert sum(map(bool, table._slots)) < 100

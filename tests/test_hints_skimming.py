"""Where all is stored, most of a plan is not looked up; as soon as something is missing, all of it is, in its order."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.digest import snapshot_ref, version_ref
from cachefs.fetcher.prefetch.announced import Announced, Wanted
from cachefs.fetcher.prefetch.course import LOOKED_AT, LOOKS, STORED_IN_A_ROW, Course
from cachefs.fetcher.prefetch.item import Item
from cachefs.fetcher.prefetch.spot import SpotCheck
from cachefs.messages import Announce, Plan
from cachefs.store import Reader

DATASET = "d" * 32


class Order:
    """What a consumer said: objects 0, 1, 2, ... It is where `at` says."""

    def __init__(self, count: int) -> None:
        self.attachment = SimpleNamespace(dataset=DATASET, snapshot="", identity="s3", record=SimpleNamespace(root=""))
        self.begin, self.end, self.at = 0, count, 0
        self.looked = Counter[int]()

    def wanted(self, start: int, stop: int) -> list[Wanted | None]:
        self.looked.update(range(start, stop))
        return [Wanted(f"b/{number}", "", 10) for number in range(start, stop)]

    def position(self) -> int:
        return self.at

    def forget(self, before: int) -> None: ...

    def tell(self, frontier: int) -> None: ...

    def plan(self, request: Plan, fd: int) -> None: ...


class Disk:
    def __init__(self, missing: set[int]) -> None:
        self.missing = {snapshot_ref(f"b/{number}", ""): number for number in missing}

    def file(self, dataset: str, ref: str) -> str | None:
        return None if ref in self.missing else f"/blobs/{ref}"

    def bring(self, item: Item) -> None:
        self.missing.pop(snapshot_ref(item.path, ""), None)


class Run:
    """A course over `count` items, and what it has had fetched."""

    def __init__(
        self, count: int, missing: set[int], *, follow: bool = False, storage: SpotCheck | None = None
    ) -> None:
        self.order, self.disk = Order(count), Disk(missing)
        announce = Announce(id=1, attachment=1, label="", names=0, follow=follow)
        self.storage = storage or SpotCheck(STORED_IN_A_ROW, LOOKED_AT)
        self.course = Course(cast(Announced, self.order), announce, 1, cast(Reader, self.disk), {}, self.storage)
        self.course.plan(Plan(id=1, consumer=1, at=0, count=count, kind="names"), -1)
        self.fetched: list[int] = []
        self.now = self.course.rate.moved

    def step(self, items: int) -> None:
        """The consumer goes on; what is missing in its window comes at once."""
        self.order.at += items
        self.now += items / 100
        self.course.look(self.now)
        while (item := self.course.next()) is not None:
            self.fetched.append(item.number)
            self.course.start(item)
            self.disk.bring(item)
            self.course.landed(item)


def test_of_what_is_stored_few_are_looked_up():
    run = Run(20_000, set())
    while run.order.at < 20_000:
        run.step(50)
    assert set(range(STORED_IN_A_ROW)) <= set(run.order.looked)
    assert len(run.order.looked) <= STORED_IN_A_ROW + LOOKS + 20_000 // LOOKED_AT
    assert run.course.stored == 20_000
    assert run.fetched == []


def test_one_that_is_missing_has_all_of_the_window_looked_up_in_order():
    missing = set(range(10_000, 11_000, 3))
    run = Run(20_000, missing)
    while run.order.at < 9_950:
        run.step(50)
    before = run.order.at
    while run.order.at < 11_000:
        run.step(50)
    # The first of them is found before its reader comes: it lies in the window for some hundred items.
    assert run.fetched == sorted(missing)
    assert before > STORED_IN_A_ROW


def test_a_reader_who_misses_something_has_it_looked_up():
    run = Run(20_000, set())
    while run.order.at < 8_990:
        run.step(10)
    evicted = next(number for number in range(8_995, 9_020) if not run.order.looked[number])
    run.disk.missing[snapshot_ref(f"b/{evicted}", "")] = evicted
    run.step(1)
    assert run.fetched == []
    run.course.doubt()
    run.step(1)
    assert run.fetched == [evicted]


def test_what_one_consumer_has_seen_the_others_know():
    one = Run(4_000, set())
    one.step(0)
    while one.order.at < 2_000:
        one.step(50)
    missing = {1_000, 1_001}
    other = Run(4_000, missing, storage=one.storage)
    other.step(0)
    assert len(other.order.looked) < 200
    one.course.doubt()  # a reader of either misses something
    other.step(0)
    assert other.fetched == []  # they are not in its window yet
    while other.order.at < 4_000:
        other.step(50)
    assert other.fetched == sorted(missing)


def test_where_nobody_says_how_far_he_is_all_is_looked_up():
    missing = {5_000, 7_777}
    run = Run(10_000, missing, follow=True)
    for _ in range(1000):
        run.step(0)
    assert run.fetched == sorted(missing)


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.0005, 0.01, 0.5]), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_it_comes_to_an_end_and_misses_few(seed: int, share: float, stride: int):
    chance = random.Random(seed)
    missing = {number for number in range(8_000) if chance.random() < share}
    run = Run(8_000, missing)
    while run.order.at < 8_000:
        run.step(stride)
    run.step(0)
    assert max(run.order.looked.values()) <= 3
    assert len(run.fetched) == len(set(run.fetched))
    assert set(run.fetched) <= missing
    if share >= 0.01:
        assert len(run.fetched) >= 0.9 * len(missing)


@pytest.mark.parametrize("bringing", [True, False])
def test_what_another_consumer_has_brought_is_a_reason_to_doubt(bringing: bool):
    run = Run(20_000, set())
    while run.order.at < 5_000:
        run.step(50)
    board: Any = run.course._board
    if bringing:
        for number in range(5_000, 9_000):
            board[DATASET, f"b/{number}"] = object()
    looked = len(run.order.looked)
    while run.order.at < 6_000:
        run.step(50)
    assert (len(run.order.looked) - looked > 900) == bringing


@pytest.mark.parametrize(
    ("mountpoint", "gone", "fetched"),
    [
        ("/data", version_ref("b/0", "v"), True),
        ("/data", snapshot_ref("b/0", ""), False),
        ("", version_ref("b/0", "v"), True),
        ("", snapshot_ref("b/0", ""), True),
    ],
)
def test_of_one_who_reads_through_a_mount_what_the_mount_finds_is_stored(mountpoint: str, gone: str, fetched: bool):
    """A mount looks by version. By URL it is the snapshot, and who told no mount may read through one all the same."""
    order = Order(1)
    order.wanted = lambda start, stop: [Wanted("b/0", "v", 10)]  # type: ignore[method-assign]
    disk = SimpleNamespace(file=lambda dataset, ref: None if ref == gone else f"/blobs/{ref}")
    announce = Announce(id=1, attachment=1, label="", names=0, mountpoint=mountpoint)
    course = Course(cast(Announced, order), announce, 1, cast(Reader, disk), {}, SpotCheck(10, 10))
    course.plan(Plan(id=1, consumer=1, at=0, count=1, kind="names"), -1)
    assert (course.next() is not None) == fetched

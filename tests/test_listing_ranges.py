"""A flat listing made in ranges: the same names, each once, whatever they are called; soon by all who have time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.catalog import ranges
from cachefs.catalog.listing import build
from cachefs.catalog.ranges import FREE_GUESSES, PAGES_PER_GUESS, RangedListing, between
from cachefs.errors import OriginUnreachable
from cachefs.messages import Entry
from cachefs.origin import open_origin
from cachefs.origin.spec import OriginSpec
from tests.conftest import ThrottledBucket

FOLDER = "b/set"


class Bucket:
    """Objects below FOLDER; lists `page` at a time, and each page takes a turn of all who list."""

    identity = "bucket"

    def __init__(self, names: list[str], *, page: int = 10, ordered: bool = True) -> None:
        self.keys = sorted(f"{FOLDER}/{name}" for name in names)
        self.page = page
        self.ordered = ordered
        self.requests = self.in_flight = self.most_in_flight = 0
        self.fail_after = 2**62

    def in_key_order(self, path: str) -> bool:
        return self.ordered

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        assert path == FOLDER
        left = [key for key in self.keys if key > after]
        for at in range(0, max(1, len(left)), self.page):
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            await asyncio.sleep(0.0005)
            self.in_flight -= 1
            self.requests += 1
            if self.requests > self.fail_after:
                raise OriginUnreachable("gone")
            yield [Entry(key, 1, 0, "v") for key in left[at : at + self.page]]

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        async for page in self.list_all(path):
            yield page

    async def head(self, path: str) -> Entry:
        return Entry(path, 0, 0, "", True)

    async def listed(self, at_once: int = 8) -> list[str]:
        found: list[str] = []

        async def take(page: list[Entry]) -> None:
            await asyncio.sleep(0)
            found.extend(entry.path for entry in page)

        idle = asyncio.Semaphore(at_once)
        async with asyncio.timeout(60), idle:
            await RangedListing(self, FOLDER, idle, take).run()
        assert not idle.locked()
        return found


def photos(count: int) -> list[str]:
    return [f"img_{number:08d}.jpg" for number in range(count)]


@pytest.mark.parametrize(
    "names",
    [
        photos(3000),
        [f"{random.Random(n).randbytes(8).hex()}.jpg" for n in range(3000)],
        [f"{n}" for n in range(3000)],
        [f"c{n % 9}/{n // 9}/x.png" for n in range(3000)],
    ],
    ids=["numbered", "by digest", "not padded", "in folders"],
)
async def test_each_name_once_and_by_several(names: list[str]):
    bucket = Bucket(names)
    assert sorted(await bucket.listed()) == bucket.keys
    assert bucket.most_in_flight >= 7
    useful = len(names) / bucket.page
    # A page of each range is cut, and guesses find nothing.
    assert bucket.requests <= useful + 2 * (FREE_GUESSES + useful / PAGES_PER_GUESS)


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=6),
            st.integers(0, 5000).map(lambda n: f"img_{n:05d}"),
            st.text("-./0Az~\x7f\x80é", min_size=1, max_size=5),
        ),
        max_size=300,
        unique=True,
    ),
    st.integers(1, 9),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_any_names(names: list[str], at_once: int, page: int):
    bucket = Bucket(names, page=page)
    assert sorted(asyncio.run(bucket.listed(at_once))) == bucket.keys
    assert bucket.most_in_flight <= at_once


@given(st.text(max_size=5), st.text(max_size=5))
def test_between_is_between(low: str, high: str):
    middle = between(low, high)
    assert not middle or low < middle < high


def test_between_is_about_the_middle():
    assert between("b/img_00001000.jpg", "b/img_00009000.jpg") == "b/img_00005"
    assert between("b/img_00001000.jpg", "b/img_00002000.jpg") == "b/img_00001W"
    assert between("b/a", "b/a-") == between("b/b", "b/a") == between("", "") == between("b/é", "b/\x7f") == ""


async def test_where_there_is_no_order_one_lists_all():
    bucket = Bucket(photos(500), ordered=False)
    assert await bucket.listed() == bucket.keys
    assert (bucket.most_in_flight, bucket.requests) == (1, 50)


@pytest.mark.parametrize("swapped", [15, 1500], ids=["at once", "after ranges had begun"])
async def test_a_server_that_has_another_order_is_listed_by_one(swapped: int):
    bucket = Bucket(photos(3000))
    names = list(bucket.keys)
    bucket.keys[swapped], bucket.keys[swapped + 1] = bucket.keys[swapped + 1], bucket.keys[swapped]
    assert set(await bucket.listed()) == set(names)
    assert (bucket.most_in_flight > 1) == (swapped == 1500)


async def test_a_failure_ends_all():
    bucket = Bucket(photos(3000))
    bucket.fail_after = 100
    with pytest.raises(OriginUnreachable):
        await bucket.listed()
    assert bucket.requests <= 100 + 8


async def test_a_large_directory_at_the_top_is_listed_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cachefs.catalog.listing._MAX_OBJECTS", 200)
    bucket = Bucket(photos(3000))
    with await build(bucket, FOLDER, tmp_path / "catalog") as catalog:
        assert [path for path, _ in catalog.files()] == bucket.keys
    assert bucket.most_in_flight >= 7


async def test_a_real_server(throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(ranges, "LONG", 1)
    monkeypatch.setattr("cachefs.catalog.listing._MAX_OBJECTS", 1000)
    names = [f"set/img_{number:05d}.jpg" for number in range(0, 5000, 2)] + ["set/a b+c%.jpg", "set/ü/1", "set/~"]
    for name in names:
        throttled.put(name, b"x")
    origin = open_origin(OriginSpec("s3", throttled.options, {"HOME": "/nonexistent"}))
    try:
        with await build(origin, f"{throttled.name}/set", tmp_path / "catalog") as catalog:
            assert [path for path, _ in catalog.files()] == sorted(f"{throttled.name}/{name}" for name in names)
    finally:
        await origin.aclose()
    assert throttled.throttle.traffic().total > 10  # several ranges: 4 pages had it all

"""Listing an origin into a catalog: everything once, in parallel, resumed after failures, and stopped when asked."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.catalog import Builder, Catalog, Row, build, listing, staging
from cachefs.errors import CacheFull, ConfigError, ObjectNotFound, OriginTimeout, OriginUnreachable
from cachefs.messages import Entry


@dataclass
class FakeOrigin:
    """An object store in memory. Its keys are taken literally, as S3 does; pages are short, so that there are many."""

    objects: dict[str, tuple[int, str]]
    page: int = 10
    identity: str = "fake"
    fail: dict[str, Exception] = field(default_factory=dict)  # below this directory, on the second page
    gate: asyncio.Event | None = None  # pages wait for it
    ordered: bool = False
    calls: list[tuple[str, str]] = field(default_factory=list)
    pages: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    closed: int = 0

    def entry(self, key: str) -> Entry:
        size, version = self.objects[key]
        return Entry(key, size, 7, version)

    async def head(self, path: str) -> Entry:
        self.calls.append(("head", path))
        if path in self.objects:
            return self.entry(path)
        if any(key.startswith(path + "/") for key in self.objects):
            return Entry(path, 0, 0, "", True)
        raise ObjectNotFound(f"{path}: no such object", path=path)

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        self.calls.append(("level", path))
        prefix = path + "/" if path else ""
        found: dict[str, Entry] = {}
        for key in sorted(self.objects):
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                if slash:
                    found[prefix + name + "/"] = Entry(prefix + name, 0, 0, "", True)
                else:
                    found[key] = self.entry(key)
        async for page in self._pages(path, list(found.values())):
            yield page

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        self.calls.append(("all", path))
        prefix = path + "/" if path else ""
        keys = [key for key in sorted(self.objects) if key.startswith(prefix) and key > after]
        async for page in self._pages(path, [self.entry(key) for key in keys]):
            yield page

    def in_key_order(self, path: str) -> bool:
        return self.ordered

    async def _pages(self, path: str, found: list[Entry]) -> AsyncIterator[list[Entry]]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            for at in range(0, len(found), self.page):
                await asyncio.sleep(0)
                if self.gate is not None:
                    await self.gate.wait()
                if at and path in self.fail:
                    raise self.fail[path]
                self.pages += 1
                yield found[at : at + self.page]
        finally:
            self.in_flight -= 1
            self.closed += 1

    def listed(self, kind: str) -> list[str]:
        return sorted(path for what, path in self.calls if what == kind)


def tree(*folders: str, files: int = 25) -> dict[str, tuple[int, str]]:
    return {f"{folder}/{number}": (number, f"v{number}") for folder in folders for number in range(files)}


def row_of(catalog: Catalog, path: str) -> Row:
    row = catalog.find(path)
    assert row is not None
    return row


def contents(catalog: Catalog) -> dict[str, tuple[int, str]]:
    return {path: (row.size, row.version) for path, row in catalog.files()}


# A sealed catalog waits for the disk a few times; in memory that is nothing.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

CLASSES = [f"b/set/train/c{number:02d}" for number in range(20)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog"


def leftovers(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


async def test_everything_once(file):
    origin = FakeOrigin(tree(*CLASSES, "b/set/val", "b/set", "b/other", "b/set2"))
    with await build(origin, "b/set", file) as catalog:
        assert contents(catalog) == tree(*CLASSES, "b/set/val", "b/set")
        assert catalog.summary.identity == "fake"
        assert row_of(catalog, "b/set/train/c00/3").mtime_ns == 7
    assert leftovers(file) == ["catalog"]
    assert origin.in_flight == 0


async def test_goes_down_until_there_is_a_fan_out(file):
    origin = FakeOrigin(tree(*CLASSES, "b/set/val/deep"))
    await build(origin, "b/set", file)
    assert origin.listed("level") == ["b/set", "b/set/train", "b/set/val"]
    assert origin.listed("all") == [*CLASSES, "b/set/val/deep"]
    assert origin.most_in_flight == 8


async def test_a_long_way_down(file):
    deep = "b/" + "/".join("abcdefghijklmnopqrstuvwxyz")
    origin = FakeOrigin(tree(deep))
    with await build(origin, "b", file) as catalog:
        assert contents(catalog) == tree(deep)
    assert len(origin.listed("level")) == 16


async def test_one_flat_directory_streams(file):
    origin = FakeOrigin(tree("b", files=5000), page=1000)
    with await build(origin, "b", file) as catalog:
        assert catalog.summary.files == 5000
    assert origin.pages == 5


async def test_too_many_directories_are_listed_from_above(file, monkeypatch):
    monkeypatch.setattr(listing, "_MAX_FOLDERS", 50)
    origin = FakeOrigin(tree(*(f"b/d{number}" for number in range(200)), files=2) | tree("b"))
    counts: list[int] = []
    with await build(origin, "b", file, progress=lambda objects, size: counts.append(objects)) as catalog:
        assert contents(catalog) == origin.objects
        assert counts[-1] == catalog.summary.files  # not counted twice
    assert origin.listed("all") == ["b"]
    assert origin.pages < 60


async def test_everything_at_the_origin(file):
    origin = FakeOrigin(tree("b1", "b2/x"))
    with await build(origin, "", file) as catalog:
        assert contents(catalog) == origin.objects


async def test_repeated_listing_keeps_snapshot_and_numbers(file, tmp_path):
    origin = FakeOrigin(tree(*CLASSES))
    first = await build(origin, "b/set", file)
    second = await build(origin, "b/set", tmp_path / "second", previous=first)
    assert second.summary.snapshot == first.summary.snapshot
    assert list(second.files()) == list(first.files())
    origin.objects["b/set/train/c00/3"] = (3, "new")
    third = await build(origin, "b/set", tmp_path / "third", previous=second)
    assert third.summary.snapshot != first.summary.snapshot
    assert row_of(third, "b/set/train/c00/3").id > first.summary.last_id


# --- what is wrong with the root ---


async def test_nothing_there(file):
    origin = FakeOrigin(tree("b/other"))
    with pytest.raises(ObjectNotFound, match="b/set: nothing to list") as caught:
        await build(origin, "b/set", file)
    assert caught.value.path == "b/set"
    assert leftovers(file) == []


async def test_nothing_at_the_whole_origin(file):
    with pytest.raises(ObjectNotFound, match="nothing at this origin"):
        await build(FakeOrigin({}), "", file)
    assert leftovers(file) == []


async def test_the_root_is_an_object(file):
    with pytest.raises(ConfigError, match=r"b/a\.jpg: is an object"):
        await build(FakeOrigin({"b/a.jpg": (1, "v")}), "b/a.jpg", file)
    assert leftovers(file) == []


async def test_the_root_is_an_object_that_its_origin_lists(file):
    class Local(FakeOrigin):
        async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
            yield [self.entry(path)]

    with pytest.raises(ConfigError, match="is an object"):
        await build(Local({"d/a.jpg": (1, "v")}), "d/a.jpg", file)


async def test_an_object_beside_the_root_is_no_part_of_it(file):
    origin = FakeOrigin(tree("b/set") | {"b/set": (5, "v")})
    with await build(origin, "b/set", file) as catalog:
        assert contents(catalog) == tree("b/set")


async def test_an_empty_directory(file):
    with await build(FakeOrigin({"b/set/": (0, "v")}), "b/set", file) as catalog:
        assert contents(catalog) == {}


async def test_a_root_that_lists_as_missing(file):
    class Local(FakeOrigin):
        async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
            if path not in self.objects:
                raise ObjectNotFound(f"{path}: no such directory", path=path)
            yield []

    with pytest.raises(ObjectNotFound, match="nothing to list"):
        await build(Local({}), "/data/x", file)


# --- odd names ---

ODD = {
    "b/set//x": (1, "v"),
    "b/set//y/z": (1, "v"),
    "b/set/../x": (1, "v"),
    "b/set/./x": (1, "v"),
    "b/set/.": (1, "v"),
    "b/set/a//b": (1, "v"),
    "b/set/a/../../x": (1, "v"),
    "b/set/n": (1, "v"),
    "b/set/n/x": (1, "v"),
    "b/set/" + "x" * 256 + "/y": (1, "v"),
    "b/set/c/": (1, "v"),
    "b/set/d/\udc80": (1, "v"),
}


async def test_odd_names_are_skipped_each_with_its_reason(file):
    good = tree(*CLASSES) | {
        "b/set/.hidden": (1, "v"),
        "b/set/.h/x": (1, "v"),
        "b/set/0": (1, "v"),
        "b/set/-": (1, "v"),
    }
    origin = FakeOrigin(good | ODD, page=3)
    with await build(origin, "b/set", file) as catalog:
        assert contents(catalog) == good | {"b/set/n/x": (1, "v")}
        skipped = dict(catalog.skipped())
        assert skipped.keys() >= ODD.keys() - {"b/set/n/x"}
        # The rest is a directory that the origin named so.
        assert skipped.keys() - ODD.keys() == {"b/set/" + "x" * 256}
    # Such a directory is never asked for.
    assert not any(path.endswith(("/", "/.", "/..")) for _, path in origin.calls)


async def test_contents_of_odd_directories_are_found_without_reading_all(file):
    origin = FakeOrigin(tree(*CLASSES) | {"b/set/../x": (1, "v")}, page=10)
    plain = FakeOrigin(tree(*CLASSES), page=10)
    await build(origin, "b/set", file)
    await build(plain, "b/set", file)
    assert origin.pages <= plain.pages + 3


keys = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "a-", "", ".", "..", "0"]), min_size=1, max_size=4).map("/".join),
    max_size=20,
    unique=True,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(keys, st.integers(1, 3), st.integers(1, 4))
def test_any_bucket_is_served_or_skipped(names, page, fan_out):
    """The parallel listing finds what a plain one finds, however the names fall."""
    objects = {f"b/{name}": (0 if f"b/{name}".endswith("/") else 1, "v") for name in names}
    origin = FakeOrigin(objects, page=page)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder, "c")
        patch.setattr(listing, "_CONCURRENCY", fan_out)
        if not objects:
            with pytest.raises(ObjectNotFound):
                asyncio.run(build(origin, "b", file))
            return
        catalog = asyncio.run(build(origin, "b", file))
    skipped = {path for path, _ in catalog.skipped()}
    served = set(contents(catalog))
    for path in objects:
        row = catalog.find(path)
        as_directory = path.endswith("/") and row is not None and row.directory
        assert (path in served) + (path in skipped) + as_directory == 1
    assert served <= objects.keys()


# --- failures, resuming, cancelling ---


async def test_a_failure_in_the_middle_and_on_from_there(file, monkeypatch):
    monkeypatch.setattr(listing, "_CONCURRENCY", 2)
    origin = FakeOrigin(tree(*CLASSES, "b/set"), fail={CLASSES[10]: OriginTimeout("slow", path="b")})
    with pytest.raises(OriginTimeout, match="slow"):
        await build(origin, "b/set", file)
    assert leftovers(file) == ["catalog.building"]
    assert origin.in_flight == 0
    first = origin.listed("all")
    assert CLASSES[10] in first

    origin.fail.clear()
    origin.calls.clear()
    seen: list[tuple[int, int]] = []
    with await build(origin, "b/set", file, progress=lambda *numbers: seen.append(numbers)) as catalog:
        assert contents(catalog) == origin.objects
    again = set(first) & set(origin.listed("all"))
    assert CLASSES[10] in again
    assert len(again) <= 2  # the one that failed, and the one that was in flight
    assert len(first) >= 10
    # What was not listed again counts all the same.
    assert seen[-1] == (len(origin.objects), sum(size for size, _ in origin.objects.values()))


async def test_not_on_from_there_when_told_so(file):
    origin = FakeOrigin(tree(*CLASSES), fail={CLASSES[19]: OriginUnreachable("gone")})
    with pytest.raises(OriginUnreachable):
        await build(origin, "b/set", file)
    origin.fail.clear()
    origin.calls.clear()
    await build(origin, "b/set", file, resume=False)
    assert origin.listed("all") == CLASSES


async def test_a_directory_that_vanishes_meanwhile_is_empty(file):
    class Vanishing(FakeOrigin):
        async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
            if path == CLASSES[3]:
                raise ObjectNotFound(f"{path}: no such directory", path=path)
            async for page in super().list_all(path, after=after):
                yield page

    origin = Vanishing(tree(*CLASSES))
    with await build(origin, "b/set", file) as catalog:
        assert contents(catalog) == tree(*(c for c in CLASSES if c != CLASSES[3]))


async def test_an_error_of_the_builder_ends_the_listing(file, monkeypatch):
    def full(self: staging.Staging, entry: Entry) -> None:
        raise CacheFull("no space left", path="x")

    monkeypatch.setattr(staging.Staging, "add", full)
    origin = FakeOrigin(tree(*CLASSES))
    with pytest.raises(CacheFull):
        await build(origin, "b/set", file)
    assert origin.in_flight == 0


@pytest.mark.parametrize("open_pages", [0, 30])
async def test_cancelled_while_listing(file, open_pages):
    gate = asyncio.Event()
    origin = FakeOrigin(tree(*CLASSES), gate=gate)
    task = asyncio.create_task(build(origin, "b/set", file))
    if open_pages:
        gate.set()
        while origin.pages < open_pages and not task.done():
            await asyncio.sleep(0)
        gate.clear()
    await reached(lambda: origin.in_flight > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert origin.in_flight == 0
    origin.gate = None
    origin.calls.clear()
    with await build(origin, "b/set", file) as catalog:  # the lock on the unfinished file is gone
        assert contents(catalog) == origin.objects
    if open_pages:
        assert len(origin.listed("all")) < 20


async def test_cancelled_at_once(file):
    task = asyncio.create_task(build(FakeOrigin(tree("b")), "b", file))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with await build(FakeOrigin(tree("b")), "b", file) as catalog:
        assert catalog.summary.files == 25


async def test_cancelled_while_sealing(file, monkeypatch):
    origin = FakeOrigin(tree(*CLASSES))
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    rows, folder = staging.Staging.rows, staging.Staging.folder

    def endless(self: staging.Staging):
        loop.call_soon_threadsafe(started.set)
        yield from rows(self)
        number = 0
        while True:
            yield 2, b"x", b"%020d" % (number := number + 1), 1, 1, 1, "v"

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "rows", endless)
        patch.setattr(staging.Staging, "folder", lambda self, path: (10**9, 0) if path == b"x" else folder(self, path))
        task = asyncio.create_task(build(origin, "b/set", file))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert leftovers(file) == ["catalog.building"]
    with await build(origin, "b/set", file) as catalog:
        assert contents(catalog) == origin.objects


async def test_progress_is_told_while_the_catalog_is_written(file, monkeypatch):
    """At most every 0.2 s, never backwards, and at the end the whole."""
    write = Builder.seal

    def slow(self: Builder) -> Catalog:
        # Two intervals of progress, or more on a slow machine.
        before, limit = len(calls), time.monotonic() + 30
        while len(calls) < before + 2 and time.monotonic() < limit:
            time.sleep(0.01)
        return write(self)

    calls: list[tuple[float, int, int]] = []
    monkeypatch.setattr(Builder, "seal", slow)
    origin = FakeOrigin(tree(*CLASSES))
    with await build(origin, "b/set", file, progress=lambda *n: calls.append((time.monotonic(), *n))) as catalog:
        summary = catalog.summary
    assert len(calls) >= 3
    assert calls[-1][1:] == (summary.files, summary.bytes)
    times = [when for when, _, _ in calls[:-1]]
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))
    assert [n for _, n, _ in calls] == sorted(n for _, n, _ in calls)


async def test_the_event_loop_stays_free(tmp_path):
    """SQLite works elsewhere: the loop turns while 50,000 entries are added and sealed.

    The best of some attempts: whatever else the machine does holds up the loop now and then.
    """
    worst = math.inf
    for attempt in range(8):
        turns, longest = await turns_while_listing(tmp_path / str(attempt))
        assert turns > 20
        worst = min(worst, longest)
        if worst < 0.5:
            break
    assert worst < 0.5


async def turns_while_listing(file) -> tuple[int, float]:
    """How often the loop turned, and the longest that one turn took, in seconds."""
    origin = FakeOrigin(tree(*(f"b/{n}" for n in range(10)), files=5000), page=1000)
    turns = 0
    longest = 0.0

    async def turn() -> None:
        nonlocal turns, longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
            turns += 1

    turning = asyncio.create_task(turn())
    with await build(origin, "b", file) as catalog:
        assert catalog.summary.files == 50_000
    turning.cancel()
    return turns, longest


async def reached(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)

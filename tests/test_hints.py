"""Plans, told to real fetchers about real storage: what they bring, how they end, and what wrong ones cannot do."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cachefs import CacheFileSystem
from cachefs.catalog import Catalog
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import snapshot_ref, version_ref
from cachefs.errors import PlanError
from cachefs.fetcher.prefetch.prefetcher import HOLD_BYTES
from cachefs.fetcher.prefetch.window import LEAST_ITEMS
from cachefs.hints.consumer import Consumer
from cachefs.hints.line import Line
from cachefs.messages import Announce, Announced, Done, Plan, Withdraw
from cachefs.plans import NO_NAME, PAGE, shared_memory, write_names, write_order
from cachefs.store import Reader
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import pid_of, wait_until

SIZE = 20_000
COUNT = 60


def content(number: int) -> bytes:
    return f"{number:06d}".encode() * (SIZE // 6)


def fill(bucket: ThrottledBucket, count: int = COUNT) -> list[str]:
    return [bucket.put(f"set/{number:04d}.jpg", content(number)) for number in range(count)]


@pytest.fixture
def fs(throttled: ThrottledBucket, cache_dir: Path) -> CacheFileSystem:
    return make_file_system(throttled, cache_dir)


def told(fs: CacheFileSystem, names: list[str], **options: Any) -> Consumer:
    """A consumer of the dataset that these names are in."""
    return Consumer(fs.config, fs.dataset_of(names[0])[1], names, **options)


def catalogued(fs: CacheFileSystem, bucket: ThrottledBucket) -> tuple[Session, Path]:
    """The bucket as a dataset of its own, listed: its session and the catalog's file."""
    session = replace(fs.dataset_of(bucket.name)[1], root=bucket.name, snapshot="")
    with closing(Connection(fs.config, session)) as connection:
        return session, Path(connection.make_catalog().file)


def consumers(config: CacheConfig) -> list[dict[str, Any]]:
    with closing(Connection(config, None)) as connection:
        found: list[dict[str, Any]] = connection.status().status["consumers"]
        return found


def report(fs: CacheFileSystem) -> dict[str, Any]:
    (found,) = consumers(fs.config)
    return found


def known(fs: CacheFileSystem, consumer: Consumer) -> bool:
    """Whether the fetcher of now knows of it. A look that comes too early, or takes too long, is not the last."""
    consumer.look()
    return len(consumers(fs.config)) == 1


def memories(home: Path) -> int:
    """Descriptors that the fetcher has of consumers: of what they passed, and of their processes."""
    count = 0
    for link in Path(f"/proc/{pid_of(home)}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += any(word in os.readlink(link) for word in ("cachefs-plan", "pidfd"))
    return count


# --- what they bring -----------------------------------------------------------------------------------------


def test_what_is_announced_is_there_before_it_is_asked_for(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled)
    with closing(told(fs, names, label="rank 0")) as consumer:
        consumer.plan(array("I", reversed(range(COUNT))))
        wait_until(lambda: consumer.frontier == COUNT)
        assert throttled.reads == {f"set/{n:04d}.jpg": 1 for n in range(COUNT)}
        requests = throttled.throttle.traffic().total
        assert [fs.cat_file(name) for name in names] == [content(n) for n in range(COUNT)]
        assert throttled.throttle.traffic().total == requests
        found = report(fs)
        assert (found["label"], found["pid"], found["prefetched"], found["late"]) == ("rank 0", os.getpid(), COUNT, 0)


def test_both_faces_find_it(throttled: ThrottledBucket, fs: CacheFileSystem):
    """A mount looks for a version, a file system for what its snapshot has."""
    names = fill(throttled, 5)
    catalogued(fs, throttled)
    fs.invalidate_cache()
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(5)))
        wait_until(lambda: consumer.frontier == 5)
        attached = fs._views.of(names[0])
        reader = Reader(fs.config.dirs)
        catalog = attached.catalog()
        assert catalog is not None
        for name in names:
            row = catalog.find(name)
            assert row is not None
            assert reader.file(attached.dataset, version_ref(name, row.version))
            assert reader.file(attached.dataset, snapshot_ref(name, attached.snapshot))


def test_what_one_face_has_is_linked_for_the_other(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 5)
    session, _ = catalogued(fs, throttled)
    fs.invalidate_cache()
    with closing(Connection(fs.config, session)) as connection:
        connection.warm()  # by version only
    attached = fs._views.of(names[0])
    reader = Reader(fs.config.dirs)
    assert not reader.file(attached.dataset, snapshot_ref(names[0], attached.snapshot))
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(5)))
        wait_until(lambda: consumer.frontier == 5)
        assert all(reader.file(attached.dataset, snapshot_ref(name, attached.snapshot)) for name in names)
    assert set(throttled.reads.values()) == {1}


def test_by_number_of_the_catalog_and_by_name(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 10)
    session, file = catalogued(fs, throttled)
    with Catalog.open(file) as catalog:
        ids = [row.id for name in names[:5] if (row := catalog.find(name))]
    with closing(Consumer(fs.config, session)) as consumer:
        consumer.plan_ids(array("Q", [*ids, 1, 10**15]))  # a directory and nothing
        consumer.plan_names(names[5:])
        wait_until(lambda: consumer.frontier == 12)
        assert set(throttled.reads.values()) == {1}
        assert len(throttled.reads) == 10
        assert report(fs)["unknown"] == 2
    with closing(told(fs, names)) as consumer, pytest.raises(PlanError, match="no catalog"):
        consumer.plan_ids(array("Q", ids))


def test_only_the_window_is_fetched(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 3 * LEAST_ITEMS)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(len(names))))
        wait_until(lambda: consumer.frontier == LEAST_ITEMS)
        time.sleep(0.2)
        assert len(throttled.reads) == LEAST_ITEMS
        consumer.at(50)
        wait_until(lambda: consumer.frontier >= LEAST_ITEMS + 50)
        consumer.at(len(names))
        wait_until(lambda: consumer.frontier == len(names))
        assert set(throttled.reads.values()) == {1}


def test_a_plan_is_replaced_extended_and_withdrawn(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 400)
    consumer = told(fs, names)
    consumer.plan(array("I", range(300)))
    wait_until(lambda: consumer.frontier == LEAST_ITEMS)
    throttled.throttle.set(latency=0.5)  # so that the old plan does not come far before it is replaced
    consumer.at(100)
    consumer.plan(array("I", range(390, 400)), at=100)
    throttled.throttle.set(latency=0)
    wait_until(lambda: consumer.frontier == 110)
    assert consumer.end == 110
    consumer.plan(array("I", range(380, 390)))
    wait_until(lambda: consumer.frontier == 120)
    assert {f"set/{n:04d}.jpg" for n in range(380, 400)} <= throttled.reads.keys()
    assert "set/0290.jpg" not in throttled.reads
    done = consumer.withdraw()
    assert done.count >= 148
    assert consumers(fs.config) == []
    consumer.at(119)  # harmless


def test_ten_million_entries_make_no_pause(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled)
    order = array("I", range(COUNT)) * (10_000_000 // COUNT)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(1)))
        wait_until(lambda: consumer.frontier == 1)
        began = time.process_time()
        consumer.plan(order)
        assert time.process_time() - began < 1.0  # 40 MB are written, and that is all
        consumer.at(9_000_000)
        wait_until(lambda: report(fs)["position"] == 9_000_000)
        wait_until(lambda: consumer.frontier > 9_000_000)


def test_ten_million_ids_are_not_copied(throttled: ThrottledBucket, fs: CacheFileSystem):
    """They are 80 MB in the consumer's memory, and stay there; what is replaced is let go."""
    names = fill(throttled)
    session, file = catalogued(fs, throttled)
    with Catalog.open(file) as catalog:
        ids = array("Q", [row.id for name in names if (row := catalog.find(name))])
    for name in names:
        fs.cat_file(name)
    status = Path(f"/proc/{pid_of(fs.config.home)}/status")

    def own_bytes() -> int:
        return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024

    with closing(Consumer(fs.config, session)) as consumer:
        consumer.plan_ids(ids)
        wait_until(lambda: consumer.frontier == COUNT)
        before = own_bytes()
        for at in (COUNT, COUNT, 5_000_000):
            consumer.plan_ids(ids * (10_000_000 // COUNT), at=at)
            wait_until(lambda at=at: report(fs)["end"] == at + 10_000_000 // COUNT * COUNT)
            consumer.at(at + 1_000_000)
            wait_until(lambda at=at: consumer.frontier >= at + 1_000_000 + LEAST_ITEMS)
            assert own_bytes() - before < 16_000_000
        assert len(set(throttled.reads.values())) == 1, "each is read once, though it is named 166,666 times"
        wait_until(lambda: memories(fs.config.home) <= 4)  # the page, what is left of the plans, and its process


def test_readers_and_the_prefetcher_never_read_twice(throttled: ThrottledBucket, fs: CacheFileSystem):
    """The reader is right behind the prefetcher, and before it at first."""
    names = fill(throttled, 200)
    throttled.throttle.set(latency=0.02)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(200)))
        for number, name in enumerate(names):
            assert fs.cat_file(name) == content(number)
            consumer.at(number + 1)
        assert set(throttled.reads.values()) == {1}
        found = report(fs)
        assert found["late"] > 0
        assert found["waited"] > 0


@pytest.mark.parametrize("cache_size", ["30M", "0"])
def test_what_does_not_fit_streams_through_and_is_read_once(
    throttled: ThrottledBucket, cache_dir: Path, cache_size: str
):
    count, size = 200, 1_000_000  # more than is held and more than is remembered, together
    data = [bytes([number]) * size for number in range(count)]
    names = [throttled.put(f"set/{number:04d}.jpg", data[number]) for number in range(count)]
    fs = make_file_system(throttled, cache_dir, cache_size=cache_size)
    with closing(told(fs, names)) as consumer:
        for epoch in range(2):
            throttled.throttle.reset()
            consumer.plan(array("I", range(count)))
            for number, name in enumerate(names):
                assert fs.cat_file(name) == data[number]
                consumer.at(count * epoch + number + 1)
                if number % 20 == 0:
                    time.sleep(0.05)  # the prefetcher gets ahead
                    assert report(fs)["held_bytes"] <= HOLD_BYTES
            assert set(throttled.reads.values()) == {1}
            assert len(throttled.reads) > 100
        assert report(fs)["prefetched"] > 100


def test_a_wrong_plan_costs_the_origin_next_to_nothing(tmp_path: Path, cache_dir: Path, monkeypatch: Any):
    """Names are right, the order is that of another epoch: what was fetched ahead is read now and then, by chance."""
    monkeypatch.setenv("CACHEFS_MEMORY", "1G")  # of which a fetcher remembers less than this dataset has
    count, size = 6000, 8000
    names = [str(tmp_path / f"set/{number:04d}.jpg") for number in range(count)]
    (tmp_path / "set").mkdir()
    for number, name in enumerate(names):
        Path(name).write_bytes(b"%08d" % number * (size // 8))
    fs = fsspec.filesystem("cachefs", target_protocol="file", cache_dir=str(cache_dir), cache_size="0")
    dice = random.Random(0)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", dice.sample(range(count), count)))
        for read, number in enumerate(dice.sample(range(count), count)):
            assert fs.cat_file(names[number])[:8] == b"%08d" % number
            consumer.at(read + 1)
        assert 0 < report(fs)["prefetched"] < count / 20
        assert "not in the order that it said" in report(fs)["says"]
        with closing(Connection(fs.config, None)) as connection:
            counters: Any = connection.status().status["counters"]
        assert counters["origin_requests"] <= 1.01 * count


def test_items_that_fail_are_left_to_their_readers(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled)
    throttled.delete("set/0007.jpg")
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(COUNT)))
        wait_until(lambda: consumer.frontier == COUNT)
        assert report(fs)["failed"] == 1
        assert report(fs)["prefetched"] == COUNT - 1
        with pytest.raises(FileNotFoundError):
            fs.cat_file(names[7])


def test_consumers_share_by_what_they_need(throttled: ThrottledBucket, fs: CacheFileSystem):
    """One that came first with a long plan does not starve one that comes later."""
    names = fill(throttled, 400)
    throttled.throttle.set(latency=0.2)

    def ahead() -> dict[str, int]:
        return {found["label"]: found["ahead"] for found in consumers(fs.config)}

    with closing(told(fs, names, label="first")) as first, closing(told(fs, names, label="second")) as second:
        first.plan(array("I", range(200)))
        second.plan(array("I", range(200, 400)))
        lead = ahead()["first"]  # what came while nothing else was wanted
        wait_until(lambda: second.frontier >= 30 or first.frontier >= lead + 100)
        found = ahead()
        assert -64 <= found["first"] - found["second"] <= 64 + lead


# --- how they end --------------------------------------------------------------------------------------------


def test_a_killed_fetcher_is_told_again(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 300)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(300)))
        consumer.at(10)
        wait_until(lambda: consumer.frontier >= LEAST_ITEMS)
        for number in (298, 299):
            os.kill(pid_of(fs.config.home), signal.SIGKILL)
            assert fs.cat_file(names[number]) == content(number)  # whoever misses something starts the next one
            wait_until(lambda: known(fs, consumer))
        consumer.at(250)
        wait_until(lambda: consumer.frontier == 300)
        assert [fs.cat_file(name) for name in names] == [content(n) for n in range(300)]


def test_what_was_refused_is_not_told_to_the_next_fetcher(throttled: ThrottledBucket, fs: CacheFileSystem):
    """It would refuse it too, and with it everything that comes after."""
    names = fill(throttled, 20)
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(5)))
        with pytest.raises(PlanError, match="leave none out"):
            consumer.plan(array("I", range(5)), at=100)
        assert (consumer.end, consumer.parts) == (5, 1)
        os.kill(pid_of(fs.config.home), signal.SIGKILL)
        assert fs.cat_file(names[19]) == content(19)
        wait_until(lambda: known(fs, consumer))
        assert report(fs)["end"] == 5
        consumer.plan(array("I", range(5, 10)))
        wait_until(lambda: consumer.frontier == 10)


def _consume(fs: CacheFileSystem, names: list[str], ready: Any) -> None:
    consumer = told(fs, names)
    consumer.plan(array("I", range(len(names))))
    child = os.fork()  # a loader's worker, with a copy of the socket
    if child:
        ready.put(child)
    time.sleep(60)


def test_a_killed_consumer_is_forgotten_though_its_worker_lives(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled)
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    process = context.Process(target=_consume, args=(fs, names, ready))
    process.start()
    worker = ready.get(timeout=30)
    try:
        assert len(consumers(fs.config)) == 1
        os.kill(process.pid or 0, signal.SIGKILL)
        wait_until(lambda: consumers(fs.config) == [])
        assert Path(f"/proc/{worker}").exists()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.join()


def test_the_fetcher_keeps_no_descriptor_of_what_has_ended(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 10)
    fs.cat_file(names[0])
    home = fs.config.home
    with closing(told(fs, names)) as consumer:
        for _ in range(20):
            consumer.at(consumer.end)
            consumer.plan(array("I", range(10)))
        assert 2 <= memories(home) <= 24
    wait_until(lambda: memories(home) == 0)


# --- wrong ones ----------------------------------------------------------------------------------------------


@pytest.fixture
def line(throttled: ThrottledBucket, fs: CacheFileSystem) -> Iterator[Line]:
    fill(throttled)
    made = Line(fs.config, fs.dataset_of(f"{throttled.name}/set/0000.jpg")[1], 30.0)
    yield made
    made.close()
    # Whatever was said, reads are unharmed.
    assert fs.cat_file(f"{throttled.name}/set/0003.jpg") == content(3)


def memory(size: int = PAGE, write: Callable[[int], None] = lambda fd: None) -> int:
    fd = shared_memory()
    os.ftruncate(fd, size)
    write(fd)
    return fd


def announced(line: Line, names: list[str]) -> int:
    fd = memory(write=lambda fd: write_names(fd, PAGE, names))
    request = Announce(id=line.new_id(), attachment=0, names=len(names))
    try:
        return line.ask(request, Announced, fd).consumer
    finally:
        os.close(fd)


def plan(line: Line, consumer: int, fd: int, **fields: Any) -> None:
    request = Plan(id=line.new_id(), consumer=consumer, **{"at": 0, "count": 4, **fields})
    try:
        line.ask(request, Done, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def test_announcements_that_are_refused(line: Line, tmp_path: Path):
    def announce(fd: int, **fields: Any) -> None:
        try:
            line.ask(Announce(id=line.new_id(), **{"attachment": 0, **fields}), Announced, fd)
        finally:
            if fd >= 0:
                os.close(fd)

    with (tmp_path / "file").open("wb") as file:
        file.truncate(PAGE)
        with pytest.raises(PlanError, match="memfd"):
            announce(os.dup(file.fileno()))
    with pytest.raises(PlanError, match="page is missing"):
        announce(memory(100))
    with pytest.raises(PlanError, match="do not fit"):
        announce(memory(), names=1000)
    for count in (2**40, -1, 2**62):
        with pytest.raises(PlanError, match="at most"):
            announce(memory(), names=count)
    with pytest.raises(PlanError, match="without its memory"):
        announce(-1)
    with pytest.raises(PlanError, match="attachment 7"):
        announce(memory(), attachment=7)
    with pytest.raises(PlanError, match="consumer 3"):
        line.ask(Withdraw(id=line.new_id(), consumer=3), Done)


def test_plans_that_are_refused(line: Line, throttled: ThrottledBucket, tmp_path: Path):
    consumer = announced(line, [f"{throttled.name}/set/0000.jpg"])
    order = array("I", range(4))
    with pytest.raises(PlanError, match="do not fit"):
        plan(line, consumer, memory(8))
    for count in (2**40, -1):
        with pytest.raises(PlanError, match="at most"):
            plan(line, consumer, memory(write=lambda fd: write_order(fd, order)), count=count)
    with pytest.raises(PlanError, match="goes on at item 9"):
        plan(line, consumer, memory(), at=9)
    with pytest.raises(PlanError, match="kind"):
        plan(line, consumer, memory(), kind="poem")
    with pytest.raises(PlanError, match="consumer 5"):
        plan(line, 5, memory())
    with pytest.raises(PlanError, match="without its memory"):
        plan(line, consumer, -1)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(PAGE)
        with pytest.raises(PlanError, match="memfd"):
            plan(line, consumer, os.dup(file.fileno()))
    for at in range(256):
        plan(line, consumer, memory(), count=1, at=at)
    with pytest.raises(PlanError, match="parts"):
        plan(line, consumer, memory(), count=1, at=256)


def test_entries_that_are_none_are_counted(line: Line, throttled: ThrottledBucket, fs: CacheFileSystem):
    good = f"{throttled.name}/set/0000.jpg"
    names = [good, "", "with\0nul", "\ud800", "x" * 20_000, good]
    consumer = announced(line, names)
    order = array("I", [0, 1, 2, 3, 4, 5, 6, 10**9, NO_NAME])
    plan(line, consumer, memory(write=lambda fd: write_order(fd, order)), count=len(order))
    wait_until(lambda: report(fs)["prefetched"] == 1)
    wait_until(lambda: report(fs)["unknown"] == 7)
    assert throttled.reads == {"set/0000.jpg": 1}


def test_names_outside_the_dataset(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 4)
    other = throttled.put("elsewhere.jpg", b"x")
    session, _ = catalogued(fs, throttled)
    part = replace(session, root=f"{throttled.name}/set")
    with closing(Consumer(fs.config, part, [*names, other, "another-bucket/a", f"{throttled.name}/set/../x"])) as it:
        it.plan(array("I", range(7)))
        wait_until(lambda: it.frontier == 7)
        assert (report(fs)["unknown"], report(fs)["failed"]) == (2, 1)  # that key may be: S3 has such names
        assert throttled.reads == {f"set/{n:04d}.jpg": 1 for n in range(4)} | {"set/../x": 1}


def test_tables_that_lie(line: Line, throttled: ThrottledBucket, fs: CacheFileSystem):
    """Offsets that point anywhere: backwards, beyond the end, at 2^63."""

    def lie(fd: int) -> None:
        offsets = array("Q", [0, 2**63, 5, 2**40, 3, 2**64 - 1, 7])
        os.pwrite(fd, offsets.tobytes(), PAGE)

    fd = memory(PAGE * 2, lie)
    consumer = line.ask(Announce(id=line.new_id(), attachment=0, names=6), Announced, fd).consumer
    os.close(fd)
    plan(line, consumer, memory(write=lambda fd: write_order(fd, array("I", range(6)))), count=6)
    wait_until(lambda: report(fs)["unknown"] == 6)


def test_memory_that_is_cut_off_later(line: Line, throttled: ThrottledBucket, fs: CacheFileSystem):
    names = [f"{throttled.name}/set/{n:04d}.jpg" for n in range(COUNT)]
    page = memory(write=lambda fd: write_names(fd, PAGE, names))
    request = Announce(id=line.new_id(), attachment=0, names=COUNT)
    consumer = line.ask(request, Announced, page).consumer
    order = memory(write=lambda fd: write_order(fd, array("I", [n % COUNT for n in range(10_000)])))
    os.ftruncate(page, 0)
    line.ask(Plan(id=line.new_id(), consumer=consumer, at=0, count=1000), Done, order)
    os.ftruncate(order, 0)
    os.close(page)
    os.close(order)
    wait_until(lambda: report(fs)["unknown"] >= LEAST_ITEMS)


def test_a_plan_of_names_that_are_not_there_is_given_up(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = [f"{throttled.name}/nothing/{n}" for n in range(5000)]
    with closing(told(fs, names)) as consumer:
        consumer.plan(array("I", range(5000)))
        wait_until(lambda: report(fs)["bottleneck"] == "plan")
        assert throttled.throttle.traffic().total < 1000
        assert "cannot be fetched" in report(fs)["says"]


def test_a_dataset_that_the_caller_may_not_read(throttled: ThrottledBucket, cache_dir: Path):
    names = fill(throttled, 20)
    stranger = make_file_system(throttled, cache_dir)
    session = stranger.dataset_of(names[0])[1]
    wrong = replace(session, options={**throttled.options, "secret": "another"})
    with closing(Consumer(stranger.config, wrong, names)) as consumer:
        consumer.plan(array("I", range(20)))
        wait_until(lambda: report(stranger)["failed"] > 0)
        time.sleep(0.3)
        assert report(stranger)["prefetched"] == 0
    assert stranger.cat_file(names[0]) == content(0)


def test_a_fetcher_that_is_just_ending_is_not_the_one_to_tell(throttled: ThrottledBucket, fs: CacheFileSystem):
    names = fill(throttled, 5)
    for _ in range(5):
        fs.cat_file(names[0])
        with closing(Connection(fs.config, None)) as connection:
            connection.attach()
            connection.shutdown()
        with closing(told(fs, names)) as consumer:
            consumer.plan(array("I", range(5)))
            wait_until(lambda consumer=consumer: consumer.frontier == 5)

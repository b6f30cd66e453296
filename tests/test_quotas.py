"""Quotas with a real fetcher and a real S3 server: never exceeded, right after any end, and nobody else pays."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachefs import datasets
from cachefs.client import Connection
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import ConfigError
from cachefs.store.ledger import charge, count_of
from tests.conftest import Bucket, ThrottledBucket
from tests.test_fetcher import config, content, fill, pid_of, read, s3, wait_until

ONE = charge(50_000)  # of `content`


def fill_two(bucket: Bucket, count: int = 20) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Objects below a/ and below b/."""
    a = {bucket.put(f"a/{n:03d}", content(n)): content(n) for n in range(count)}
    b = {bucket.put(f"b/{n:03d}", content(n + 500)): content(n + 500) for n in range(count)}
    return a, b


def below(bucket: Bucket, root: str, home: Path, **changes: object) -> Connection:
    return Connection(config(home, **changes), s3(bucket, root=f"{bucket.name}/{root}" if root else ""))


def warmed(connection: Connection) -> str:
    """The dataset, all of it stored that fits."""
    connection.make_catalog()
    assert connection.warm().failed_total == 0
    return connection.attach().dataset


def charged(connection: Connection, dataset: str) -> int:
    used: int = connection.status().status["quotas"]["datasets"][dataset]
    return used


class Watch:
    """Looks at the disk again and again: the most that a dataset took at any look."""

    def __init__(self, home: Path, dataset: str) -> None:
        self._home, self._dataset = home, dataset
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = self.looks = 0

    def _look(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, count_of((self._home,), self._dataset))
            self.looks += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_quota_is_never_exceeded_and_nothing_of_others_goes(throttled: ThrottledBucket, cache_dir: Path) -> None:
    """Sixteen threads and two kinds of refs; what did not fit is read right all the same."""
    objects, others = fill_two(throttled, 60)
    second = below(throttled, "b", cache_dir)
    kept = warmed(second)
    first = below(throttled, "a", cache_dir)
    first.make_catalog()
    dataset = first.attach().dataset
    first.quota(20 * ONE, dataset=dataset)
    versions = {entry.path: entry.version for entry in first.entries(f"{throttled.name}/a")}
    with Watch(cache_dir, dataset) as watch, ThreadPoolExecutor(16) as pool:
        for _ in range(2):
            for by_version in (False, True):
                asked = [
                    pool.submit(read, first, path, **({"version": versions[path]} if by_version else {}))
                    for path in objects
                ]
                assert [each.result() for each in asked] == list(objects.values())
    assert watch.looks > 1
    assert watch.most <= 20 * ONE
    assert charged(second, dataset) == count_of((cache_dir,), dataset) == 20 * ONE
    assert count_of((cache_dir,), kept) == sum(charge(len(data)) for data in others.values())
    assert second.status().status["counters"]["evicted_bytes"] == 0


@pytest.mark.parametrize("orderly", [True, False])
def test_the_account_is_right_after_any_end(bucket: Bucket, cache_dir: Path, orderly: bool) -> None:
    """A large object is half there, and some objects have two refs and some one."""
    fill_two(bucket, 10)
    large = bucket.put("a/large", os.urandom(2 * BLOCK_SIZE))
    connection = below(bucket, "a", cache_dir)
    connection.make_catalog()
    dataset = connection.attach().dataset
    connection.quota(BLOCK_SIZE + 6 * ONE, dataset=dataset)
    os.close(connection.need(large, offset=0, length=10, size=2 * BLOCK_SIZE).fd)
    for number in range(10):
        read(connection, f"{bucket.name}/a/{number:03d}")
        for entry in connection.entries(f"{bucket.name}/a")[:3]:
            read(connection, entry.path, version=entry.version)
    before = charged(connection, dataset)
    assert before == count_of((cache_dir,), dataset) == BLOCK_SIZE + 6 * ONE
    if orderly:
        connection.shutdown()
        wait_until(lambda: (cache_dir / "run/charged" / dataset).exists())
    else:
        os.kill(pid_of(cache_dir), signal.SIGKILL)
        assert not (cache_dir / "run/charged" / dataset).exists()
    again = below(bucket, "a", cache_dir)
    wait_until(lambda: again.status().status["scanned"])
    assert charged(again, dataset) == before
    assert not (cache_dir / "run/charged" / dataset).exists()
    read(again, f"{bucket.name}/a/009")
    assert count_of((cache_dir,), dataset) == before
    again.evict(f"{bucket.name}/a")
    assert charged(again, dataset) == count_of((cache_dir,), dataset) == 0


def test_a_lower_quota_takes_effect_at_once(bucket: Bucket, cache_dir: Path) -> None:
    fill_two(bucket)
    first, second = below(bucket, "a", cache_dir), below(bucket, "b", cache_dir)
    dataset, kept = warmed(first), warmed(second)
    report = first.quota(5 * ONE, dataset=dataset)
    assert (report["used"], report["dropped"], report["freed"]) == (5 * ONE, 15, 15 * ONE)
    assert (report["changed"], report["pinned"]) == (True, [])
    assert count_of((cache_dir,), dataset) == 5 * ONE
    assert count_of((cache_dir,), kept) == 20 * ONE
    assert first.status().status["used"] == 25 * ONE
    assert first.quota(5 * ONE, dataset=dataset)["changed"] is False
    first.warm()
    assert count_of((cache_dir,), dataset) == 5 * ONE
    assert first.quota(None, dataset=dataset)["used"] is None
    new = {bucket.put(f"a/new{n}", content(n)): content(n) for n in range(700, 703)}
    for path, data in new.items():  # others than those that passed through just now
        assert read(first, path) == data
    assert count_of((cache_dir,), dataset) == 8 * ONE
    assert first.quota(0, dataset=dataset)["used"] == 0


def test_a_pin_holds_against_a_quota(bucket: Bucket, cache_dir: Path) -> None:
    objects, _ = fill_two(bucket)
    connection = below(bucket, "a", cache_dir)
    dataset = warmed(connection)
    connection.pin(dataset)
    report = connection.quota(5 * ONE, dataset=dataset)
    assert (report["used"], report["dropped"]) == (20 * ONE, 0)
    assert report["pinned"] == [f"{bucket.name}/a"]
    new = bucket.put("a/new", content(99))
    assert read(connection, new) == content(99)
    assert count_of((cache_dir,), dataset) == 20 * ONE
    os.kill(pid_of(cache_dir), signal.SIGKILL)
    assert read(connection, next(iter(objects))) == content(0)
    wait_until(lambda: connection.status().status["scanned"])
    assert charged(connection, dataset) == 20 * ONE
    connection.pin(dataset, False)
    assert connection.quota(5 * ONE, dataset=dataset)["dropped"] == 15


def test_what_was_cut_off_while_a_quota_was_lowered_is_done_at_the_next_start(bucket: Bucket, cache_dir: Path) -> None:
    fill_two(bucket)
    connection = below(bucket, "a", cache_dir)
    dataset = warmed(connection)
    os.kill(pid_of(cache_dir), signal.SIGKILL)
    record = next(r for r in datasets.load_all(cache_dir) if r.id == dataset)
    datasets.update(cache_dir, record, quota=3 * ONE)
    again = below(bucket, "a", cache_dir)
    wait_until(lambda: again.status().status["scanned"])
    assert charged(again, dataset) == count_of((cache_dir,), dataset) == 3 * ONE


def test_a_quota_on_a_dataset_that_is_being_read_holds_from_the_answer_on(bucket: Bucket, cache_dir: Path) -> None:
    objects, _ = fill_two(bucket, 120)
    connection = below(bucket, "a", cache_dir)
    read(connection, next(iter(objects)))  # so that it is known
    dataset = connection.attach().dataset
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(read, connection, path) for path in objects]
        report = connection.quota(30 * ONE, dataset=dataset)
        with Watch(cache_dir, dataset) as watch:
            assert [each.result() for each in asked] == list(objects.values())
    assert report["used"] <= 30 * ONE
    assert watch.most <= 30 * ONE
    assert charged(connection, dataset) == count_of((cache_dir,), dataset) == 30 * ONE


def test_large_objects_count_block_by_block(bucket: Bucket, cache_dir: Path) -> None:
    one, two = os.urandom(2 * BLOCK_SIZE), os.urandom(2 * BLOCK_SIZE + 1000)
    paths = bucket.put("a/one", one), bucket.put("a/two", two)
    connection = below(bucket, "a", cache_dir)
    read(connection, bucket.put("a/small", b""))
    dataset = connection.attach().dataset
    connection.quota(3 * BLOCK_SIZE, dataset=dataset)
    with Watch(cache_dir, dataset) as watch:
        located = connection.need(paths[0], size=len(one))
        with os.fdopen(located.fd):
            assert located.read(0, len(one)) == one
        assert charged(connection, dataset) == count_of((cache_dir,), dataset) == 2 * BLOCK_SIZE
        got = b""
        while len(got) < len(two):
            located = connection.need(paths[1], offset=len(got), length=BLOCK_SIZE, size=len(two))
            with os.fdopen(located.fd):
                got += located.read(len(got), located.stop - len(got))
        assert got == two
    assert watch.most <= 3 * BLOCK_SIZE
    assert charged(connection, dataset) == count_of((cache_dir,), dataset) == 3 * BLOCK_SIZE
    report = connection.quota(2 * BLOCK_SIZE, dataset=dataset)
    assert report["used"] == count_of((cache_dir,), dataset) <= 2 * BLOCK_SIZE
    assert report["dropped"] == 1


def test_datasets_that_overlap_have_accounts_of_their_own(throttled: ThrottledBucket, cache_dir: Path) -> None:
    """What one has stored is served to the other from the disk, and linked as far as its quota goes."""
    objects, _ = fill_two(throttled)
    large = os.urandom(BLOCK_SIZE + 1)
    path = throttled.put("a/large", large)
    part, whole = below(throttled, "a", cache_dir), Connection(config(cache_dir), s3(throttled, root=throttled.name))
    inner = warmed(part)
    whole.make_catalog()
    outer = whole.attach().dataset
    whole.quota(5 * ONE, dataset=outer)
    reads = dict(throttled.reads)
    for each, data in objects.items():
        assert read(whole, each) == data
    located = whole.need(path, size=len(large))
    with os.fdopen(located.fd):
        assert located.read(0, len(large)) == large
    assert throttled.reads == reads
    assert charged(whole, outer) == count_of((cache_dir,), outer) == 5 * ONE
    assert count_of((cache_dir,), inner) == 20 * ONE + charge(len(large))


def test_an_object_that_two_datasets_fetch_is_charged_to_whoever_began_it(bucket: Bucket, cache_dir: Path) -> None:
    data = os.urandom(2 * BLOCK_SIZE)
    path = bucket.put("a/large", data)
    part, whole = below(bucket, "a", cache_dir), Connection(config(cache_dir), s3(bucket, root=bucket.name))
    for connection in (part, whole):
        connection.make_catalog()
    inner, outer = part.attach().dataset, whole.attach().dataset
    part.quota(4 * BLOCK_SIZE, dataset=inner)
    whole.quota(BLOCK_SIZE, dataset=outer)
    version = part.entries(f"{bucket.name}/a")[0].version
    os.close(part.need(path, version=version, offset=0, length=10, size=len(data)).fd)
    located = whole.need(path, version=version, size=len(data))
    with os.fdopen(located.fd):
        assert located.read(0, len(data)) == data
    assert (charged(part, inner), charged(part, outer)) == (2 * BLOCK_SIZE, 0)
    assert (count_of((cache_dir,), inner), count_of((cache_dir,), outer)) == (2 * BLOCK_SIZE, 0)


def test_a_quota_of_what_is_not_known_is_an_error(cache_dir: Path) -> None:
    connection = Connection(config(cache_dir), None)
    with pytest.raises(ConfigError, match="warm it first"):
        connection.quota(1000, dataset="0" * 32)


def test_without_quotas_nothing_is_counted(bucket: Bucket, cache_dir: Path) -> None:
    objects = fill(bucket, 5)
    connection = Connection(config(cache_dir), s3(bucket))
    for path, data in objects.items():
        assert read(connection, path) == data
    assert connection.status().status["quotas"] == {"datasets": {}, "tenants": {}}
    connection.shutdown()
    wait_until(lambda: (cache_dir / "run" / "counted.json").exists())
    assert not (cache_dir / "run" / "charged").exists()

"""The fetcher process, for real: started on demand, one flight per object, killed at any time, gone when idle."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachefs.client import AsyncConnection, Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.errors import (
    CacheError,
    ConfigError,
    ObjectNotFound,
    OriginAccessDenied,
    OriginUnreachable,
    StaleObject,
)
from cachefs.fetcher.embedded import stop_embedded
from cachefs.fetcher.hosting import take_lock
from cachefs.fetcher.index import Index
from cachefs.store import Reader, Store

OBJECTS = 100


def s3(bucket, root="", **changes) -> Session:
    return Session("s3", {**bucket.options, **changes}, {}, root=root)


def config(home: Path, **changes) -> CacheConfig:
    return CacheConfig.make(home, **{"deadline": 60.0, **changes})


def read(connection: Connection, path: str, **range) -> bytes:
    located = connection.need(path, **range)
    try:
        return located.read(located.start if range else 0, located.size)
    finally:
        os.close(located.fd)


def content(n: int, size: int = 50_000) -> bytes:
    return f"object {n} ".encode().ljust(size + n, b".")


def fill(bucket, count: int = OBJECTS) -> dict[str, bytes]:
    return {bucket.put(f"d{n % 7}/{n:04d}.jpg", content(n)): content(n) for n in range(count)}


def pid_of(home: Path) -> int:
    return int((home / "run" / "fetcher.lock").read_text())


def wait_until(condition, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_bytes_come_once_from_the_origin_and_then_from_the_disk(throttled, cache_dir):
    objects = fill(throttled, 20)
    connection = Connection(config(cache_dir), s3(throttled))
    for _ in range(3):
        for path, data in objects.items():
            assert read(connection, path) == data
    assert set(throttled.reads.values()) == {1}
    assert throttled.throttle.traffic().total == 20
    attached = connection.attach()
    reader = Reader((cache_dir,))
    from cachefs.digest import snapshot_ref

    assert all(reader.file(attached.dataset, snapshot_ref(path, attached.snapshot)) for path in objects)


def test_the_socket_and_the_directories_are_for_us_alone(bucket, cache_dir):
    fill(bucket, 1)
    connection = Connection(config(cache_dir), s3(bucket))
    connection.attach()
    assert stat.S_IMODE((cache_dir / "run" / "fetcher.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((cache_dir / "run").stat().st_mode) == 0o700


def _read_all(home, session, paths, barrier, answers):
    connection = Connection(config(home), session)
    barrier.wait()
    answers.put({path: read(connection, path) for path in paths})


def test_eight_processes_and_one_read_per_object(throttled, cache_dir):
    objects = fill(throttled)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(8), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(cache_dir, s3(throttled), list(objects), barrier, answers))
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(result == objects for result in results)
    assert len(throttled.reads) == OBJECTS
    assert throttled.throttle.traffic().object_reads == OBJECTS


def test_a_killed_client_does_not_take_the_flight_from_the_others(throttled, cache_dir):
    path = throttled.put("slow.jpg", content(1))
    throttled.throttle.set(latency=3.0)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    first = context.Process(target=_read_all, args=(cache_dir, s3(throttled), [path], barrier, answers))
    first.start()
    barrier.wait()
    connection = Connection(config(cache_dir), s3(throttled))
    connection.attach()
    # In the middle of the flight: both wait for it by then.
    killer = threading.Timer(1.5, lambda: os.kill(first.pid or 0, signal.SIGKILL))
    killer.start()
    assert read(connection, path) == content(1)
    killer.join()
    first.join()
    assert throttled.throttle.traffic().object_reads == 1


def test_a_killed_fetcher_is_replaced_and_the_reads_complete(throttled, cache_dir):
    objects = fill(throttled)
    connection = Connection(config(cache_dir), s3(throttled))
    connection.attach()
    stop = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while len(killed) < 5 and not stop.wait(0.3):
            with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
                os.kill(pid_of(cache_dir), signal.SIGKILL)
                killed.append(1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while len(killed) < 5:
            for path, data in objects.items():
                assert read(connection, path) == data
    finally:
        stop.set()
        killer.join()
    assert not list((cache_dir / "tmp").iterdir()) or read(connection, next(iter(objects)))


def test_a_fetcher_that_holds_the_lock_and_does_not_listen_is_waited_for(bucket, cache_dir):
    """It is about to listen (and whoever started it was killed), or is just ending."""
    path = bucket.put("a.jpg", b"bytes")
    run = cache_dir / "run"
    run.mkdir(parents=True, mode=0o700)
    lock = take_lock(run)
    threading.Timer(0.7, os.close, [lock]).start()
    assert read(Connection(config(cache_dir), s3(bucket)), path) == b"bytes"


def test_an_idle_fetcher_leaves_nothing(bucket, cache_dir):
    path = bucket.put("a", b"x")
    connection = Connection(config(cache_dir, idle=0.2), s3(bucket))
    assert read(connection, path) == b"x"
    pid = pid_of(cache_dir)
    connection.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not (cache_dir / "run" / "fetcher.sock").exists()
    assert read(connection, path) == b"x", "and the next reader starts another"
    assert pid_of(cache_dir) != pid


def test_threads_and_forks_share_a_connection(bucket, cache_dir):
    objects = fill(bucket, 30)
    connection = Connection(config(cache_dir), s3(bucket))
    path = next(iter(objects))
    assert read(connection, path) == objects[path]
    failures = []

    def work() -> None:
        for path, data in objects.items():
            if read(connection, path) != data:
                failures.append(path)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    for thread in threads:
        thread.join()
    child.join()
    assert (failures, child.exitcode) == ([], 0)


def test_a_range_of_a_large_object_costs_one_block(throttled, cache_dir):
    size = 5 * BLOCK_SIZE + 100
    data = os.urandom(1 << 16) * (size // (1 << 16)) + os.urandom(size % (1 << 16))
    path = throttled.put("shard.tar", data)
    connection = Connection(config(cache_dir), s3(throttled))
    offset = 3 * BLOCK_SIZE + 12345
    located = connection.need(path, size=len(data), offset=offset, length=4096)
    assert located.read(offset, 4096) == data[offset : offset + 4096]
    assert (located.start, located.stop, located.complete) == (3 * BLOCK_SIZE, 4 * BLOCK_SIZE, False)
    os.close(located.fd)
    traffic = throttled.throttle.traffic()
    assert traffic.bytes_down < 1.1 * BLOCK_SIZE + 64 * 1024 + BLOCK_SIZE  # a first answer may be cut off
    located = connection.need(path)
    assert (located.complete, located.read(0, size) == data) == (True, True)
    os.close(located.fd)


def test_what_does_not_fit_streams_through_and_capacity_holds(throttled, cache_dir):
    objects = fill(throttled, 40)
    limit = 20 * 53248
    connection = Connection(config(cache_dir, size=limit), s3(throttled))
    for _ in range(2):
        for path, data in objects.items():
            assert read(connection, path) == data
    status = connection.status().status
    assert status["used"] <= limit
    on_disk = sum(f.stat().st_blocks * 512 for f in (cache_dir / "blobs").rglob("*") if f.is_file())
    assert on_disk <= limit
    assert on_disk >= limit * 0.9, "a uniform set stays"


def test_a_miss_in_a_full_cache_does_not_read_the_index_through(bucket, tmp_path, monkeypatch):
    """A node of a cluster looks there for what others keep, too, now and then; for each miss it would take seconds."""
    objects = fill(bucket, 12)
    looks = []

    def records(self):
        looks.append(self)
        return iter(())

    monkeypatch.setattr(Index, "records", records)
    inside = CacheConfig.make(tmp_path / "cache", size=4 * 53248, min_free=0, fetcher="inprocess")
    connection = Connection(inside, s3(bucket))
    try:
        for path, data in objects.items():
            assert read(connection, path) == data
        assert connection.status().status["counters"]["streamed"] > 0
        assert looks == []
    finally:
        connection.close()
        stop_embedded(inside.home)


def test_what_goes_while_the_store_is_counted_is_not_counted(bucket, tmp_path, monkeypatch):
    """After a crash: evicted between the count of its file and the end of the counting."""
    inside = CacheConfig.make(tmp_path / "cache", min_free=0, fetcher="inprocess")
    objects = fill(bucket, 12)
    connection = Connection(inside, s3(bucket))
    evicted = threading.Event()
    count = Store.usage

    def usage(store: Store):
        counted = count(store)
        evicted.wait(1)  # either it has to wait for us, or it has ended long before
        return counted

    try:
        for path in objects:
            read(connection, path)
        connection.close()
        stop_embedded(inside.home)
        (inside.home / "run" / "counted.json").unlink()
        monkeypatch.setattr(Store, "usage", usage)
        connection = Connection(inside, s3(bucket))
        assert connection.evict(f"{bucket.name}/d0").count > 0
        evicted.set()
        while not (status := connection.status().status)["scanned"]:
            time.sleep(0.01)
        assert 0 < status["used"] == Store.open(inside).usage().bytes
    finally:
        connection.close()
        stop_embedded(inside.home)


def test_a_read_over_the_edge_of_what_fits_begins_with_what_is_stored(bucket, cache_dir):
    data = os.urandom(3 * BLOCK_SIZE)
    path = bucket.put("large", data)
    connection = Connection(config(cache_dir, size=BLOCK_SIZE + 100_000), s3(bucket))
    size, at, end = len(data), BLOCK_SIZE - 1000, BLOCK_SIZE + 1000
    os.close(connection.need(path, offset=0, length=10, size=size).fd)  # the first block takes all the room
    got = b""
    while at < end:
        located = connection.need(path, offset=at, length=end - at, size=size)
        with os.fdopen(located.fd):
            assert located.start <= at < located.stop
            got += located.read(at, end - at)
        at = BLOCK_SIZE - 1000 + len(got)
    assert got == data[BLOCK_SIZE - 1000 : end]


def test_equal_content_takes_room_once(tmp_path, cache_dir):
    """Small and large, where the origin does not say what the content is: it is fetched, and found to be there."""
    small, large = content(0), os.urandom(BLOCK_SIZE + 1)
    for n in range(10):
        (tmp_path / f"small{n}").write_bytes(small)
    for n in range(3):
        (tmp_path / f"large{n}").write_bytes(large)
    settings = config(cache_dir, size=3 * BLOCK_SIZE)
    connection = Connection(settings, Session("file", {}, {}, root=str(tmp_path)))
    for n in range(10):
        assert read(connection, f"{tmp_path}/small{n}") == small
    assert connection.status().status["used"] == 53248
    for n in range(3):
        located = connection.need(f"{tmp_path}/large{n}", size=len(large))
        with os.fdopen(located.fd):
            assert located.read(0, len(large)) == large
    status = connection.status().status
    assert status["counters"]["streamed"] == 0
    assert abs(status["used"] - 53248 - len(large)) < 65536  # ext4 counts metadata that a file may need


def test_an_idle_dataset_gives_room(bucket, cache_dir):
    a = {bucket.put(f"a/{n}", content(n)): content(n) for n in range(10)}
    b = {bucket.put(f"b/{n}", content(n + 100)): content(n + 100) for n in range(10)}
    settings = config(cache_dir, size=12 * 53248)
    first = Connection(settings, s3(bucket, root=f"{bucket.name}/a"))
    for path, data in a.items():
        assert read(first, path) == data
    first.close()
    second = Connection(settings, s3(bucket, root=f"{bucket.name}/b"))
    wait_until(lambda: second.status().status["connections"] == 1)
    for path, data in b.items():
        assert read(second, path) == data
    counters = second.status().status["counters"]
    assert counters["evicted_bytes"] > 0
    assert counters["streamed"] == 0


def test_an_idle_dataset_gives_its_incomplete_objects_too(bucket, cache_dir):
    """Though nothing of it is whole."""
    path = bucket.put("a/big", os.urandom(4 * BLOCK_SIZE))
    settings = config(cache_dir, size=5 * BLOCK_SIZE // 2)
    first = Connection(settings, s3(bucket, root=f"{bucket.name}/a"))
    for block in (0, 2):
        os.close(first.need(path, offset=block * BLOCK_SIZE, length=1).fd)
    first.close()
    data = os.urandom(BLOCK_SIZE)
    other = bucket.put("b/one", data)
    second = Connection(settings, s3(bucket, root=f"{bucket.name}/b"))
    wait_until(lambda: second.status().status["connections"] == 1)
    assert read(second, other) == data
    status = second.status().status
    assert status["counters"]["streamed"] == 0
    assert status["counters"]["evicted_bytes"] >= 2 * BLOCK_SIZE
    assert status["used"] < 2 * BLOCK_SIZE
    assert not list((cache_dir / "parts").iterdir())


def test_a_block_is_kept_for_nobody_outside_of_a_cluster(bucket, cache_dir):
    path = bucket.put("big", os.urandom(2 * BLOCK_SIZE))

    async def keep() -> None:
        connection = AsyncConnection(config(cache_dir), s3(bucket))
        entry = await connection.info(path)
        with pytest.raises(CacheError, match="for another node"):
            await connection.need(path, version=entry.version, size=entry.size, length=1, keep=True)
        await connection.close()

    asyncio.run(keep())


def test_a_pinned_dataset_gives_no_room_and_the_pin_survives_what_comes(bucket, cache_dir):
    """kill -9, a refresh that began before it was pinned, and the next fetcher."""
    a = {bucket.put(f"a/{n}", content(n)): content(n) for n in range(10)}
    b = {bucket.put(f"b/{n}", content(n + 100)): content(n + 100) for n in range(10)}
    settings = config(cache_dir, size=12 * 53248)
    first = Connection(settings, s3(bucket, root=f"{bucket.name}/a"))
    first.make_catalog()
    dataset = first.attach().dataset
    first.warm()
    assert (first.pin(dataset).count, first.pin(dataset).count) == (1, 0)
    first.make_catalog(refresh=True)
    os.kill(pid_of(cache_dir), signal.SIGKILL)
    first.close()
    second = Connection(settings, s3(bucket, root=f"{bucket.name}/b"))
    for path, data in b.items():
        assert read(second, path) == data
    counters = second.status().status["counters"]
    assert (counters["evicted_bytes"], counters["streamed"]) == (0, 8)
    entries = first.entries(f"{bucket.name}/a")
    files = {Reader((cache_dir,)).file(dataset, version_ref(entry.path, entry.version)) for entry in entries}
    assert None not in files
    assert len(files) == len(a)
    first.close()
    wait_until(lambda: second.status().status["connections"] == 1)
    second.pin(dataset, False)
    for n in range(3):  # others than those that passed through just now
        assert read(second, bucket.put(f"b/new{n}", content(n + 200))) == content(n + 200)
    assert second.status().status["counters"]["evicted_bytes"] > 0


def test_what_a_refresh_replaced_of_a_pinned_dataset_goes_for_itself_and_not_for_others(bucket, cache_dir):
    for n in range(5):
        bucket.put(f"a/{n}", content(n))
    settings = config(cache_dir, size=6 * 53248)
    first = Connection(settings, s3(bucket, root=f"{bucket.name}/a"))
    first.make_catalog()
    first.warm()
    first.pin(first.attach().dataset)
    for n in range(5):
        bucket.put(f"a/{n}", content(n + 100))
    first.make_catalog(refresh=True)
    second = Connection(settings, s3(bucket, root=f"{bucket.name}/b"))
    for n in range(3):
        assert read(second, bucket.put(f"b/{n}", content(n + 200))) == content(n + 200)
    counters = second.status().status["counters"]
    assert (counters["evicted_bytes"], counters["streamed"]) == (0, 2)
    first.warm()
    counters = second.status().status["counters"]
    assert (counters["evicted_bytes"] > 0, counters["streamed"]) == (True, 2)


def test_a_pin_of_what_is_not_known_is_an_error(cache_dir):
    connection = Connection(config(cache_dir), None)
    for dataset in ("0" * 32, "../../etc/passwd", ""):
        with pytest.raises(ConfigError, match="warm it first"):
            connection.pin(dataset)


def test_damage_is_noticed_and_mended(throttled, cache_dir):
    path = throttled.put("a.jpg", content(1))
    connection = Connection(config(cache_dir), s3(throttled))
    located = connection.need(path)
    os.close(located.fd)
    file = Path(located.file)
    file.chmod(0o600)
    file.write_bytes(b"wrong" * 1000)
    assert read(connection, path) == content(1)
    assert connection.status().status["counters"]["damaged"] == 1
    assert throttled.reads == {"a.jpg": 2}


def test_verify_finds_what_rotted(bucket, cache_dir):
    objects = fill(bucket, 5)
    connection = Connection(config(cache_dir), s3(bucket))
    files = []
    for path in objects:
        located = connection.need(path)
        os.close(located.fd)
        files.append(Path(located.file))
    info = files[2].stat()
    files[2].chmod(0o600)
    files[2].write_bytes(b"x" * info.st_size)
    os.utime(files[2], ns=(info.st_atime_ns, info.st_mtime_ns))  # rot does not change the mtime
    done = connection.verify()
    assert (done.count, done.failed_total) == (5, 1)
    for path, data in objects.items():
        assert read(connection, path) == data


def test_a_replaced_object_is_stale_until_refresh(bucket, cache_dir):
    kept = bucket.put("d/kept", b"old kept")
    lost = bucket.put("d/lost", b"old lost")
    connection = Connection(config(cache_dir), s3(bucket, root=f"{bucket.name}/d"))
    connection.make_catalog()
    assert read(connection, kept) == b"old kept"
    bucket.put("d/kept", b"new kept")
    bucket.put("d/lost", b"new lost")
    assert read(connection, kept) == b"old kept"
    with pytest.raises(StaleObject, match=r"lost.*refresh"):
        read(connection, lost)
    assert connection.make_catalog(refresh=True).changed
    assert read(connection, kept) == b"new kept"
    assert read(connection, lost) == b"new lost"


def test_a_renamed_dataset_costs_no_bytes(throttled, cache_dir):
    objects = fill(throttled, 10)
    first = Connection(config(cache_dir), s3(throttled, root=throttled.name))
    first.make_catalog()
    assert first.warm().count == 10
    assert throttled.throttle.traffic().object_reads == 10
    for path, data in objects.items():
        throttled.put("renamed/" + path.partition("/")[2], data)
    second = Connection(config(cache_dir), s3(throttled, root=f"{throttled.name}/renamed"))
    second.make_catalog()
    assert (second.warm().count, throttled.throttle.traffic().object_reads) == (10, 10)
    reader = Reader((cache_dir,))
    dataset = second.attach().dataset
    entries = list(second.entries(f"{throttled.name}/renamed", recursive=True))
    assert all(reader.file(dataset, version_ref(entry.path, entry.version)) for entry in entries)


def test_evict_gives_the_space_back(bucket, cache_dir):
    objects = fill(bucket, 10)
    connection = Connection(config(cache_dir), s3(bucket, root=bucket.name))
    connection.make_catalog()
    connection.warm()
    assert connection.status().status["used"] > 500_000
    assert connection.evict(bucket.name).bytes > 500_000
    assert connection.status().status["used"] == 0
    path = next(iter(objects))
    assert read(connection, path) == objects[path]


def test_errors_name_the_object_and_never_the_secret(bucket, cache_dir):
    connection = Connection(config(cache_dir), s3(bucket))
    with pytest.raises(ObjectNotFound, match="nothing-here"):
        read(connection, f"{bucket.name}/nothing-here")
    with pytest.raises(ObjectNotFound, match="bucket"):
        read(connection, "no-such-bucket/a")
    wrong = Connection(config(cache_dir), s3(bucket, secret="wrong-secret-value"))
    with pytest.raises(OriginAccessDenied) as denied:
        read(wrong, bucket.put("a", b"x"))
    assert "wrong-secret-value" not in str(denied.value)
    nowhere = Connection(config(cache_dir), s3(bucket, endpoint_url="http://127.0.0.1:9", retry_timeout=1))
    with pytest.raises(OriginUnreachable):
        read(nowhere, f"{bucket.name}/a")
    log = (cache_dir / "run" / "fetcher.log").read_text()
    assert "wrong-secret-value" not in log
    assert bucket.options["secret"] not in log


async def test_the_async_connection_fetches_at_the_same_time(throttled, cache_dir):
    objects = fill(throttled, 50)
    connection = AsyncConnection(config(cache_dir), s3(throttled))

    async def one(path: str) -> bytes:
        located = await connection.need(path)
        try:
            return located.read(0, located.size)
        finally:
            os.close(located.fd)

    try:
        results = await asyncio.gather(*(one(path) for path in objects))
        assert results == list(objects.values())
        os.kill(pid_of(cache_dir), signal.SIGKILL)
        assert await one(next(iter(objects))) == content(0)
        assert throttled.throttle.traffic().object_reads == 50
    finally:
        await connection.close()


def test_a_cache_remembers_its_size(bucket, cache_dir):
    first = Connection(config(cache_dir, size="1M"), s3(bucket))
    assert first.status().status["size"] == 1 << 20
    first.shutdown()
    second = Connection(config(cache_dir), s3(bucket))
    assert second.status().status["size"] == 1 << 20
    third = Connection(config(cache_dir, size="2M"), s3(bucket))
    third.attach()
    assert second.status().status["size"] == 2 << 20


def test_evict_takes_incomplete_objects_too(bucket, cache_dir):
    path = bucket.put("shards/big", os.urandom(2 * BLOCK_SIZE))
    connection = Connection(config(cache_dir), s3(bucket))
    located = connection.need(path, offset=BLOCK_SIZE, length=1)
    os.close(located.fd)
    assert connection.status().status["used"] >= BLOCK_SIZE
    connection.evict(f"{bucket.name}/shards")
    assert connection.status().status["used"] == 0
    assert not [f for f in (cache_dir / "parts").iterdir() if f.suffix != ".map" and f.stat().st_blocks]


def test_what_a_refresh_replaced_goes_first_when_room_is_needed(bucket, cache_dir):
    paths = [bucket.put(f"d/{n}", content(n)) for n in range(10)]
    connection = Connection(config(cache_dir, size=12 * 53248), s3(bucket, root=f"{bucket.name}/d"))
    connection.make_catalog()
    connection.warm()
    for n in range(10):
        bucket.put(f"d/{n}", content(n + 100))
    connection.make_catalog(refresh=True)
    connection.warm()
    assert connection.status().status["counters"]["streamed"] == 0
    for n, path in enumerate(paths):
        assert read(connection, path) == content(n + 100)
    assert not list((cache_dir / "datasets").glob("*.superseded"))


def test_what_is_incomplete_of_what_a_refresh_replaced_goes_too(bucket, cache_dir):
    path = bucket.put("d/big", os.urandom(4 * BLOCK_SIZE))
    connection = Connection(config(cache_dir, size=5 * BLOCK_SIZE // 2), s3(bucket, root=f"{bucket.name}/d"))
    connection.make_catalog()
    for block in (0, 2):
        os.close(connection.need(path, offset=block * BLOCK_SIZE, length=1).fd)
    data = os.urandom(4 * BLOCK_SIZE)
    bucket.put("d/big", data)
    connection.make_catalog(refresh=True)
    again = Connection(config(cache_dir), s3(bucket, root=f"{bucket.name}/d"))
    wait_until(lambda: list((cache_dir / "datasets").glob("*.superseded")))
    for block in (0, 2):
        located = again.need(path, offset=block * BLOCK_SIZE, length=1)
        assert located.read(block * BLOCK_SIZE, 1) == data[block * BLOCK_SIZE :][:1]
        os.close(located.fd)
    status = again.status().status
    assert status["counters"]["streamed"] == 0
    assert status["used"] < 5 * BLOCK_SIZE // 2


def test_sequential_readers_are_read_ahead_of_and_random_ones_not(throttled, cache_dir):
    size = 12 * BLOCK_SIZE
    path = throttled.put("shard", bytes(size))
    connection = Connection(config(cache_dir), s3(throttled))

    def touch(offset: int) -> None:
        os.close(connection.need(path, size=size, offset=offset, length=4096).fd)

    def present() -> int:
        return int(connection.status().status["used"]) // BLOCK_SIZE

    for offset in (9 * BLOCK_SIZE, 9 * BLOCK_SIZE + 65536, 7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 1):
        touch(offset)
    assert present() == 2
    touch(0)
    touch(BLOCK_SIZE)
    wait_until(lambda: present() == 2 + 2 + 4)
    assert throttled.throttle.traffic().object_reads <= 9  # one more where the first answer was cut off


def test_a_sequential_reader_never_waits_for_a_block_alone(throttled, cache_dir):
    """It is told to ask again before it comes to the end of what is read ahead, and the window slides on, and grows
    where that comes too late."""
    blocks = 24
    path = throttled.put("shard", bytes(blocks * BLOCK_SIZE))
    throttled.throttle.set(latency=0.2)
    connection = Connection(config(cache_dir), s3(throttled))
    offset, asked = 0, 0
    while offset < blocks * BLOCK_SIZE:
        located = connection.need(path, size=blocks * BLOCK_SIZE, offset=offset, length=1 << 20)
        os.close(located.fd)
        assert located.stop > offset
        offset, asked = located.stop, asked + 1
    assert asked > blocks // 8
    assert throttled.throttle.traffic().object_reads <= blocks + 1  # one more where the first answer was cut off
    assert connection.status().status["memory"]["in_flight_most"] > 5 * BLOCK_SIZE


def test_blocks_on_their_way_take_a_share_of_the_memory(tmp_path, cache_dir, monkeypatch):
    """However many readers wait, each for another block."""
    monkeypatch.setenv("CACHEFS_MEMORY", "1G")
    blocks = 24
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(blocks * BLOCK_SIZE)
    connection = Connection(config(cache_dir), Session("file", {}, {}, root=str(tmp_path)))

    def one(block: int) -> None:
        located = connection.need(str(large), size=blocks * BLOCK_SIZE, offset=block * BLOCK_SIZE, length=4096)
        os.close(located.fd)

    with ThreadPoolExecutor(blocks) as pool:
        list(pool.map(one, range(blocks)))
    memory = connection.status().status["memory"]
    assert memory["usable"] == 1 << 30
    assert memory["in_flight"] == 0
    assert 2 * BLOCK_SIZE <= memory["in_flight_most"] <= memory["in_flight_limit"] == 8 * BLOCK_SIZE

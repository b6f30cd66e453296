"""Several processes on one cache: forked, spawned, killed; and what the origin sees of it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cachefs import CacheFileSystem
from cachefs.fetcher.embedded import stop_embedded
from cachefs_sidecar.testbed import fetcher_pid, stop_fetcher
from tests.machine import Bucket, ThrottledBucket

OBJECTS = 200
READERS = 8

# How long a child may take before the test gives up on it.
PATIENCE = 60.0


def make(bucket: Bucket, home: Path, **options: Any) -> CacheFileSystem:
    fs = fsspec.filesystem(
        "cachefs", target_protocol="s3", target_options=bucket.options, cache_dir=str(home), **options
    )
    assert isinstance(fs, CacheFileSystem)
    return fs


class Children:
    """Processes that run a function and send back what it returned or raised."""

    def __init__(self, method: str) -> None:
        self._context: Any = multiprocessing.get_context(method)
        self.processes: list[Any] = []
        self._results: list[Connection] = []

    def start(self, work: Callable[..., Any], *arguments: Any) -> Any:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_report, args=(theirs, work, arguments))
        process.start()
        theirs.close()
        self.processes.append(process)
        self._results.append(ours)
        return process

    def results(self) -> list[Any]:
        results = []
        for process, pipe in zip(self.processes, self._results, strict=True):
            assert pipe.poll(PATIENCE), f"{process.name} hangs"
            results.append(pipe.recv())
            process.join(PATIENCE)
        return results

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in zip(self.processes, self._results, strict=True):
            if process.is_alive():
                process.kill()
            process.join()
            pipe.close()


def _report(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(work(*arguments))
    except BaseException as error:
        pipe.send(repr(error))
    pipe.close()


def digest_all(fs: CacheFileSystem, paths: list[str]) -> int:
    """Reads them one by one, as a worker does."""
    total = 0
    for path in paths:
        with fs.open(path) as file:
            total += len(file.read())
    return total


def read_all(fs: CacheFileSystem, paths: list[str]) -> int:
    return sum(map(len, fs.cat(paths).values()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_read_each_cold_object_once(method: str, throttled: ThrottledBucket, cache_dir: Path):
    paths = [throttled.put(f"{number:03d}", os.urandom(1000)) for number in range(OBJECTS)]
    fs = make(throttled, cache_dir)
    throttled.throttle.set(latency=0.01)
    readers = READERS if method == "fork" else 3
    with Children(method) as children:
        for number in range(readers):
            children.start(digest_all if number % 2 else read_all, fs, paths)
        assert children.results() == [OBJECTS * 1000] * readers
    assert sum(throttled.reads.values()) == OBJECTS
    assert set(throttled.reads.values()) == {1}


def test_threads_and_tasks_and_processes_together(throttled: ThrottledBucket, cache_dir: Path):
    paths = [throttled.put(f"{number:03d}", os.urandom(1000)) for number in range(60)]
    fs = make(throttled, cache_dir)
    totals: list[int] = []
    threads = [threading.Thread(target=lambda: totals.append(digest_all(fs, paths))) for _ in range(4)]
    with Children("fork") as children:
        children.start(digest_all, fs, paths)
        for thread in threads:
            thread.start()

        async def tasks() -> list[int]:
            return [sum(map(len, each.values())) for each in await asyncio.gather(*(fs._cat(paths) for _ in range(4)))]

        totals += asyncio.run(tasks())
        for thread in threads:
            thread.join()
        totals += children.results()
    assert totals == [60_000] * 9
    assert sum(throttled.reads.values()) == 60


def test_a_parent_that_has_read_forks(throttled: ThrottledBucket, cache_dir: Path):
    """Sockets, loops and catalogs of the parent are its own; the child has what it needs all the same."""
    cached, cold, other = (throttled.put(name, name.encode() * 100) for name in ("cached", "cold", "other"))
    fs = make(throttled, cache_dir)
    assert fs.cat_file(cached) == b"cached" * 100

    async def in_a_loop() -> None:
        assert await fs._cat_file(throttled.put("third", b"third")) == b"third"
        with Children("fork") as children:
            children.start(everything_in_a_child, fs, cached, cold)
            assert await asyncio.to_thread(children.results) == [True]
        assert await fs._cat_file(other) == b"other" * 100

    asyncio.run(in_a_loop())
    assert fs.cat_file(throttled.put("fourth", b"fourth")) == b"fourth"


def everything_in_a_child(fs: CacheFileSystem, cached: str, cold: str) -> bool:

    folder = cold.rpartition("/")[0]
    return (
        fs.cat_file(cached) == b"cached" * 100
        and fs.open(cold).read() == b"cold" * 100
        and len(fs.find(folder)) >= 3
        and asyncio.run(fs._cat([cached, cold])) == {cached: b"cached" * 100, cold: b"cold" * 100}
        and fs.loop is not None
    )


def test_a_child_killed_in_flight_blocks_nobody(throttled: ThrottledBucket, cache_dir: Path):
    paths = [throttled.put(f"{number:03d}", os.urandom(1000)) for number in range(20)]
    fs = make(throttled, cache_dir)
    throttled.throttle.set(latency=0.2)
    with Children("fork") as children:
        victim = children.start(read_all, fs, paths)
        _until(lambda: sum(throttled.reads.values()) > 0)
        os.kill(victim.pid, signal.SIGKILL)
        assert digest_all(fs, paths[:5]) == 5000
        victim.join()
    assert read_all(fs, paths) == 20_000
    assert max(throttled.reads.values()) <= 2  # its flights may have been given up, or gone on


def test_a_fetcher_killed_in_flight_is_replaced(throttled: ThrottledBucket, cache_dir: Path):
    paths = [throttled.put(f"{number:03d}", os.urandom(1000)) for number in range(40)]
    fs = make(throttled, cache_dir)
    fs.exists(f"{throttled.name}/none")  # it has started
    first = fetcher_pid(cache_dir)
    throttled.throttle.set(latency=0.3)
    with Children("fork") as children:
        children.start(digest_all, fs, paths[:4])
        children.start(read_all, fs, paths)
        _until(lambda: sum(throttled.reads.values()) > 0)
        assert stop_fetcher(cache_dir, sign=signal.SIGKILL)
        assert digest_all(fs, paths[:2]) == 2000
        assert children.results() == [4000, 40_000]
    assert fetcher_pid(cache_dir) not in (None, first)


def test_workers_of_an_in_process_fetcher(throttled: ThrottledBucket, cache_dir: Path):
    """Forked workers read through their parent's fetcher, so each object is fetched once there too."""
    paths = [throttled.put(f"{number:03d}", os.urandom(1000)) for number in range(40)]
    fs = make(throttled, cache_dir, fetcher="inprocess")
    try:
        assert digest_all(fs, paths[:5]) == 5000
        with Children("fork") as children:
            for _ in range(3):
                children.start(digest_all, fs, paths)
            assert children.results() == [40_000] * 3
        assert fetcher_pid(cache_dir) is None
        assert set(throttled.reads.values()) == {1}
    finally:
        stop_embedded(cache_dir)
    assert not (cache_dir / "run" / "fetcher.sock").exists()


def test_a_forked_child_reads_memory_of_its_own(cache_dir: Path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/fork/x", b"before")
    fs = fsspec.filesystem("cachefs", target_protocol="memory", cache_dir=str(cache_dir))
    try:
        assert fs.cat("/fork/x") == b"before"
        with Children("fork") as children:
            children.start(read_memory, fs)
            assert children.results() == [b"of the child"]
    finally:
        stop_embedded(cache_dir)
        memory.store.clear()


def read_memory(fs: CacheFileSystem) -> Any:
    fsspec.filesystem("memory").pipe("/fork/y", b"of the child")
    return fs.cat_file("/fork/y")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)

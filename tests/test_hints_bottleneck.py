"""What `cachefs status` says of a consumer, where a real one is held up by a real origin, a slow disk, or itself."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs import CacheFileSystem
from cachefs.fetcher.embedded import stop_embedded
from cachefs.store import Store
from tests.command_line import CommandLine
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_hints import content, fill, told
from tests.test_hints_pages import forget, make_cold, told_by_the_kernel

__all__ = ["told_by_the_kernel"]  # a fixture

# A sentence is true of the last seconds, and said after some.
SECONDS = 60.0


class Watched:
    """What `cachefs status` says of the only consumer, in both ways."""

    def __init__(self, command: CommandLine, home: Path) -> None:
        self._command = command
        self._home = home

    def json(self) -> dict[str, Any]:
        (found,) = self._command("status", "--cache-dir", self._home, "--json").ok().json["consumers"]
        return dict(found)

    def lines(self) -> str:
        return self._command("status", "--cache-dir", self._home).ok().out.partition("hints:")[2]

    def until(self, word: str, step: Callable[[int], None]) -> tuple[dict[str, Any], str]:
        """Read on until it says so: the numbers and the sentences of that time. step: reads one item."""
        number, end, look = 0, time.monotonic() + SECONDS, 0.0
        found: dict[str, Any] = {}
        while time.monotonic() < end:
            step(number)
            number += 1
            if time.monotonic() > look:
                found, look = self.json(), time.monotonic() + 0.2
                if found["bottleneck"] == word:
                    return found, self.lines()
        raise AssertionError(f"it never said {word!r}, but {found}")


@pytest.fixture
def watched(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> Watched:
    return Watched(CommandLine(capsys), cache_dir)


@pytest.fixture
def embedded(throttled: ThrottledBucket, cache_dir: Path) -> Iterator[CacheFileSystem]:
    """With its fetcher in this process, where a fault can be put into its way."""
    yield make_file_system(throttled, cache_dir, fetcher="inprocess")
    stop_embedded(cache_dir)


@contextmanager
def reading(fs: CacheFileSystem, names: list[str], pause: float = 0.0) -> Iterator[Callable[[int], None]]:
    """A consumer that reads its plan again and again."""
    with closing(told(fs, names, label="rank 0")) as consumer:
        plan = array("I", range(len(names))) * 20
        consumer.plan(plan)

        def step(number: int) -> None:
            data = fs.cat_file(names[number % len(names)])
            assert data[:6] == content(number % len(names))[:6]
            consumer.at(number + 1)
            time.sleep(pause)

        yield step


def test_the_origin(throttled: ThrottledBucket, cache_dir: Path, watched: Watched):
    """It gives 10 items a second, and the consumer would take thousands."""
    names = fill(throttled, 300)
    throttled.throttle.set(total_bandwidth=200_000)
    with reading(make_file_system(throttled, cache_dir), names) as step:
        found, lines = watched.until("origin", step)
        assert "and more is wanted" in found["says"]
        assert 0 < found["late"] <= found["position"] + 1
        assert found["waited"] > 0.1
        assert (found["end"], found["window"]) == (6000, 128)
        assert "origin: " in lines
        assert f"rank 0 (pid {os.getpid()}): item " in lines
        assert "of 128 ahead are ready" in lines
        assert "reads came before their bytes and waited" in lines


@pytest.mark.slow
def test_an_ssd_that_is_slow_to_write(
    throttled: ThrottledBucket, embedded: CacheFileSystem, watched: Watched, monkeypatch: pytest.MonkeyPatch
):
    names = fill(throttled, 2000)
    right = Store.put

    def slow(self: Store, data: bytes, **options: Any) -> bytes:
        time.sleep(0.3)
        return right(self, data, **options)

    monkeypatch.setattr(Store, "put", slow)
    with reading(embedded, names) as step:
        found, lines = watched.until("SSD", step)
        assert "takes bytes more slowly than the origin gives them" in found["says"]
        assert "SSD: " in lines
        assert found["waited"] > 0.1


def test_an_ssd_that_is_slow_to_read(
    throttled: ThrottledBucket,
    embedded: CacheFileSystem,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    told_by_the_kernel: None,
):
    """All is stored, so nobody asks the fetcher, and no read of its own waits."""
    names = fill(throttled, 300)
    files = [Path(os.fspath(embedded.open_local(name))) for name in names]
    right = os.pread

    def slow(fd: int, count: int, at: int) -> bytes:
        if threading.current_thread().name == "cachefs-pages":
            time.sleep(4.0)
        return right(fd, count, at)

    monkeypatch.setattr(os, "pread", slow)
    for file in files:
        forget(file)
    with reading(embedded, names, pause=0.01) as step:
        found, lines = watched.until("SSD", step)
        assert "the SSD gives bytes more slowly than they are read" in found["says"]
        assert "SSD: its files take" in lines
        assert (found["late"], found["waited"]) == (0, 0.0)


def test_an_ssd_that_keeps_up_is_not_blamed(
    throttled: ThrottledBucket,
    embedded: CacheFileSystem,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    told_by_the_kernel: None,
):
    names = fill(throttled, 300)
    files = [Path(os.fspath(embedded.open_local(name))) for name in names]
    right, took = os.pread, 0.0

    def timed(fd: int, count: int, at: int) -> bytes:
        nonlocal took
        began = time.monotonic()
        try:
            return right(fd, count, at)
        finally:
            if threading.current_thread().name == "cachefs-pages":
                took = max(took, time.monotonic() - began)

    monkeypatch.setattr(os, "pread", timed)
    for _ in range(5):
        took = 0.0
        for file in files:
            make_cold(file)
        said = set()
        with reading(embedded, names, pause=0.01) as step:
            for number in range(200):
                step(number)
                if number % 20 == 0:
                    said.add(watched.json()["bottleneck"])
        if took < 0.1:  # else it did not keep up: others use it too
            break
    assert said == {"none"}


def test_memory(throttled: ThrottledBucket, cache_dir: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch):
    """Nothing can be stored, and what may be held until it is read is too little for how far the origin is."""
    monkeypatch.setenv("CACHEFS_MEMORY", "512M")
    names = [throttled.put(f"set/{number}.jpg", content(number) * 200) for number in range(60)]
    throttled.throttle.set(latency=0.3)
    with reading(make_file_system(throttled, cache_dir, cache_size="0"), names) as step:
        found, lines = watched.until("memory", step)
        assert "has reached its budget of memory" in found["says"]
        assert "memory: " in lines
        assert found["held_bytes"] > 0


def test_the_consumer_itself(throttled: ThrottledBucket, cache_dir: Path, watched: Watched):
    """It decodes: 50 items a second, of an origin that gives hundreds. First from the origin, then from the SSD."""
    names = fill(throttled, 200)
    with closing(told(make_file_system(throttled, cache_dir), names)) as consumer:
        consumer.plan(array("I", range(200)))
        said = []
        for number in range(200):
            consumer.at(number)
            time.sleep(0.02)
            if number % 40 == 39:
                said.append(watched.json())
        assert [found["bottleneck"] for found in said] == ["none"] * 5
        assert "decoding or the GPU sets the pace" in said[2]["says"]
        consumer.at(200)
        found, _ = watched.until("none", lambda number: time.sleep(0.1))
        assert "all of its plan has been handed out" in watched.lines()
        assert (found["late"], found["waited"]) == (0, 0.0)


def test_nobody(throttled: ThrottledBucket, cache_dir: Path, watched: Watched):
    """Everything is there: it reads as fast as it can."""
    names = fill(throttled, 100)
    fs = make_file_system(throttled, cache_dir)
    for name in names:
        fs.cat_file(name)
    with reading(fs, names, pause=0.001) as step:
        for number in range(1000):
            step(number)
        found = watched.json()
        assert (found["bottleneck"], found["late"], found["waited"]) == ("none", 0, 0.0)

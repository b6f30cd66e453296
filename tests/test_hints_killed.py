"""kill -9 of a consumer, or of its fetcher, anywhere: hints go on or expire, reads are right, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cachefs.fetcher.embedded import _running, stop_embedded
from tests.filesystems import make_file_system
from tests.hinting import content
from tests.machine import ThrottledBucket
from tests.test_fetcher import pid_of, wait_until
from tests.test_hints import consumers

COUNT = 40

# Points between two messages, and items from the first to nearly the last. Each is met in both ways of giving hints.
MESSAGES: list[dict[str, Any]] = [
    {"kind": kind, "nth": nth, "when": when}
    for kind, nth in (("Hello", 1), ("Attach", 1), ("Announce", 1), ("Plan", 1), ("Plan", 2), ("Plan", 3))
    for when in ("before", "during", "after")
]


def points(seed: int, count: int) -> list[dict[str, Any]]:
    """So many, drawn by chance, half of them between messages."""
    dice = random.Random(seed)
    items: list[dict[str, Any]] = [{"item": dice.randrange(3, COUNT - 5)} for _ in range(count - count // 2)]
    drawn = [*dice.sample(MESSAGES, count // 2), *items]
    dice.shuffle(drawn)
    return drawn


class Program:
    """tests/hinting.py in a process of its own. It lives as often as it is told to."""

    def __init__(self, bucket: ThrottledBucket, home: Path) -> None:
        self._bucket = bucket
        self._home = home
        self._lives = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hinting"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def live(self, way: str, point: dict[str, Any], *, worker: bool = False) -> dict[str, Any]:
        """Begin a life; what it says first: that it has read everything and waits, or how it ended."""
        self._lives += 1
        at = f"life/{self._lives}"
        life = {
            "label": at,
            "way": way,
            "point": point,
            "worker": worker,
            "home": str(self._home),
            "options": self._bucket.options,
            "names": [self._bucket.put(f"{at}/{number}.jpg", content(number)) for number in range(COUNT)],
            "straggler": self._bucket.put(f"{at}/straggler.jpg", b"x"),
        }
        return self.tell(json.dumps(life))

    def tell(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def program(bucket: ThrottledBucket, home: Path) -> Iterator[Program]:
    made = Program(bucket, home)
    try:
        yield made
    finally:
        made.close()


def kinds(pid: int | str) -> Counter[str]:
    """Descriptors of a process by kind, without sockets: some connections to the origin are kept."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[os.readlink(link).split(":")[0]] += 1
    del found["socket"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_consumers_that_are_killed_anywhere_leave_nothing(throttled: ThrottledBucket, cache_dir: Path, seed: int):
    """The fetcher is in this process, so that its tasks can be counted too."""
    throttled.throttle.set(latency=0.005)
    fs = make_file_system(throttled, cache_dir, fetcher="inprocess")
    try:
        assert fs.cat_file(throttled.put("first.jpg", b"x")) == b"x"
        (served,) = _running.values()
        with program(throttled, cache_dir) as reader:

            def state() -> dict[str, Any]:
                assert served._loop is not None
                tasks = asyncio.all_tasks(served._loop)
                kinds_of_task = {getattr(task.get_coro(), "__qualname__", "") for task in tasks}
                return {
                    "descriptors": kinds("self"),
                    # Those of other tests may end meanwhile; and some of ours are started when they are needed first.
                    "threads": {t.name for t in threading.enumerate() if t.name.startswith("cachefs")}
                    | {"cachefs-release"},
                    "tasks": sorted(kinds_of_task - {"Connection._answer"}),  # which answers us
                    "consumers": len(consumers(fs.config)),
                    "shared memory": [name for name in os.listdir("/dev/shm") if "cachefs" in name],
                    "being written": os.listdir(cache_dir / "tmp"),
                }

            for way in ("paths", "torch"):  # what is started once is there now
                assert reader.live(way, {})["warned"] == []
                assert reader.tell("")["ended"] == 0
            wait_until(lambda: "Prefetcher._run" not in state()["tasks"])
            gc.collect()  # what earlier tests let go of in cycles has descriptors, and would be collected at any moment
            before, killed = state(), 0
            threads_before = threading.active_count()
            for number, point in enumerate(points(seed, 20)):
                way, workers = ("paths", "torch")[number % 2], []
                heard = reader.live(way, {"who": "consumer", **point}, worker=number % 3 == 0)
                if "worker" in heard:
                    workers.append(heard["worker"])
                    heard = reader.hear()
                if "read" in heard:  # a point that this way does not come by
                    assert heard["warned"] == []
                    heard = reader.tell("")
                wait_until(lambda: consumers(fs.config) == [])
                for worker in workers:  # it holds a copy of the socket to its end
                    os.kill(worker, signal.SIGKILL)
                assert heard["ended"] in (0, -signal.SIGKILL), point
                killed += heard["ended"] != 0
                assert fs.cat_file(throttled.put(f"after/{number}.jpg", content(number))) == content(number)
            with suppress(AssertionError):
                wait_until(lambda: state() == before)
            assert state() == before
            assert threading.active_count() <= threads_before + 8  # pools grow; 20 consumers have come and gone
            assert killed > 12
    finally:
        stop_embedded(cache_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_fetchers_that_are_killed_anywhere_are_told_again(
    throttled: ThrottledBucket, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setenv("CACHEFS_IDLE", "60")
    throttled.throttle.set(latency=0.005)
    fs = make_file_system(throttled, cache_dir)
    assert fs.cat_file(throttled.put("first.jpg", b"x")) == b"x"
    before = kinds(pid_of(cache_dir))
    pids = {pid_of(cache_dir)}
    with program(throttled, cache_dir) as reader:
        for number, point in enumerate(points(seed, 12)):
            way = ("paths", "torch")[number % 2]
            heard = reader.live(way, {"who": "fetcher", **point})
            assert heard == {"read": COUNT * (3 if way == "torch" else 1), "warned": []}, point
            pids.add(pid_of(cache_dir))
            # It waits before its last item: the fetcher that lives now has its plans, and knows how far it is.
            (found,) = consumers(fs.config)
            assert found["label"] == f"life/{number + 1}", point
            wait_until(lambda heard=heard: consumers(fs.config)[0]["position"] >= heard["read"] - 1)
            assert reader.tell("") == {"ended": 0}
            wait_until(lambda: consumers(fs.config) == [])
    assert len(pids) > 6, "they were killed"
    wait_until(lambda: kinds(pid_of(cache_dir)) == before)
    assert os.listdir(cache_dir / "tmp") == []

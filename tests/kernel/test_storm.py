"""Storms of kill -9 and of restarts under readers that go past the page cache and compare every byte.

Seconds long here. STORM_SECONDS=60 makes them as long as that, with 1,000 kills and 20 restarts (-s shows what
was measured); `python -m bench --scenario storm` is the same on real storage.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import restart_mount, start_mount, stop_mount
from cachefs_sidecar.testbed import stop_fetcher
from cachefs_sidecar.testbed.storm import Killer, Readers
from tests.kernel.mounting import Dataset

LONG = float(os.environ.get("STORM_SECONDS", "0"))

pytestmark = [pytest.mark.needs_fuse, pytest.mark.timeout(max(300, 6 * LONG))]

SECONDS = LONG or 3.0
KILLS = round(SECONDS * 1000 / 60) if LONG else 20
RESTARTS = 20 if LONG else 5
READERS = 3


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Hits, misses that the fetcher has to bring again and again because they do not fit, and a large object."""
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.config = dataclasses.replace(dataset.config, size=18_000_000, deadline=120.0)
    dice = random.Random(1)
    dataset.write({f"hit/{n}.jpg": dice.randbytes(dice.randint(60_000, 160_000)) for n in range(120)})
    dataset.write({f"miss/{n}.jpg": dice.randbytes(dice.randint(60_000, 160_000)) for n in range(120)}, cached=False)
    dataset.write({"large.bin": dice.randbytes(30_000_000)}, cached=False)
    dataset.snapshot()
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)
    stop_fetcher(dataset.config.home)


def test_readers_do_not_notice_kills(data: Dataset) -> None:
    info = start_mount(data.settings())
    killer = Killer(lambda: info.pid, data.config.home)
    with Readers(data.mountpoint, data.plain, READERS) as readers:
        took = killer.storm(KILLS, SECONDS)
        tally = readers.end()
    print(f"\n{dict(killer.killed)} killed in {took:.0f} s: {tally}")
    assert (tally.failed, tally.wrong) == ({}, [])
    assert killer.killed.total() == KILLS
    assert tally.reads


def test_readers_do_not_notice_restarts(data: Dataset) -> None:
    """Every process, the fetcher too."""
    info = start_mount(data.settings())
    took = []
    with Readers(data.mountpoint, data.plain, READERS) as readers:
        for _ in range(RESTARTS):
            began = time.monotonic()
            info = restart_mount(info)
            stop_fetcher(data.config.home)
            took.append(time.monotonic() - began)
            time.sleep(max(0.0, SECONDS / RESTARTS - took[-1]))
        tally = readers.end()
    print(f"\n{RESTARTS} restarts, the slowest {max(took) * 1e3:.0f} ms: {tally}")
    assert (tally.failed, tally.wrong) == ({}, [])
    assert tally.reads

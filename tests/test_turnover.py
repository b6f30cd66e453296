"""Residency within a dataset in use, by a real fetcher: files that are read more often take the place of others."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import snapshot_ref
from cachefs.fetcher.embedded import stop_embedded
from cachefs.store import Reader, access
from tests.command_line import CommandLine
from tests.test_fetcher import wait_until

OBJECT = 1024 * 1024
ITEMS, STORED, HOT, COLD = 200, 30, 10, 25
LIMIT = STORED * OBJECT


def content(item: int) -> bytes:
    return f"object {item} ".encode().ljust(OBJECT, b"\0")


class Job:
    """A training job over a folder of ITEMS objects, with a cache for STORED of them."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.home = home
        folder.mkdir()
        self.paths = [str(folder / f"{item:03d}") for item in range(ITEMS)]
        for item, path in enumerate(self.paths):
            with open(path, "wb") as file:  # sparse: 200 MB that cost the disk nothing
                file.write(content(item)[:100])
                file.truncate(OBJECT)
        self.session = Session("file", {}, {}, root=str(folder))
        self.connection = self.connect()
        self.dice = random.Random(1)
        self.hot = list(range(HOT))
        self.order: list[int] = []

    def connect(self, size: int = LIMIT, **config: Any) -> Connection:
        return Connection(CacheConfig.make(self.home, deadline=60.0, size=size, **config), self.session)

    @property
    def cold(self) -> list[int]:
        return [item for item in range(ITEMS) if item not in self.hot]

    def read(self, item: int, version: str = "") -> str:
        """version: as a mount asks; else as a file system does. Returns it."""
        located = self.connection.need(self.paths[item], version=version)
        try:
            assert located.read(0, located.size) == content(item)
        finally:
            os.close(located.fd)
        return located.version

    def fill(self) -> None:
        """An epoch over what is not hot."""
        for item in self.dice.sample(self.cold, len(self.cold)):
            self.read(item)

    def rounds(self, number: int) -> None:
        """Epochs over what is not hot; the hot ones are read after every COLD of those, as a validation set is.

        What is missed meanwhile is more than the memory for what does not fit holds: no third cache here.
        """
        for _ in range(number):
            if len(self.order) < COLD:
                self.order += self.dice.sample(self.cold, len(self.cold))
            for item in [*self.order[:COLD], *self.hot]:
                self.read(item)
            del self.order[:COLD]

    def files(self) -> dict[int, str]:
        """Where each stored object is."""
        attached = self.connection.attach()
        reader = Reader((self.home,))
        found = {
            item: reader.file(attached.dataset, snapshot_ref(path, attached.snapshot))
            for item, path in enumerate(self.paths)
        }
        return {item: file for item, file in found.items() if file}

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.connection.status().status["counters"]
        return counters

    def on_disk(self) -> int:
        return sum(f.stat().st_blocks * 512 for f in (self.home / "blobs").rglob("*") if f.is_file())

    def pid(self) -> int:
        return int((self.home / "run" / "fetcher.lock").read_text())


@pytest.fixture
def job(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("CACHEFS_MEMORY", "256M")  # 16 MiB of what does not fit stay in memory
    return Job(tmp_path / "data", cache_dir)


def test_what_is_read_more_often_ends_up_stored_and_capacity_holds(job: Job):
    job.fill()
    assert not set(job.files()) & set(range(HOT))
    for _ in range(10):
        job.rounds(2)
        assert job.on_disk() <= LIMIT
        assert job.connection.status().status["used"] == job.on_disk()
    assert set(range(HOT)) <= set(job.files())
    before = job.counters()
    job.rounds(2)
    after = job.counters()
    assert after["stored"] - before["stored"] >= 2 * HOT
    assert after["replaced"] >= HOT
    assert after["replaced"] - before["replaced"] <= 2, "it has settled"


def test_epochs_hit_what_can_be_hit_and_replace_nothing(job: Job):
    job.hot = []
    job.fill()
    for _ in range(4):
        before = job.counters()["stored"]
        job.fill()
        assert job.counters()["stored"] - before == STORED
    assert job.counters()["replaced"] == 0
    assert job.on_disk() <= LIMIT


def test_whoever_has_a_replaced_object_open_goes_on_reading_it(job: Job):
    for item in job.cold:
        job.read(item, job.read(item))  # by both its names, and both must go
    opened = {item: os.open(file, os.O_RDONLY) for item, file in job.files().items()}
    try:
        job.rounds(12)
        gone = set(opened) - set(job.files())
        assert len(gone) >= HOT
        assert job.connection.status().status["used"] == job.on_disk() <= LIMIT
        for item in opened:
            assert os.pread(opened[item], OBJECT + 1, 0) == content(item)
        assert {os.fstat(opened[item]).st_nlink for item in gone} == {0}, "nothing else holds their room"
    finally:
        for fd in opened.values():
            os.close(fd)


def test_kill_9_while_objects_are_replaced_leaves_a_sane_store_and_the_next_fetcher_goes_on(job: Job):
    job.fill()
    for number, delay in enumerate((0.02, 0.05, 0.1)):
        job.hot = list(range(number * HOT, (number + 1) * HOT))
        job.rounds(6)
        assert job.counters()["replaced"] > 0
        killer = threading.Timer(delay, os.kill, (job.pid(), signal.SIGKILL))
        killer.start()
        job.rounds(1)
        killer.join()
    assert job.on_disk() <= LIMIT
    for item, file in job.files().items():
        assert Path(file).read_bytes() == content(item)
    job.connection.close()
    job.connection = job.connect()
    job.rounds(20)  # it knows what is stored, and follows use, though its memory is gone
    assert set(job.hot) <= set(job.files())
    assert job.connection.status().status["used"] == job.on_disk() <= LIMIT


def test_a_fetcher_that_misses_before_its_directories_were_tried_follows_use_later(
    job: Job, monkeypatch: pytest.MonkeyPatch
):
    job.fill()
    job.connection.shutdown()
    job.connection.close()
    wait_until(lambda: not (job.home / "run" / "fetcher.sock").exists())
    may_try, tries = threading.Event(), access.tells
    monkeypatch.setattr(access, "tells", lambda *args: may_try.wait(30) and tries(*args))
    job.connection = job.connect(fetcher="inprocess")
    try:
        job.rounds(3)
        assert job.counters()["streamed"] > 0
        may_try.set()
        job.rounds(10)
        assert set(job.hot) <= set(job.files())
        assert job.counters()["replaced"] >= HOT
    finally:
        may_try.set()
        job.connection.close()
        stop_embedded(job.home)


def test_many_readers_at_once_get_right_bytes_and_capacity_holds(job: Job):
    job.fill()

    def reader(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(100):
            job.read(min(int(dice.paretovariate(0.5)), ITEMS) - 1)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(reader, seed) for seed in range(8)]:
            done.result()
            assert job.on_disk() <= LIMIT
    assert job.counters()["replaced"] > 0
    assert job.connection.status().status["used"] == job.on_disk()


def test_a_dataset_at_its_quota_follows_use_too(job: Job):
    job.connection.close()
    job.connection = job.connect(4 * LIMIT)
    job.read(ITEMS - 1)
    dataset = job.connection.attach().dataset
    job.connection.quota(LIMIT, dataset=dataset)
    job.fill()
    assert not set(job.files()) & set(job.hot)
    for _ in range(10):
        job.rounds(2)
        assert job.connection.status().status["quotas"]["datasets"][dataset] <= LIMIT
        assert job.on_disk() <= LIMIT
    assert set(job.hot) <= set(job.files())


def test_a_pinned_dataset_stays_as_it_is(job: Job):
    job.fill()
    stored = set(job.files())
    job.connection.pin(job.connection.attach().dataset)
    job.rounds(10)
    assert set(job.files()) == stored
    assert job.counters()["replaced"] == 0


def test_what_was_evicted_by_hand_is_known_to_be_gone(job: Job):
    job.fill()
    job.rounds(6)
    job.connection.evict(str(Path(job.paths[0]).parent))
    assert job.on_disk() == 0
    job.fill()
    job.rounds(20)
    assert set(range(HOT)) <= set(job.files())
    assert job.connection.status().status["used"] == job.on_disk() <= LIMIT


@pytest.fixture
def without_access_times(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "noatime"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noatime,size=100m", "none", folder], check=True)
    yield folder
    for _ in range(600):
        if subprocess.run(["umount", folder], check=False, stderr=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(0.1)


@pytest.mark.needs_root
def test_where_no_access_times_are_kept_nothing_is_replaced_and_status_says_so(
    without_access_times: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("CACHEFS_MEMORY", "256M")
    home = without_access_times / "cache"
    job = Job(tmp_path / "data", home)
    try:
        job.fill()
        job.rounds(8)
        assert job.counters()["replaced"] == 0
        assert job.connection.status().status["silent"] == [str(home)]
        said = CommandLine(capsys)("status", "--cache-dir", home).ok().said
        assert "keeps no access times (noatime)" in " ".join(said.split())
    finally:
        job.connection.shutdown()
        job.connection.close()


# --- access times ---------------------------------------------------------------------------------------------


SEAL = 1_234_567 * 10**9 + 89


def _splice(file: str) -> None:
    fd, (end, start) = os.open(file, os.O_RDONLY), os.pipe()
    os.splice(fd, start, 100)
    for each in (fd, end, start):
        os.close(each)


def _map(file: str) -> None:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[0] == ord("x")


def _read_directly(file: str) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as buffer:
        os.preadv(fd, [buffer], 0)
    os.close(fd)


@pytest.mark.parametrize("read", [lambda file: Path(file).read_bytes(), _splice, _map, _read_directly])
def test_a_file_tells_that_it_was_read_and_keeps_its_seal(read, tmp_path: Path):
    file = tmp_path / "blob"
    file.write_bytes(b"x" * 8192)
    os.utime(file, ns=(time.time_ns(), SEAL))
    if not access.tells(str(tmp_path), SEAL):
        pytest.skip("the file system of the tests keeps no access times")
    assert access.look(str(file)).read, "nobody looked before"
    assert not access.look(str(file)).read
    os.close(os.open(file, os.O_RDONLY))
    assert not access.look(str(file)).read, "opened and not read"
    for _ in range(2):
        read(str(file))
        assert access.look(str(file)).read
        assert not access.look(str(file)).read
    assert file.stat().st_mtime_ns == SEAL
    os.link(file, tmp_path / "ref")
    assert access.look(str(file)).links == 2


def test_a_file_that_is_gone_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        access.look(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        access.mark_unread(str(tmp_path / "nothing"))

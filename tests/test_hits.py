"""What readers find on the disk by themselves is counted, by whichever of them, and costs nobody a read."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from cachefs import CacheFileSystem, hits
from cachefs.hits import TELL_SECONDS
from tests.test_fetcher import wait_until

FILES = {f"{n}.jpg": bytes([n]) * 1000 for n in range(8)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path


def number(home: Path) -> Path:
    return home / "run" / "hits"


def test_counts_add_up(home: Path):
    assert hits.total(home) == 0
    assert hits.add(home, 3)
    assert hits.add(home, 4)
    assert hits.total(home) == 7
    assert number(home).stat().st_mode & 0o777 == 0o600


def test_nobody_waits_for_who_holds_the_number(home: Path):
    hits.add(home, 1)
    with number(home).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not hits.add(home, 1)
        assert not hits.add(home, 1, patience=0.01)
        assert hits.total(home) == 1
        threading.Timer(0.05, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        assert hits.add(home, 1, patience=20.0)
    assert hits.total(home) == 2


@pytest.mark.parametrize("text", [b"", b"7", b"-0000000000000000007\n", b"\0" * 40, b"1_000000000000000000\n"])
def test_a_damaged_number_begins_anew(home: Path, text: bytes):
    number(home).write_bytes(text)
    assert hits.total(home) == 0
    assert hits.add(home, 5)
    assert hits.total(home) == 5


def test_where_it_cannot_be_written_nothing_is_raised(home: Path, tmp_path: Path):
    assert not hits.add(home / "elsewhere", 1)
    assert hits.total(home / "elsewhere") == 0
    number(home).symlink_to(tmp_path / "other")  # not followed: whose file that is nobody knows
    assert not hits.add(home, 1)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def fs(tmp_path: Path, cache_dir: Path) -> CacheFileSystem:
    root = tmp_path / "origin"
    root.mkdir()
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    fs = CacheFileSystem(target_protocol="file", cache_dir=str(cache_dir), deadline=20.0, skip_instance_cache=True)
    read(fs, root)
    return fs


def read(fs: CacheFileSystem, root: Path) -> None:
    for name, data in FILES.items():
        assert fs.cat_file(str(root / name)) == data


def found(fs: CacheFileSystem) -> int:
    return int(fs._views.of("").connection.status().status["counters"]["found"])


def test_readers_by_url_tell_what_they_found(fs: CacheFileSystem, tmp_path: Path, cache_dir: Path):
    assert found(fs) == 0  # the fetcher was asked for all
    read(fs, tmp_path / "origin")
    time.sleep(TELL_SECONDS)
    assert fs.cat_file(str(tmp_path / "origin" / "0.jpg")) == FILES["0.jpg"]
    assert found(fs) == len(FILES) + 1
    number(cache_dir).unlink()
    assert found(fs) == len(FILES) + 1  # numbers that only grow do not fall


def test_what_a_parent_found_its_children_do_not_tell_again(fs: CacheFileSystem, tmp_path: Path):
    read(fs, tmp_path / "origin")  # all but the first is not told yet
    children = [multiprocessing.get_context("fork").Process(target=_read_late, args=(fs, tmp_path)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    _read_late(fs, tmp_path)
    assert len(FILES) < found(fs) <= 6 * len(FILES)


def _read_late(fs: CacheFileSystem, tmp_path: Path) -> None:
    time.sleep(TELL_SECONDS)
    read(fs, tmp_path / "origin")


def test_threads_and_processes_lose_nothing_that_they_were_told_is_added(home: Path):
    told = [0] * 4

    def tell(which: int) -> None:
        for _ in range(200):
            told[which] += hits.add(home, 1)

    threads = [threading.Thread(target=tell, args=(n,)) for n in range(len(told))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hits.total(home) == sum(told) > 0


@pytest.mark.needs_fuse
@pytest.mark.parametrize("io", ["open-free", "passthrough"])
def test_a_mount_tells_what_it_found(fs: CacheFileSystem, tmp_path: Path, cache_dir: Path, cachefs, io: str):
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    cachefs("mount", tmp_path / "origin", mnt, "--cache-dir", cache_dir, "--io", io).ok()
    try:
        for name, data in FILES.items():
            assert (mnt / name).read_bytes() == data  # asks the fetcher: stored, and not under this snapshot's names
        before = found(fs)
        for name, data in FILES.items():
            fd = os.open(mnt / name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.read(fd, 2000) == data
            os.close(fd)
    finally:
        cachefs("umount", mnt).ok()
    wait_until(lambda: found(fs) >= before + len(FILES))

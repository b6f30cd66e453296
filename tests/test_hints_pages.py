"""What is announced is in the page cache before it is read: blobs for readers by URL, a mount's own pages for paths."""

from __future__ import annotations

import os
import time
from array import array
from contextlib import closing
from pathlib import Path

import pytest

from cachefs.fetcher.prefetch.pages import (
    MOST_BYTES,
    RECENT_SECONDS,
    TIMED,
    Pages,
    Sampling,
    pages_present,
    read_ahead,
)
from cachefs.hints.consumer import Consumer
from cachefs.hints.places import place_of
from tests.command_line import CommandLine
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import wait_until

COUNT, SIZE = 40, 200_000

# Read-ahead is a wish: a kernel with much to do drops some of it.
MOST = 0.8 * COUNT


def forget(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)  # what is not on the disk yet stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def make_cold(file: Path) -> None:
    """Forget it for sure: pages that are just being read, which takes its time on a busy disk, stay at first."""

    def cold() -> bool:
        forget(file)
        return not present(file)

    wait_until(cold)


def present(file: Path) -> bool:
    fd = os.open(file, os.O_RDONLY)
    try:
        return pages_present(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


pytestmark = pytest.mark.usefixtures("told_by_the_kernel")


@pytest.fixture
def told_by_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "probe"
    file.write_bytes(b"x")
    if not present(file):
        pytest.skip("the kernel does not tell what is in the page cache (cachestat, Linux 6.5)")
    forget(file)
    if present(file):
        pytest.skip("this file system has no pages to forget")


def test_a_file_is_brought(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    forget(file)
    assert not present(file)
    assert not read_ahead(str(file))
    wait_until(lambda: present(file))
    assert read_ahead(str(file))


def test_of_a_large_file_its_beginning(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(bytes(MOST_BYTES + 50 * 1024 * 1024))
    forget(file)
    read_ahead(str(file))
    fd = os.open(file, os.O_RDONLY)
    try:
        wait_until(lambda: pages_present(fd, MOST_BYTES))
    finally:
        os.close(fd)
    assert not present(file)


def test_where_all_is_there_only_some_are_looked_at():
    sampling = Sampling()
    for _ in range(Sampling.IN_A_ROW):
        assert sampling.worth()
        sampling.found(True)
    assert sum(sampling.worth() for _ in range(160)) == 10
    sampling.found(False)
    assert all(sampling.worth() for _ in range(100))


def test_what_cannot_be_opened_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pages = Pages()
    (tmp_path / "there").write_bytes(b"x")
    found: list[bool] = []
    sampling = Sampling()
    monkeypatch.setattr(sampling, "found", found.append)
    for name in ("nothing", "there"):
        pages.bring(str(tmp_path / name), sampling)
    wait_until(lambda: found == [True])
    sampling.over = True
    pages.bring(str(tmp_path / "there"), sampling)
    pages.bring(str(tmp_path / "there"), Sampling())
    wait_until(lambda: pages._queue.empty())
    assert found == [True], "nothing is opened for one who has left"
    pages.close()


def test_what_is_no_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The path is a consumer's word. Nobody waits at a fifo, and no device is touched."""
    pages = Pages()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "there").write_bytes(b"x")
    found: list[bool] = []
    sampling = Sampling()
    monkeypatch.setattr(sampling, "found", found.append)
    for path in (tmp_path / "fifo", "/dev/zero", "with\0nul", tmp_path, "x" * 10_000, tmp_path / "fifo"):
        pages.bring(str(path), sampling)
    pages.bring(str(tmp_path / "there"), sampling)
    wait_until(lambda: found == [True])
    assert all(thread.is_alive() for thread in pages._threads)
    pages.close()


def test_a_disk_that_is_slow_to_read_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One file in some is read to its end; those that are in memory say nothing of the disk."""
    sampling, pages = Sampling(), Pages()
    right, slept = os.pread, 0

    def slow(fd: int, count: int, at: int) -> bytes:
        nonlocal slept
        slept += 1
        time.sleep(0.2)
        return right(fd, count, at)

    monkeypatch.setattr(os, "pread", slow)
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    for _ in range(3):
        pages.bring(str(file), sampling)
    wait_until(lambda: sampling._right == 3)
    assert sampling.seconds(time.monotonic()) == 0.0
    for _ in range(TIMED + 1):
        before = sampling._cold
        make_cold(file)
        pages.bring(str(file), sampling)
        wait_until(lambda before=before: sampling._cold == before + 1)
    wait_until(lambda: sampling.seconds(time.monotonic()) >= 0.2)
    assert slept == 4, "two of them were timed, in two pieces each"
    assert sampling.seconds(time.monotonic() + RECENT_SECONDS + 1) == 0.0
    pages.close()


def test_blobs_for_readers_by_url(throttled: ThrottledBucket, cache_dir: Path):
    fs = make_file_system(throttled, cache_dir)
    names = [throttled.put(f"set/{number}.jpg", bytes([number]) * SIZE) for number in range(COUNT)]
    files = [Path(os.fspath(fs.open_local(name))) for name in names]
    for file in files:
        forget(file)
    with closing(Consumer(fs.config, fs.dataset_of(names[0])[1], names)) as consumer:
        consumer.plan(array("I", range(COUNT)))
        wait_until(lambda: sum(map(present, files)) >= MOST)


@pytest.mark.needs_fuse
def test_the_pages_of_a_mount(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CACHEFS_DIR", str(cache_dir))
    command = CommandLine(capsys)
    origin, data = tmp_path / "origin", tmp_path / "data"
    origin.mkdir()
    data.mkdir()
    for number in range(COUNT):
        (origin / f"{number}.jpg").write_bytes(bytes([number]) * SIZE)
    command("warm", origin).ok()
    command("mount", origin, data).ok()
    try:
        paths = [data / f"{number}.jpg" for number in range(COUNT)]
        assert not any(map(present, paths))
        with closing(place_of([str(path) for path in paths]).consumer("test")) as consumer:
            consumer.plan(array("I", range(COUNT)))
            wait_until(lambda: sum(map(present, paths)) >= MOST)
        assert [path.read_bytes() for path in paths] == [bytes([number]) * SIZE for number in range(COUNT)]
    finally:
        command("umount", data).ok()

"""What is announced is in the page cache before it is read: blobs for readers by URL, a mount's own pages for paths."""

from __future__ import annotations

import os
import time
from array import array
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cachefs.digest import snapshot_ref
from cachefs.fetcher.prefetch.announced import Announced
from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.pages import (
    AT_ONCE,
    AT_ONCE_BYTES,
    MOST_BYTES,
    RECENT_SECONDS,
    TIMED,
    Pages,
    Sampling,
    pages_present,
    read_ahead,
)
from cachefs.fetcher.prefetch.prefetcher import Bring, Prefetcher
from cachefs.fetcher.prefetch.spot import SpotCheck
from cachefs.fetcher.room import Room
from cachefs.hints.consumer import Consumer
from cachefs.hints.places import place_of
from cachefs.messages import Announce, Plan
from cachefs.store import Reader
from tests.command_line import CommandLine
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import wait_until
from tests.test_hints_skimming import Order

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
    assert read_ahead(str(file)) == SIZE
    wait_until(lambda: present(file))
    assert read_ahead(str(file)) == 0


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
        pages.bring([str(tmp_path / name)], sampling)
    wait_until(lambda: found == [True])
    sampling.over = True
    pages.bring([str(tmp_path / "there")], sampling)
    pages.bring([str(tmp_path / "there")], Sampling())
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
        pages.bring([str(path)], sampling)
    pages.bring([str(tmp_path / "there")], sampling)
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
    there = tmp_path / "there"  # the last of what is brought at once is waited for, if it is not in memory
    there.write_bytes(b"x")
    for _ in range(3):
        pages.bring([str(file)], sampling)
    wait_until(lambda: sampling._right == 3)
    assert sampling.seconds(time.monotonic()) == 0.0
    for _ in range(TIMED + 1):
        before = sampling._cold
        make_cold(file)
        pages.bring([str(file), str(there)], sampling)
        wait_until(lambda before=before: sampling._cold == before + 1)
    wait_until(lambda: sampling.seconds(time.monotonic()) >= 0.2)
    assert slept == 4, "two of them were timed, in two pieces each"
    assert sampling.seconds(time.monotonic() + RECENT_SECONDS + 1) == 0.0
    pages.close()


@pytest.mark.parametrize(("size", "waited_for"), [(SIZE, {10, AT_ONCE - 1}), (AT_ONCE_BYTES // 2, {1, 3, 5, 7})])
def test_what_is_brought_at_once_is_in_memory_before_more_is(
    size: int, waited_for: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a reader would wait behind all of it at the disk, or at the mount."""
    sampling, pages = Sampling(), Pages()
    sampling._asked = time.monotonic()  # so that nothing is timed, which is waited for too
    waited: list[str] = []
    right = os.pread

    def noted(fd: int, count: int, at: int) -> bytes:
        waited.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        return right(fd, count, at)

    monkeypatch.setattr(os, "pread", noted)
    files = [tmp_path / str(number) for number in range(max(waited_for) + 1)]
    for file in files:
        file.write_bytes(bytes(size))
        make_cold(file)
    pages.bring([str(file) for file in files], sampling)
    wait_until(lambda: sampling._cold == len(files))
    wait_until(lambda: present(files[-1]))
    assert set(waited) == {str(number) for number in waited_for}
    pages.close()


class Queued(Pages):
    """Notes what it is to bring, and has room for so many times more."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.brought: list[list[str]] = []

    @property
    def take_more(self) -> bool:
        return len(self.brought) < self.room

    def bring(self, paths: list[str], sampling: Sampling) -> None:
        self.brought.append(paths)


def consumer_of(count: int, dataset: str) -> Course:
    """Of files that are stored, all of them; it has taken 1,000 already, and reads them."""
    order = Order(count)
    order.attachment.dataset, order.at = dataset, 1000
    announce = Announce(id=1, attachment=1, label="", names=0)
    disk = cast(Reader, SimpleNamespace(file=lambda dataset, ref: f"/{dataset}/{ref}"))
    course = Course(cast(Announced, order), announce, 1, disk, {}, SpotCheck(10, 10))
    course.plan(Plan(id=1, consumer=1, at=0, count=count, kind="names"), -1)
    course.position = order.at
    return course


def test_consumers_take_turns_and_what_does_not_fit_waits():
    prefetcher = Prefetcher(cast(Room, None), cast(Bring, None))
    courses = [consumer_of(20 * AT_ONCE, "one"), consumer_of(20 * AT_ONCE, "other"), consumer_of(3, "little")]
    prefetcher._courses += courses
    for course in courses:
        while course._scan(100):
            pass
    turns = [Queued(9) for _ in range(6)]
    for turn in turns:
        prefetcher._pages = turn
        prefetcher._page_in()
    whose = [[paths[0].split("/")[1] for paths in turn.brought] for turn in turns]
    assert sorted(whose[0]) == ["little"] + ["one"] * 4 + ["other"] * 4
    assert {len(turn) for turn in whose[:4]} == {9}
    assert len({turn[0] for turn in whose[:4]}) > 1, "another one is first each time"
    brought = [path for turn in turns for paths in turn.brought for path in paths]
    for course, count in zip(courses, (20 * AT_ONCE, 20 * AT_ONCE, 3), strict=True):
        refs = [snapshot_ref(f"b/{number}", "") for number in range(count)]
        assert [path for path in brought if path.split("/")[1] == course.attachment.dataset] == [
            f"/{course.attachment.dataset}/{ref}" for ref in refs
        ]


def test_what_its_readers_have_passed_is_neither_brought_nor_kept():
    """As where a mount hangs, and nobody brings anything."""
    course = consumer_of(20_000, "one")
    while course._scanned < 8_000:
        cast(Order, course.announced).at += 500
        course.look(time.monotonic())
        assert len(course._unpaged) <= course.lag.items + course.window
    passed = course.position - course.lag.items
    assert passed > 0
    assert course.files_to_page_in(1) == [f"/one/{snapshot_ref(f'b/{passed}', '')}"]


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

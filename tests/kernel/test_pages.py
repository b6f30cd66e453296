"""What reading costs in page cache: each byte is in memory once, in whichever mode and whether it was cold or fetched.

Counted per file with cachestat(2), so that nothing else on the machine is counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import start_mount, stop_mount
from cachefs_sidecar.fuse import settling, worker
from cachefs_sidecar.fuse.reply import PAGE, Reply
from cachefs_sidecar.fuse.settling import Settling
from tests.kernel.mounting import Dataset, drop_pages, until

IMAGES = {f"img{number:02d}.jpg": os.urandom(60_000 + 9_991 * number) for number in range(10)}
LARGE = os.urandom(9_000_000)

# A kernel that needs memory for something else takes pages that were read a moment ago, too.
ATTEMPTS = 5


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.write({**IMAGES, "large.bin": LARGE})
    dataset.snapshot()
    os.sync()  # pages that are not on the disk cannot be dropped
    for blob in blobs(dataset):
        drop_pages(blob)
    if not knows_pages(dataset.plain / "large.bin"):
        pytest.skip("this kernel has no cachestat(2) (Linux 6.5)")
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def blobs(data: Dataset) -> list[Path]:
    return [file for file in (data.folder / "cache/blobs").rglob("*") if file.is_file()]


def knows_pages(file: Path) -> bool:
    with open(file, "rb") as opened:
        return Reply(PAGE).pages(opened.fileno(), 0, PAGE) is not None


def in_memory(files: Iterable[Path]) -> int:
    """Bytes of their pages that are in memory."""
    reply, total = Reply(PAGE), 0
    for file in files:
        with open(file, "rb") as opened:
            pages = reply.pages(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
            assert pages is not None
            total += pages[0] * PAGE
    return total


def size(content: bytes) -> int:
    return -(-len(content) // PAGE) * PAGE


@pytest.mark.needs_fuse
def test_cold_reads_leave_one_copy(data: Dataset) -> None:
    start_mount(data.settings(io="open-free"))
    files = [data.mountpoint / name for name in (*IMAGES, "large.bin")]
    for _ in range(ATTEMPTS):
        for name, content in {**IMAGES, "large.bin": LARGE}.items():
            assert (data.mountpoint / name).read_bytes() == content
        kept = in_memory(files)
        assert in_memory(blobs(data)) == 0
        if kept == sum(map(size, IMAGES.values())) + size(LARGE):
            return
    pytest.fail(f"only {kept} bytes are in memory")


@pytest.mark.needs_fuse
@pytest.mark.needs_root
def test_passthrough_leaves_one_copy(data: Dataset) -> None:
    info = start_mount(data.settings(io="passthrough"))
    if info.io != "passthrough":
        pytest.skip(info.io_why)
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE
    assert in_memory([data.mountpoint / "large.bin"]) == 0
    assert in_memory(blobs(data)) == size(LARGE)


@pytest.mark.needs_fuse
def test_blobs_in_memory_are_read_from_there_and_dropped(data: Dataset) -> None:
    start_mount(data.settings(io="open-free"))
    for blob in blobs(data):
        blob.read_bytes()
    assert in_memory(blobs(data)) >= sum(map(size, IMAGES.values())) + size(LARGE)
    for name, content in {**IMAGES, "large.bin": LARGE}.items():
        assert (data.mountpoint / name).read_bytes() == content
    # The kernel keeps a large page that also holds bytes which were not asked for in one go: some may stay.
    assert in_memory(blobs(data)) <= size(LARGE) // 10


@pytest.mark.needs_fuse
def test_what_is_fetched_is_dropped_when_it_is_on_the_disk(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fetcher that is a process of its own, and a clock that runs faster."""
    monkeypatch.setattr(settling, "SETTLED_SECONDS", 3.0)  # in the workers too, which are forked from here
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.5)
    data.write({"new.jpg": IMAGES["img00.jpg"][::-1], "new.bin": LARGE[::-1]}, cached=False)
    data.snapshot("b")
    before = set(blobs(data))
    keeper = data.keeper_in_a_fork(io="open-free")
    try:
        assert (data.mountpoint / "new.jpg").read_bytes() == IMAGES["img00.jpg"][::-1]
        assert (data.mountpoint / "new.bin").read_bytes() == LARGE[::-1]
        new = [blob for blob in blobs(data) if blob not in before and not blob.name.endswith(".blocks")]
        assert len(new) == 2
        assert in_memory(new) > 0
        for blob in new:
            with blob.open("rb") as written:
                os.fsync(written.fileno())
        until(lambda: in_memory(new) == 0)
        assert (data.mountpoint / "new.bin").read_bytes() == LARGE[::-1]
    finally:
        stop_mount(data.mountpoint)
        os.waitpid(keeper, 0)


# --- the parts ----------------------------------------------------------------------------------------------------


def test_settling_waits_until_the_disk_has_it(tmp_path: Path) -> None:
    now = [100.0]
    settles = Settling(lambda: now[0])
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(100_000))
    large.write_bytes(bytes(9_000_000))
    with open(small, "rb") as one, open(large, "rb") as two:
        settles.add(one.fileno(), 0, 100_000)
        settles.add(two.fileno(), 1 << 20, 1 << 20)
        settles.add(two.fileno(), 4 << 20, 1 << 20)
    if not knows_pages(small):
        pytest.skip("this kernel has no cachestat(2) (Linux 6.5)")
    os.sync()
    settles.due()()
    assert in_memory([small]) == size(bytes(100_000))
    large.rename(tmp_path / "whole")  # as an incomplete object that became a blob
    now[0] += settling.SETTLED_SECONDS
    settles.due()()
    assert in_memory([small]) == 0
    # Advice: a page that the kernel has in hand just then stays.
    assert in_memory([tmp_path / "whole"]) < size(bytes(9_000_000))
    small.unlink()
    now[0] += settling.SETTLED_SECONDS
    settles.due()()
    settles.close()


def test_memory_without_a_name_is_left_alone() -> None:
    settles = Settling(lambda: 0.0)
    fd = os.memfd_create("block")
    os.write(fd, bytes(9_000_000))
    settles.add(fd, 0, 9_000_000)
    assert not settles._large
    os.close(fd)

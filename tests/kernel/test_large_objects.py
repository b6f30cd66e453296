"""Large objects through a mount, in both modes: far offsets, many readers at once, and what the origin is asked for."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.mountinfo import mounted_at
from cachefs.store.layout import Places, seal_ns
from cachefs_sidecar.control import start_mount, stop_mount
from tests.command_line import s3, script
from tests.kernel.mounting import Dataset, until, version
from tests.machine import ThrottledBucket

pytestmark = pytest.mark.needs_fuse

BLOCKS = 8
SIZE = BLOCKS * BLOCK_SIZE - 99

GIB = 1 << 30
HUGE = 10 * GIB + 4097

# What is written there, beside and across the borders of 31 and 32 bits and at the end; elsewhere is a hole.
MARKS = {
    offset: f"bytes at {offset}".encode()
    for offset in (0, 2 * GIB - 5, 4 * GIB - 7, 4 * GIB + 12_345, 7 * GIB + BLOCK_SIZE - 3, HUGE - 20)
}


@pytest.fixture(params=["open-free", "passthrough"])
def mode(request: pytest.FixtureRequest) -> str:
    if request.param == "passthrough" and os.geteuid() != 0:
        pytest.skip("needs to be root")
    return str(request.param)


# --- offsets beyond 4 GiB -------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    write_huge(dataset.plain / "huge.bin")
    dataset.snapshot()
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def write_huge(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(HUGE)
        for offset, mark in MARKS.items():
            out.seek(offset)
            out.write(mark)


def store_huge(data: Dataset) -> None:
    """Into the cache without reading it: a sparse blob, sealed."""
    places, key = Places(data.folder / "cache"), "ab" * 16
    ref = places.ref(data.id, version_ref(str(data.plain / "huge.bin"), version(data.plain / "huge.bin")))
    for made in (places.blob(key), ref):
        os.makedirs(os.path.dirname(made), exist_ok=True)
    write_huge(Path(places.blob(key)))
    os.utime(places.blob(key), ns=(seal_ns(), seal_ns()))
    os.link(places.blob(key), ref)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "cold"])
def test_offsets_beyond_four_gibibytes(data: Dataset, mode: str, cached: bool) -> None:
    if cached:
        store_huge(data)
    info = start_mount(data.settings(io=mode))
    if info.io != mode:
        pytest.skip(info.io_why)
    with open(data.mountpoint / "huge.bin", "rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == HUGE
        for offset, mark in reversed(MARKS.items()):
            assert os.pread(file.fileno(), len(mark), offset) == mark
            assert os.pread(file.fileno(), min(64, offset), max(0, offset - 64)) == bytes(min(64, offset))
        file.seek(4 * GIB - 7)
        assert file.read(19) == MARKS[4 * GIB - 7]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            view.madvise(mmap.MADV_RANDOM)
            for offset, mark in MARKS.items():
                assert view[offset : offset + len(mark)] == mark
        assert os.pread(file.fileno(), 100, HUGE - 20) == MARKS[HUGE - 20]
        assert os.pread(file.fileno(), 100, HUGE) == b""
    if not cached:  # what was not asked for was not fetched, and takes no room
        (part,) = (part for part in (data.folder / "cache/parts").iterdir() if part.suffix != ".map")
        assert part.stat().st_blocks * 512 <= 2 * (len(MARKS) + 2) * BLOCK_SIZE


# --- what the origin is asked for -----------------------------------------------------------------------------------


@pytest.fixture
def far(
    throttled: ThrottledBucket, mode: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ThrottledBucket, Path]]:
    """A bucket with an object of some blocks, 20 ms away, and its place in a mount."""
    dice = random.Random(5)
    for name in ("shard.bin", "another.bin"):
        content = b"".join(dice.randbytes(1 << 20) * 8 for _ in range(BLOCKS))[:SIZE]
        (throttled.folder / name).write_bytes(content)
    monkeypatch.setenv("TEST_KEY", throttled.options["key"])
    monkeypatch.setenv("TEST_SECRET", throttled.options["secret"])
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ["--cache-dir", str(cache_dir), "--io", mode, *s3(throttled.options)]
    told = json.loads(script("mount", throttled.url, mountpoint, "--json", *options).ok().out)
    try:
        if told["io"] != mode:
            pytest.skip(told["io_why"])
        # This server answers the first question for a range in a way that has it asked once more, differently.
        with open(mountpoint / "another.bin", "rb", buffering=0) as another:
            another.read(1)
        throttled.throttle.set(latency=0.02)
        throttled.throttle.reset()
        yield throttled, mountpoint / "shard.bin"
    finally:
        script("umount", mountpoint).ok()


READ_ALL = """
import sys, threading, zlib
def read():
    with open(sys.argv[1], "rb", buffering=0) as file:
        crc = 0
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    sys.stdout.write(f"{crc}\\n")
threads = [threading.Thread(target=read) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_64_readers_of_one_cold_object_and_one_origin_read_per_block(far: tuple[ThrottledBucket, Path]) -> None:
    bucket, shard = far
    readers = [
        subprocess.Popen([sys.executable, "-c", READ_ALL, str(shard)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    found = [line for reader in readers for line in reader.communicate(timeout=100)[0].split()]
    assert found == [str(zlib.crc32((bucket.folder / "shard.bin").read_bytes()))] * 64
    assert bucket.reads == {"shard.bin": BLOCKS}


def test_random_reads_fetch_the_blocks_that_they_touch(far: tuple[ThrottledBucket, Path]) -> None:
    bucket, shard = far
    dice = random.Random(3)
    touched = [1, 4, 5, 7]
    offsets = [
        block * BLOCK_SIZE + dice.randrange(0, BLOCK_SIZE - 200_000, 4096) for block in touched for _ in range(12)
    ]
    dice.shuffle(offsets)
    right = (bucket.folder / "shard.bin").read_bytes()
    found: dict[int, bytes] = {}

    def read(offsets: list[int]) -> None:
        fd = os.open(shard, os.O_RDONLY)
        try:
            for offset in offsets:
                found[offset] = os.pread(fd, 4096, offset)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, [offsets[start::4] for start in range(4)]))
    assert all(found[offset] == right[offset : offset + 4096] for offset in offsets)
    traffic = bucket.throttle.traffic()
    assert bucket.reads == {"shard.bin": len(touched)}
    assert traffic.bytes_down <= 1.1 * len(touched) * BLOCK_SIZE


def test_a_sequential_reader_is_read_ahead_of(far: tuple[ThrottledBucket, Path]) -> None:
    bucket, shard = far
    with open(shard, "rb", buffering=0) as file:
        for _ in range(2 * BLOCK_SIZE // (1 << 20) + 1):  # into the third block
            file.read(1 << 20)
        until(lambda: bucket.reads["shard.bin"] > 3)

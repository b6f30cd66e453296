"""How a mount behaves while what is behind it does not: an origin or a disk that hangs, memory that is short."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import list_mounts, mount_status, stop_mount
from cachefs_sidecar.registry import MountInfo
from tests.command_line import credentials, s3, script
from tests.kernel.mounting import AT_ONCE, Dataset, until
from tests.machine import ThrottledBucket

pytestmark = pytest.mark.needs_fuse

IMAGES = {f"images/{number:03d}.jpg": os.urandom(20_000 + 991 * number) for number in range(40)}

FAULT = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print("there", flush=True)
    view[int(sys.argv[2])]
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))


def dataset(folder: Path) -> Dataset:
    folder.mkdir(exist_ok=True)
    return Dataset(folder)


def mount_at(point: Path) -> MountInfo:
    (info,) = [info for info in list_mounts() if info.mountpoint == str(point)]
    return info


# --- an origin that hangs -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runtime")
def test_readers_of_every_kind_end_when_they_are_killed(tmp_path: Path) -> None:
    """Reading, reading ahead, and page faults; whichever of the workers has their requests."""
    data = dataset(tmp_path)
    data.write(IMAGES)
    data.write({f"hang/{number}": bytes(3_000_000) for number in range(12)}, cached=False)
    data.snapshot()
    keeper = data.keeper(workers=4)
    info = mount_at(data.mountpoint)
    readers = []
    for number in range(12):
        file = data.mountpoint / f"hang/{number}"
        command = [sys.executable, "-c", FAULT, str(file), str(number * 200_000)] if number % 2 else ["cat", str(file)]
        readers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    until(lambda: mount_status(info)["counts"]["waiting"] >= 12)
    began = time.monotonic()
    for reader in readers:
        reader.kill()
    for reader in readers:
        reader.wait(AT_ONCE)
        assert reader.stdout is not None
        reader.stdout.close()
    assert subprocess.run(["ls", "-lR", data.mountpoint], capture_output=True, timeout=AT_ONCE, check=True).stdout
    stop_mount(data.mountpoint)  # their READs have no answer yet
    assert keeper.wait(AT_ONCE) == 0
    assert time.monotonic() - began < AT_ONCE


def test_all_that_needs_no_origin_goes_on_while_it_hangs(
    throttled: ThrottledBucket, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    for name, content in IMAGES.items():
        throttled.put(name, content)
    throttled.put("large", bytes(20 << 20))
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    # However long this takes, the readers below are not told that there is no answer.
    patient = ["--origin-option", "retry_timeout=600"]
    script("mount", throttled.url, mnt, "--cache-dir", cache_dir, *s3(throttled.options), *patient).ok()
    half = list(IMAGES)[:20]
    for name in half:
        assert (mnt / name).read_bytes() == IMAGES[name]
    throttled.throttle.hang()
    with ThreadPoolExecutor() as pool:
        waiting = [subprocess.Popen(["cat", mnt / name], stdout=subprocess.PIPE) for name in list(IMAGES)[20:]]
        waiting.append(subprocess.Popen(["cat", mnt / "large"], stdout=subprocess.PIPE))
        info = mount_at(mnt)
        until(lambda: mount_status(info)["counts"]["waiting"] >= 21)

        def at_once() -> None:
            listed = subprocess.run(["ls", "-lR", mnt], capture_output=True, timeout=AT_ONCE, check=True).stdout
            assert listed.count(b".jpg") == len(IMAGES)
            for name in half:
                fd = os.open(mnt / name, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # from the cache's disk, not from the page cache
                assert os.read(fd, 1 << 20) == IMAGES[name]
                os.close(fd)
            assert not (mnt / "nothing").exists()
            script("status", "--cache-dir", cache_dir).ok()

        pool.submit(at_once).result(3 * AT_ONCE)
        for reader in waiting:
            assert reader.poll() is None
            reader.kill()
            reader.wait(AT_ONCE)
            assert reader.stdout is not None
            reader.stdout.close()
        began = time.monotonic()
        script("umount", mnt).ok()
        assert time.monotonic() - began < AT_ONCE


# --- a disk that hangs ----------------------------------------------------------------------------------------------


@contextmanager
def disk_that_can_hang(data: Dataset, folder: Path) -> Iterator[list[int]]:
    """The refs of a cache on a file system whose server may be stopped: its pids. It is a mount of ours."""
    refs = data.folder / "cache/refs"
    disk = dataset(folder)
    shutil.copytree(refs, disk.plain, dirs_exist_ok=True)
    disk.snapshot()
    keeper = disk.keeper(workers=1)
    subprocess.run(["mount", "--bind", disk.mountpoint, refs], check=True)
    pids = [worker["pid"] for worker in mount_status(mount_at(disk.mountpoint))["workers"]]
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        subprocess.run(["umount", "-l", refs], check=True)
        until(lambda: _unmounted(disk))
        assert keeper.wait(AT_ONCE) == 0


def _unmounted(disk: Dataset) -> bool:
    stop_mount(disk.mountpoint, lazy=True)
    return mounted_at(disk.mountpoint) is None


@pytest.mark.needs_root
@pytest.mark.usefixtures("runtime")
def test_a_disk_that_stands_still_holds_up_its_readers_only(tmp_path: Path) -> None:
    """As long as they are fewer than the workers: each waits for the disk in the worker that has its request."""
    data = dataset(tmp_path / "data")
    data.write(IMAGES)
    data.snapshot()
    with disk_that_can_hang(data, tmp_path / "disk") as pids:
        keeper = data.keeper(workers=4)
        hot, *cold = (data.mountpoint / name for name in IMAGES)
        assert hot.read_bytes() == IMAGES["images/000.jpg"]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        readers = [subprocess.Popen(["md5sum", file], stdout=subprocess.PIPE) for file in cold[:2]]
        info = mount_at(data.mountpoint)
        until(lambda: sum(worker["answers"] for worker in mount_status(info)["workers"]) == 2)  # each holds up one
        assert [reader.poll() for reader in readers] == [None, None]
        for command in (("ls", "-lR", data.mountpoint), ("stat", *cold[5:]), ("cat", hot)):
            subprocess.run([str(word) for word in command], capture_output=True, timeout=AT_ONCE, check=True)
        assert sum(worker["answers"] for worker in mount_status(info)["workers"]) == 2
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        for reader in readers:
            out, _ = reader.communicate(timeout=AT_ONCE)
            assert (reader.returncode, len(out) > 32) == (0, True)
        for file in cold:
            assert file.read_bytes() == IMAGES[f"images/{file.name}"]
        stop_mount(data.mountpoint)
        assert keeper.wait(AT_ONCE) == 0


# --- memory that is short -------------------------------------------------------------------------------------------


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group of version 1 or 2 whose processes may use `limit` bytes of memory."""
    for top, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = top / f"cachefs-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / file).exists():
                (group / file).write_text(str(limit))
                yield group
                return
        finally:
            until(lambda: _removed(group))  # noqa: B023
    pytest.skip("no control group of ours can be made here")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


@pytest.mark.needs_root
def test_memory_of_a_small_container_suffices_however_many_read(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 readers each waits for a block of its own; the blocks are twice what the mount may use."""
    readers, block = 80, 8 << 20
    origin, mnt = tmp_path / "origin", tmp_path / "mnt"
    for folder in (origin, mnt):
        folder.mkdir()
    with (origin / "large").open("wb") as large:
        large.truncate(readers * block)
        for number in range(readers):
            large.seek(number * block + 4096)
            large.write(b"block %d" % number)
    with control_group(320 << 20) as group:
        monkeypatch.setenv("CACHEFS_DIR", str(cache_dir))
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        script("mount", f"file://{origin}", mnt, wrapper=inside).ok()
        try:
            fd = os.open(mnt / "large", os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

            def read(number: int) -> bool:
                return os.pread(fd, 1 << 20, number * block)[4096:].startswith(b"block %d\0" % number)

            with ThreadPoolExecutor(readers) as pool:
                assert list(pool.map(read, range(readers))) == [True] * readers
            os.close(fd)
            memory = script("status", "--json").ok().json["fetcher"]["memory"]
            assert memory["usable"] == 320 << 20
            assert memory["in_flight_most"] <= memory["in_flight_limit"] == 64 << 20
            for file in ("memory.oom_control", "memory.events"):
                if (group / file).exists():
                    assert "oom_kill 0" in (group / file).read_text().splitlines()
        finally:
            script("umount", mnt).ok()
            script("stop").ok()

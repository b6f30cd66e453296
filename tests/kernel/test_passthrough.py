"""Passthrough on real mounts: the kernel reads the blobs by itself, and its rules about who may open what are kept."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import mmap
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.digest import content_key, version_ref
from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import list_mounts, mount_status, start_mount, stop_mount
from cachefs_sidecar.fuse import modes, passthrough
from cachefs_sidecar.registry import MountInfo
from tests.kernel.mounting import Dataset, until, version

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_root]

LARGE = os.urandom(9_000_000)
SMALL = os.urandom(110_000)
COLD = os.urandom(17_000_000)

# Seconds of the storm below. By hand: PASSTHROUGH_STORM=60.
STORM = float(os.environ.get("PASSTHROUGH_STORM", "3"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.write({"large.bin": LARGE, "d/small.jpg": SMALL, "empty": b""})
    dataset.write({"cold.bin": COLD}, cached=False)
    dataset.snapshot()
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def mounted(data: Dataset, **options: object) -> MountInfo:
    info = start_mount(data.settings(io="passthrough", **options))
    if info.io != "passthrough":
        pytest.skip(info.io_why)
    return info


def counts(info: MountInfo) -> dict[str, int]:
    return dict(mount_status(info)["counts"])


def opens(data: Dataset) -> tuple[int, int]:
    """(open handles, registered backing files), as the workers' table says."""
    (file,) = (data.folder / "runtime/mounts").glob("*.opens")
    with contextlib.closing(sqlite3.connect(file)) as table:
        handles = table.execute("SELECT COUNT(*) FROM opens WHERE released = 0").fetchone()[0]
        files = table.execute("SELECT COUNT(*) FROM backings WHERE node != 0").fetchone()[0]
    return handles, files


def ref(data: Dataset, name: str) -> str:
    file = data.plain / name
    return version_ref(str(file), version(file))


# --- reading ------------------------------------------------------------------------------------------------------


def test_whole_objects_are_read_by_the_kernel(data: Dataset) -> None:
    info = mounted(data)
    for name, content in (("large.bin", LARGE), ("d/small.jpg", SMALL), ("empty", b"")):
        assert (data.mountpoint / name).read_bytes() == content
    with open(data.mountpoint / "large.bin", "rb") as one, open(data.mountpoint / "large.bin", "rb") as two:
        until(lambda: opens(data) == (2, 1))  # RELEASE, of those before, comes after close(2) has returned
        for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY):
            with mmap.mmap(one.fileno(), 0, access=access) as view:
                assert view[777_777:888_888] == LARGE[777_777:888_888]
        two.seek(8_999_000)
        assert two.read() == LARGE[8_999_000:]
        assert os.fstat(two.fileno()).st_size == len(LARGE)
    until(lambda: opens(data) == (0, 0))
    assert counts(info).get("READ", 0) == 0
    with pytest.raises(OSError) as caught:
        os.open(data.mountpoint / "large.bin", os.O_RDWR)
    assert caught.value.errno == errno.EROFS
    assert mount_status(info)["io"] == "passthrough"
    assert not left_in_the_kernel(info)


def test_an_incomplete_object_passes_through_once_it_is_whole(data: Dataset) -> None:
    info = mounted(data)
    name = data.mountpoint / "cold.bin"
    with open(name, "rb", buffering=0) as first:
        first.seek(10_000_000)
        assert first.read(5) == COLD[10_000_000:10_000_005]
        for access in (mmap.ACCESS_READ, mmap.ACCESS_COPY):  # MAP_SHARED and MAP_PRIVATE
            with mmap.mmap(first.fileno(), 0, access=access) as view:
                assert view[16_999_990:] == COLD[16_999_990:]
        assert name.read_bytes() == COLD
        until(lambda: os.getxattr(name, "user.cachefs.cached") == b"1")
        # One way at a time: this is whole now, but open, perhaps mapped.
        with open(name, "rb") as second, mmap.mmap(second.fileno(), 0, access=mmap.ACCESS_READ) as view:
            until(lambda: opens(data) == (2, 0))
            assert view[:100] == COLD[:100]
    until(lambda: opens(data) == (0, 0))
    reads = counts(info)["READ"]
    with open(name, "rb") as third:
        assert opens(data) == (1, 1)
        assert third.read() == COLD
    assert counts(info)["READ"] == reads


def test_what_is_evicted_stays_readable_and_can_be_opened(data: Dataset) -> None:
    info = mounted(data)
    name = data.mountpoint / "large.bin"
    with open(name, "rb") as held, mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert data.store.unlink_ref(data.id, ref(data, "large.bin")) >= len(LARGE)
        assert os.getxattr(name, "user.cachefs.cached") == b"0"
        assert name.read_bytes() == LARGE
        assert opens(data)[1] == 1
        assert held.read() == LARGE
        assert view[4_000_000:4_000_100] == LARGE[4_000_000:4_000_100]
        data.store.put(LARGE, links=[(data.id, ref(data, "large.bin"))])  # and came back as another file
        assert name.read_bytes() == LARGE
    until(lambda: opens(data) == (0, 0))
    data.store.unlink_ref(data.id, ref(data, "large.bin"))
    assert name.read_bytes() == LARGE  # a miss
    assert counts(info)["misses"] > 0


@pytest.mark.parametrize("found_by", ["a check", "its time"])
def test_nobody_else_is_led_to_a_damaged_blob(data: Dataset, found_by: str) -> None:
    info = mounted(data)
    name = data.mountpoint / "large.bin"
    key = content_key(LARGE)
    blob = data.folder / "cache/blobs" / key.hex()[:2] / key.hex()
    with open(name, "rb", buffering=0) as held:
        sealed = blob.stat()
        with blob.open("r+b") as file:
            file.write(b"wrong")
        if found_by == "a check":
            os.utime(blob, ns=(sealed.st_mtime_ns, sealed.st_mtime_ns))  # as bits rot: behind the file system's back
            assert not data.store.check(key)
            data.store.drop(key)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                name.read_bytes()
            assert caught.value.errno == errno.EIO
        assert held.read(100)  # it stays readable for who has it
    until(lambda: opens(data) == (0, 0))
    assert name.read_bytes() == LARGE
    assert "turned out damaged" in Path(info.log).read_text()


# --- who may, and who may not ---------------------------------------------------------------------------------------


def test_open_free_is_chosen_for_small_files(data: Dataset) -> None:
    data.write({"another": b""})
    data.snapshot("b")
    info = start_mount(data.settings())  # auto
    assert (info.io, info.io_why) == ("open-free", "half of the files are not larger than 8 MiB")
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE


def test_passthrough_is_chosen_for_large_files(data: Dataset) -> None:
    for name in ("d/small.jpg", "empty"):
        (data.plain / name).unlink()
    data.snapshot("b")
    info = start_mount(data.settings())
    assert info.io_why == "half of the files are larger than 8 MiB" or info.io == "open-free"
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE
    assert counts(info).get("READ", 0) == 0 or info.io == "open-free"


def test_a_refusal_turns_it_off_for_good(data: Dataset) -> None:
    """After two files the kernel refuses (by a fault put in): both stay open, the rest goes on as in open-free mode."""
    keeper = data.keeper("--refuse-after", "3", io="passthrough")  # the first was to try it out
    (info,) = list_mounts()
    with open(data.mountpoint / "large.bin", "rb") as one, open(data.mountpoint / "d/small.jpg", "rb") as two:
        assert (data.mountpoint / "cold.bin").read_bytes() == COLD
        assert mount_status(info)["io"] == "passthrough"  # an incomplete object is no refusal
        assert (data.mountpoint / "empty").read_bytes() == b""
        status = mount_status(info)
        assert status["io"] == "open-free"
        assert "CAP_SYS_ADMIN" in status["io_why"]
        assert (data.mountpoint / "large.bin").read_bytes() == LARGE
        assert (one.read(), two.read()) == (LARGE, SMALL)
    until(lambda: opens(data) == (0, 0))
    for _ in range(3):
        assert (data.mountpoint / "large.bin").read_bytes() == LARGE
        with open(data.mountpoint / "cold.bin", "rb") as file:
            assert mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:] == COLD
    asked = counts(info)["OPEN"]
    (data.mountpoint / "d/small.jpg").read_bytes()
    assert counts(info)["OPEN"] == asked
    assert not left_in_the_kernel(info)
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_refused_from_the_start_it_is_open_free(data: Dataset) -> None:
    keeper = data.keeper("--refuse-after", "0", io="passthrough")
    (info,) = list_mounts()
    assert (info.io, info.io_why) == ("open-free", "no passthrough: the kernel lets only CAP_SYS_ADMIN do this")
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE
    assert counts(info)["OPEN"] == 1
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_without_resend_there_is_no_passthrough(data: Dataset) -> None:
    keeper = data.keeper("--no-resend", io="passthrough")
    (info,) = list_mounts()
    assert info.io == "open-free"
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_what_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert modes.choice("auto", 110_000).mode == "open-free"
    assert modes.choice("auto", 1 << 30).mode == "passthrough"
    assert modes.choice("passthrough", 1) == modes.Io("passthrough", "asked for")
    assert modes.choice("open-free", 1 << 30).mode == "open-free"
    assert modes.stack_depth([Path("/")]) in (1, 2)
    for number in (errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOMEM):
        assert passthrough.why_refused(OSError(number, os.strerror(number)))


# --- workers that are killed ----------------------------------------------------------------------------------------

OPENER = """
import json, mmap, os, random, select, sys
folder, plain = sys.argv[1], sys.argv[2]
names = ["large.bin", "d/small.jpg", "cold.bin"]
right = {name: open(os.path.join(plain, name), "rb").read() for name in names}
held, opened, wrong, failed = [], 0, 0, []
print("opening", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    name = random.choice(names)
    try:
        fd = os.open(os.path.join(folder, name), os.O_RDONLY)
        opened += 1
        at = random.randrange(len(right[name]))
        if random.random() < 0.3:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
                got = view[at : at + 5000]
        else:
            got = os.pread(fd, 5000, at)
        wrong += got != right[name][at : at + 5000]
        held.append(fd)
        if len(held) > 5:
            os.close(held.pop(random.randrange(len(held))))
    except OSError as error:
        failed.append(repr(error))
print(json.dumps([opened, wrong, failed[:5]]))
"""


def test_workers_are_killed_while_files_are_opened_and_closed(data: Dataset) -> None:
    """Some pass through, and what is not in the cache does not."""
    keeper = data.keeper(io="passthrough")
    (info,) = list_mounts()
    program = [sys.executable, "-c", OPENER, str(data.mountpoint), str(data.plain)]
    openers = [subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "opening\n"
    killed, end = 0, time.monotonic() + STORM
    while killed < 5 or time.monotonic() < end:
        assert all(opener.poll() is None for opener in openers)
        workers = mount_status(info)["workers"]
        if all(worker["answers"] for worker in workers):  # who is killed at birth has nothing in hand
            os.kill(workers[killed % len(workers)]["pid"], signal.SIGKILL)
            killed += 1
        time.sleep(random.uniform(0, 0.05))
    told = [opener.communicate(timeout=60)[0] for opener in openers]  # closes its stdin
    for opener, text in zip(openers, told, strict=True):
        assert opener.returncode == 0
        opened, wrong, failed = json.loads(text)
        assert (wrong, failed) == (0, [])
        assert opened > killed
    until(lambda: opens(data) == (0, 0))
    # Ids that who was killed could not write down, or not close, are found when the next worker begins, and by whoever
    # registers the next file.
    until(lambda: all(worker["answers"] for worker in mount_status(info)["workers"]))
    assert (data.mountpoint / "large.bin").read_bytes() == LARGE
    until(lambda: opens(data) == (0, 0))
    until(lambda: all(worker["answers"] for worker in mount_status(info)["workers"]))  # between two requests
    assert not left_in_the_kernel(info)
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def left_in_the_kernel(info: MountInfo) -> list[int]:
    """Backing ids that are registered; they are closed by this. Nothing else tells: the connection is asked itself.

    A last file is registered first: that is when ids are found which a worker had no time to write down.
    """
    device = descriptor_of(info.pid, "/dev/fuse")
    try:
        with open("/proc/self/exe", "rb") as file:
            last = passthrough.register(device, file.fileno())
        left = [id for id in range(1, last) if is_closed_now(device, id)]
        passthrough.unregister(device, last)
    finally:
        os.close(device)
    return left


def is_closed_now(device: int, id: int) -> bool:
    """Whether there was such an id to close."""
    with contextlib.suppress(FileNotFoundError):  # ENOENT
        fcntl.ioctl(device, passthrough._BACKING_CLOSE, id.to_bytes(4, sys.byteorder))
        return True
    return False


def descriptor_of(pid: int, name: str) -> int:
    """A copy of another process's descriptor (pidfd_getfd(2), number 438 everywhere)."""
    number = next(int(fd) for fd in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{fd}") == name)
    pidfd = os.pidfd_open(pid)
    try:
        fd = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, number, 0)
    finally:
        os.close(pidfd)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


# --- commands -------------------------------------------------------------------------------------------------------


def test_status_says_which_and_why(data: Dataset) -> None:
    info = mounted(data)
    command = [sys.executable, "-m", "cachefs_sidecar", "status", "--cache-dir", str(data.folder / "cache")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"{info.mountpoint}.*passthrough \(asked for\)", said)
    (mount,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)["mounts"]
    assert (mount["io"], mount["io_why"]) == ("passthrough", "asked for")

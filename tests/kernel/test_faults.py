"""What a reader notices of workers and keepers that die, and of an origin that hangs: nothing, or not for long."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.errors import MountError
from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import list_mounts, mount_status, restart_mount, start_mount, stop_mount
from cachefs_sidecar.registry import MountInfo
from tests.kernel.mounting import AT_ONCE, Dataset, until

pytestmark = pytest.mark.needs_fuse

IMAGES = {f"img{number:03d}.jpg": os.urandom(60_000 + 991 * number) for number in range(60)}
DIGESTS = {name: hashlib.md5(content).hexdigest() for name, content in IMAGES.items()}

# Two hundred reads that wait: more than there are workers, and than the kernel's default of 12 in flight.
WAITING = 200


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.write(IMAGES)
    dataset.write({f"hang/{number}": b"at last" for number in range(WAITING)}, cached=False)
    dataset.snapshot()
    yield dataset
    (tmp_path / "gate").touch()
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


# --- an origin that hangs -----------------------------------------------------------------------------------------


def test_reads_that_wait_for_the_origin_hold_up_nobody(data: Dataset) -> None:
    keeper = data.keeper()
    readers = [
        subprocess.Popen(["cat", *[str(data.mountpoint / f"hang/{n}") for n in range(start, WAITING, 10)]])
        for start in range(10)
    ]
    waited = [data.mountpoint / f"hang/{n}" for n in range(WAITING)]
    threads = [threading.Thread(target=file.read_bytes) for file in waited]
    for thread in threads:
        thread.start()
    (info,) = list_mounts()
    until(lambda: mount_status(info)["counts"]["waiting"] == WAITING)

    for name, content in IMAGES.items():
        assert (data.mountpoint / name).read_bytes() == content
    assert subprocess.run(["ls", "-lR", data.mountpoint], capture_output=True, check=True, timeout=AT_ONCE).stdout
    assert os.stat(data.mountpoint / "hang/0").st_size == 7
    assert os.getxattr(data.mountpoint / "hang/0", "user.cachefs.cached") == b"0"
    assert mount_status(info)["counts"]["waiting"] == WAITING

    # A reader that is killed ends at once, though its read has no answer.
    readers[0].kill()
    readers[0].wait(AT_ONCE)
    readers[1].terminate()
    readers[1].wait(AT_ONCE)

    (data.folder / "gate").touch()
    for reader in readers[2:]:
        assert reader.wait(60) == 0
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_a_killed_reader_in_a_single_read_ends(data: Dataset) -> None:
    """A page fault without reading ahead waits for its one page: the kernel interrupts it, whichever worker has it."""
    keeper = data.keeper(workers=4)
    program = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
        "m.madvise(mmap.MADV_RANDOM); print('there', flush=True); m[0]"
    )
    (info,) = list_mounts()
    for number in range(6):
        reader = subprocess.Popen(
            [sys.executable, "-c", program, str(data.mountpoint / f"hang/{number}")], stdout=subprocess.PIPE
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"there\n"
        until(lambda: mount_status(info)["counts"]["waiting"] == 1)
        reader.kill()
        reader.wait(AT_ONCE)  # its READ has no answer for longer
        reader.stdout.close()
        until(lambda: mount_status(info)["counts"]["waiting"] == 0)
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_a_signal_that_does_not_kill_does_not_end_a_read(data: Dataset) -> None:
    keeper = data.keeper()
    program = (
        "import mmap, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: None); f = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); m.madvise(mmap.MADV_RANDOM); print('there', flush=True); "
        "sys.exit(m[0] != ord('a'))"
    )
    (info,) = list_mounts()
    reader = subprocess.Popen([sys.executable, "-c", program, str(data.mountpoint / "hang/0")], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"there\n"
    until(lambda: mount_status(info)["counts"]["waiting"] == 1)
    for _ in range(3):
        reader.send_signal(signal.SIGUSR1)
    until(lambda: mount_status(info)["counts"].get("INTERRUPT"))
    assert mount_status(info)["counts"]["waiting"] == 1
    (data.folder / "gate").touch()
    assert reader.wait(60) == 0
    reader.stdout.close()
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


# --- processes that die -------------------------------------------------------------------------------------------


READER = """
import hashlib, json, os, random, select, sys, time
folder, least, names = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
good, failed, slowest, seen = 0, 0, 0.0, {}
print("reading", flush=True)
while good <= least or not select.select([sys.stdin], [], [], 0)[0]:
    name = random.choice(names)
    began = time.monotonic()
    try:
        with open(os.path.join(folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seen.setdefault(name, set()).add(hashlib.md5(file.read()).hexdigest())
            good += 1
    except OSError:
        failed += 1
    slowest = max(slowest, time.monotonic() - began)
print(json.dumps([good, failed, slowest, {name: list(digests) for name, digests in seen.items()}]))
"""


def read_under(data: Dataset, seconds: float, kill: Callable[[], int], *, kills: int, least: int) -> tuple[int, float]:
    """Two readers while `kill`, which says how many there were, is called again and again: (failed reads, slowest).

    For some seconds, and on a slow machine until there were so many; each reader has more than `least` good reads.
    """
    command = [sys.executable, "-c", READER, str(data.mountpoint), str(least), json.dumps(sorted(IMAGES))]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
    end = time.monotonic() + seconds
    while kill() < kills or time.monotonic() < end:
        assert all(reader.poll() is None for reader in readers)
    failed, slowest = 0, 0.0
    for reader in readers:
        out, _ = reader.communicate(timeout=60)  # closes its stdin
        assert reader.returncode == 0
        good, bad, slow, seen = json.loads(out)
        assert good > least
        assert seen == {name: [DIGESTS[name]] for name in seen}
        failed, slowest = failed + bad, max(slowest, slow)
    return failed, slowest


def kill_a_worker(info: MountInfo, victims: list[int]) -> int:
    """How many are victims by now."""
    for worker in mount_status(info)["workers"]:
        if worker["pid"] and worker["pid"] not in victims:
            victims.append(worker["pid"])
            os.kill(worker["pid"], signal.SIGKILL)
            until(lambda: worker["pid"] not in [w["pid"] for w in mount_status(info)["workers"]])  # noqa: B023
            break
    time.sleep(0.05)  # some load between one death and the next
    return len(victims)


def test_readers_do_not_notice_workers_that_are_killed(data: Dataset) -> None:
    info = start_mount(data.settings(workers=2))
    if "cannot deliver requests again" in Path(info.log).read_text():
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")
    victims: list[int] = []
    failed, slowest = read_under(data, 3.0, lambda: kill_a_worker(info, victims), kills=5, least=50)
    assert failed == 0
    assert slowest < 30  # it ends at all; some milliseconds are usual
    assert sum(worker["restarts"] for worker in mount_status(info)["workers"]) == len(victims)


def test_without_resend_no_reader_hangs(data: Dataset) -> None:
    keeper = data.keeper("--no-resend")
    (info,) = list_mounts()
    victims: list[int] = []
    _, slowest = read_under(data, 2.0, lambda: kill_a_worker(info, victims), kills=1, least=25)
    assert slowest < 30
    for name, content in IMAGES.items():
        assert (data.mountpoint / name).read_bytes() == content
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_without_resend_an_open_file_outlives_every_worker(data: Dataset) -> None:
    """What mounting anew would not do: see ARCHITECTURE, choices."""
    keeper = data.keeper("--no-resend")
    (info,) = list_mounts()
    victims: list[int] = []
    with open(data.mountpoint / "img007.jpg", "rb", buffering=0) as held:
        for _ in range(4):
            kill_a_worker(info, victims)
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            held.seek(0)
            assert held.read() == IMAGES["img007.jpg"]
    assert len(victims) == 4
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_without_resend_on_a_shared_queue_it_is_mounted_anew(data: Dataset) -> None:
    """Nothing else ends what a dead worker had read: its descriptor is one of several with the same queue."""
    keeper = data.keeper("--no-resend", "--no-clone")
    (info,) = list_mounts()
    waiting = subprocess.Popen(
        ["cat", str(data.mountpoint / "hang/0")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: mount_status(info)["counts"]["waiting"] == 1)
    for worker in mount_status(info)["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)
    assert waiting.wait(AT_ONCE) == 1  # it fails, and does not hang
    until(lambda: bool(list_mounts()) and list_mounts()[0].started != info.started)
    for name, content in IMAGES.items():
        assert (data.mountpoint / name).read_bytes() == content
    with pytest.raises(MountError, match="cannot be handed over"):
        restart_mount(list_mounts()[0])
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_with_resend_a_shared_queue_is_no_matter(data: Dataset) -> None:
    keeper = data.keeper("--no-clone")
    (info,) = list_mounts()
    victims: list[int] = []
    failed, _ = read_under(data, 1.5, lambda: kill_a_worker(info, victims), kills=1, least=10)
    assert failed == 0
    restart_mount(info)
    for name, content in IMAGES.items():
        assert (data.mountpoint / name).read_bytes() == content
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_a_mount_outlives_its_keeper(data: Dataset) -> None:
    info = start_mount(data.settings())
    os.kill(info.pid, signal.SIGKILL)
    until(lambda: not info.alive)
    for name, content in IMAGES.items():
        assert (data.mountpoint / name).read_bytes() == content
    assert [m.mountpoint for m in list_mounts()] == [str(data.mountpoint)]
    stop_mount(data.mountpoint)
    assert list_mounts() == []
    assert list((data.folder / "runtime/mounts").glob("*.json")) == []


def test_a_worker_that_cannot_live_does_not_spin(data: Dataset) -> None:
    """Its catalog is damaged under it: the next worker is started later and later, and the log says why."""
    info = start_mount(data.settings(workers=1))
    assert data.catalog is not None
    good = data.catalog.read_bytes()
    data.catalog.write_bytes(b"?" * len(good))
    os.kill(mount_status(info)["workers"][0]["pid"], signal.SIGKILL)
    until(lambda: mount_status(info)["workers"][0]["restarts"] >= 3)
    began, first = time.monotonic(), mount_status(info)["workers"][0]["restarts"]
    assert "CatalogError" in Path(info.log).read_text()
    data.catalog.write_bytes(good)
    assert (data.mountpoint / "img000.jpg").read_bytes() == IMAGES["img000.jpg"]
    spent = time.monotonic() - began
    assert mount_status(info)["workers"][0]["restarts"] - first <= 2 + spent / 0.1

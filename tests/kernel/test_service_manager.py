"""A mount whose descriptors a service manager keeps: it outlives every process of its own."""

from __future__ import annotations

import os
import signal
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.mountinfo import mounted_at
from cachefs_sidecar import mounts, registry, rescue
from cachefs_sidecar.control import list_mounts, mount_status, restart_mount
from cachefs_sidecar.registry import MountInfo
from cachefs_sidecar.testbed import stop_fetcher
from cachefs_sidecar.testbed.storm import Readers
from tests.command_line import script
from tests.kernel.mounting import drop_pages, until
from tests.kernel.service_manager import ServiceManager

pytestmark = pytest.mark.needs_fuse

FILES = {f"{number:02d}.jpg": os.urandom(50_000 + number) for number in range(30)}

CACHEFS = str(Path(sysconfig.get_path("scripts")) / "cachefs")


class Unit:
    def __init__(self, folder: Path) -> None:
        self.plain, self.mountpoint, self.home = folder / "plain", folder / "mnt", folder / "cache"
        for made in (self.plain, self.mountpoint):
            made.mkdir()
        for name, content in FILES.items():
            (self.plain / name).write_bytes(content)
        command = [CACHEFS, "mount", "-f", str(self.plain), str(self.mountpoint), "-d", str(self.home)]
        self.manager = ServiceManager(folder, command, os.environ)

    @property
    def info(self) -> MountInfo:
        (info,) = list_mounts()
        return info

    def processes(self) -> list[int]:
        return [self.info.pid, *(worker["pid"] for worker in mount_status(self.info)["workers"])]

    def kill_everything(self) -> None:
        pids = self.processes()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.manager.reap()
        until(lambda: not any(registry.start_ticks(pid) for pid in pids))

    def check(self) -> None:
        for name, content in FILES.items():
            drop_pages(self.mountpoint / name)
            assert (self.mountpoint / name).read_bytes() == content
        assert sum(map(len, self.manager.store.values())) == self.info.workers


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("CACHEFS_MIN_FREE", "0")
    monkeypatch.setenv("CACHEFS_IDLE", "1")
    made = Unit(tmp_path)
    try:
        made.manager.start()
        yield made
    finally:
        present = mounted_at(made.mountpoint)
        if present is not None:
            mounts.unmount(made.mountpoint, lazy=True)  # asks nobody: a test that failed may have left nobody
        made.manager.close()
        if present is not None:
            rescue.end([worker.pid for worker in rescue.workers_of(present.device)])
        stop_fetcher(made.home)


def test_it_is_ready_when_it_can_be_read_and_its_descriptors_are_kept(unit: Unit) -> None:
    unit.check()
    (name,) = unit.manager.store
    assert name == f"fuse-{unit.info.pid}"
    assert "FDPOLL=0" in unit.manager.told


def test_every_process_is_killed_and_readers_notice_nothing(unit: Unit) -> None:
    device = unit.info.device
    with Readers(unit.mountpoint, unit.plain, 2) as readers:
        for _ in range(2):
            time.sleep(0.2)
            unit.kill_everything()
            time.sleep(0.1)  # the readers wait, and fail not
            unit.manager.start()
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    assert tally.reads > 20
    assert unit.info.device == device
    unit.check()


def test_a_mount_that_nobody_serves_holds_up_only_its_readers(unit: Unit) -> None:
    unit.kill_everything()
    waiting = threading.Thread(target=(unit.mountpoint / "00.jpg").read_bytes)
    waiting.start()
    assert script("status").code == 0
    assert waiting.is_alive()
    unit.manager.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_restart_of_the_unit_goes_on_with_the_mount(unit: Unit) -> None:
    device = unit.info.device
    held = os.open(unit.mountpoint / "01.jpg", os.O_RDONLY)
    with Readers(unit.mountpoint, unit.plain, 2) as readers:
        for _ in range(2):
            unit.manager.terminate()
            assert mounts.is_device(unit.mountpoint, device)
            unit.manager.start()
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    drop_pages(unit.mountpoint / "01.jpg")
    assert os.read(held, 1 << 20) == FILES["01.jpg"]
    os.close(held)
    unit.check()


def test_a_refreshed_mount_goes_on_with_what_it_served(unit: Unit) -> None:
    (unit.plain / "new.jpg").write_bytes(b"new")
    script("refresh", unit.mountpoint).ok()
    served = unit.info.catalogs
    assert len(served) == 2
    unit.kill_everything()
    unit.manager.start()
    assert unit.info.catalogs == served
    assert (unit.mountpoint / "new.jpg").read_bytes() == b"new"


def test_a_keeper_that_is_killed_alone_is_followed_and_its_workers_end(unit: Unit) -> None:
    keeper, *workers = unit.processes()
    os.kill(keeper, signal.SIGKILL)
    unit.manager.reap()
    assert (unit.mountpoint / "00.jpg").read_bytes() == FILES["00.jpg"]
    unit.manager.start()
    assert not any(registry.start_ticks(pid) for pid in workers)
    unit.check()


def test_stopped_it_is_unmounted_and_nothing_is_kept(unit: Unit) -> None:
    script("umount", "--lazy", unit.mountpoint).ok()  # ExecStop=
    unit.manager.reap()
    until(lambda: not unit.manager.store)
    assert list_mounts() == []
    unit.manager.start()
    unit.check()


def test_cachefs_restart_makes_another_process_the_unit(unit: Unit) -> None:
    first = unit.info.pid
    info = restart_mount(unit.info)
    until(lambda: not registry.start_ticks(first))
    assert unit.manager.main == info.pid != first
    assert list(unit.manager.store) == [f"fuse-{info.pid}"]
    unit.check()
    os.kill(info.pid, signal.SIGKILL)
    until(lambda: not info.alive)
    unit.manager.start()
    unit.check()
    restart_mount(unit.info)
    unit.manager.terminate()
    unit.manager.start()
    unit.check()


def test_what_was_kept_of_a_mount_that_is_gone_is_let_go(unit: Unit) -> None:
    unit.kill_everything()
    mounts.unmount(unit.mountpoint, lazy=True)
    unit.manager.start()
    unit.check()


def test_without_a_record_it_is_mounted_anew(unit: Unit) -> None:
    unit.kill_everything()
    registry.record_file(unit.mountpoint).unlink()
    unit.manager.start()
    unit.check()

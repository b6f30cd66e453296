"""Other processes for a live mount: `cachefs restart`, an heir that comes to nothing, a keeper that was killed."""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.client.session import Session
from cachefs.errors import MountError
from cachefs.mountinfo import mounted_at
from cachefs_sidecar import mounts, registry
from cachefs_sidecar.control import (
    list_mounts,
    mount_status,
    refresh_mount,
    restart_mount,
    start_mount,
    stop_mount,
)
from cachefs_sidecar.fuse.opens import Opens
from cachefs_sidecar.launching import Installation, this_installation
from cachefs_sidecar.registry import MountInfo
from cachefs_sidecar.testbed import fetcher_pid, stop_fetcher
from cachefs_sidecar.testbed.storm import Readers
from tests.command_line import script
from tests.kernel.bad_heir import installation
from tests.kernel.mounting import AT_ONCE, Dataset, drop_pages, until

pytestmark = pytest.mark.needs_fuse

IMAGES = {f"img{number:02d}.jpg": os.urandom(60_000 + 991 * number) for number in range(30)}
MISSES = {f"far/{number:02d}.jpg": os.urandom(70_000) for number in range(30)}

CACHEFS = str(Path(sysconfig.get_path("scripts")) / "cachefs")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    # While a mount changes hands nobody is connected to its fetcher, and on a slow machine that takes a while.
    dataset.config = dataclasses.replace(dataset.config, idle=100)
    dataset.write(IMAGES)
    dataset.write(MISSES, cached=False)
    dataset.snapshot()
    yield dataset
    (tmp_path / "gate").touch()
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)
    stop_fetcher(dataset.config.home)


def workers(info: MountInfo) -> list[int]:
    return [worker["pid"] for worker in mount_status(info)["workers"]]


def read_all(data: Dataset) -> None:
    for name, content in {**IMAGES, **MISSES}.items():
        if not name.endswith("0.jpg"):  # one in ten from the kernel's memory
            drop_pages(data.mountpoint / name)
        assert (data.mountpoint / name).read_bytes() == content


def serving(info: MountInfo) -> set[int]:
    """The processes that belong to the mount: by the memory file that its keeper left in them."""
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if f"/memfd:cachefs-{info.device} (deleted)" in links:
            found.add(pid)
    return found


# --- everything is new ---------------------------------------------------------------------------------------------


def test_open_files_and_the_mount_stay_and_every_process_is_another(data: Dataset) -> None:
    info = start_mount(data.settings())
    before = mounted_at(data.mountpoint)
    old = {info.pid, *workers(info)}
    read_all(data)
    fetcher = fetcher_pid(data.config.home)
    held = os.open(data.mountpoint / "img01.jpg", os.O_RDONLY)
    os.read(held, 1000)
    reads = mount_status(info)["counts"]["READ"]

    done = script("restart", data.mountpoint, "--json").ok().json

    (new,) = list_mounts()
    assert done["mounts"] == [{"mountpoint": str(data.mountpoint), "pid": new.pid, "workers": new.workers}]
    assert done["fetchers"] == [{"cache": str(data.config.home), "pid": fetcher}]
    assert mounted_at(data.mountpoint) == before
    until(lambda: not any(registry.start_ticks(pid) for pid in old))
    assert not old & {new.pid, *workers(new)}
    assert fetcher_pid(data.config.home) != fetcher
    assert (new.started, new.origin, new.catalogs, new.log) == (info.started, info.origin, info.catalogs, info.log)
    assert mount_status(info)["pid"] == new.pid  # asked by an old record
    assert mount_status(new)["counts"]["READ"] >= reads
    drop_pages(data.mountpoint / "img01.jpg")
    assert os.read(held, 1 << 20) == IMAGES["img01.jpg"][1000:]
    os.close(held)
    read_all(data)
    assert len(list((data.folder / "runtime/mounts").glob("*.sock"))) == 1

    os.kill(workers(new)[0], signal.SIGKILL)  # it is looked after
    until(lambda: mount_status(new)["workers"][0]["restarts"] == 1)
    stop_mount(data.mountpoint)
    assert list_mounts() == []


@pytest.mark.needs_root
def test_what_is_open_in_passthrough_stays_open_and_is_closed_by_the_next(data: Dataset) -> None:
    info = start_mount(data.settings(io="passthrough"))
    if info.io != "passthrough":
        stop_mount(data.mountpoint)
        pytest.skip(info.io_why)
    table = Path(info.opens)
    held = os.open(data.mountpoint / "img01.jpg", os.O_RDONLY)
    with open(data.mountpoint / "img02.jpg", "rb", buffering=0) as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    new = restart_mount(info)
    assert (new.io, new.opens) == (info.io, info.opens)
    again = os.open(data.mountpoint / "img01.jpg", os.O_RDONLY)  # by the same backing file, or it would be EIO
    for fd in (held, again):
        assert os.pread(fd, 1 << 20, 0) == IMAGES["img01.jpg"]
        os.close(fd)
    assert mapped[:] == IMAGES["img02.jpg"]
    mapped.close()
    read_all(data)
    opens = Opens(table)
    until(lambda: opens.count() == 0)
    opens.close()
    stop_mount(data.mountpoint)
    assert not list(table.parent.glob("*.opens*"))


def test_the_fetcher_can_be_kept(data: Dataset) -> None:
    start_mount(data.settings())
    (data.mountpoint / "far/01.jpg").read_bytes()
    fetcher = fetcher_pid(data.config.home)
    assert fetcher is not None
    script("restart", "--all", "--keep-fetcher").ok()
    assert (data.mountpoint / "far/02.jpg").read_bytes() == MISSES["far/02.jpg"]
    assert fetcher_pid(data.config.home) == fetcher


def test_reads_that_wait_are_answered_by_the_next(data: Dataset) -> None:
    """They wait in workers that have other rooms than the heir's; those answer all."""
    data.write({f"hang/{number}": b"at last" for number in range(50)}, cached=False)
    data.snapshot("b")
    keeper = data.keeper()
    threads = [threading.Thread(target=(data.mountpoint / f"hang/{n}").read_bytes) for n in range(50)]
    for thread in threads:
        thread.start()
    (info,) = list_mounts()
    until(lambda: mount_status(info)["counts"]["waiting"] == 50)
    restart_mount(info)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_a_refresh_is_kept_and_the_next_one_works(data: Dataset) -> None:
    info = start_mount(data.settings())
    data.write({"new.jpg": b"new"})
    refresh_mount(info, data.snapshot("b"))
    info = restart_mount(info)
    assert len(info.catalogs) == 2
    assert (data.mountpoint / "new.jpg").read_bytes() == b"new"
    data.write({"newer.jpg": b"newer"})
    third = data.snapshot("c")
    both = [threading.Thread(target=act) for act in (lambda: restart_mount(info), lambda: refresh_mount(info, third))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
        assert not thread.is_alive()
    assert (data.mountpoint / "newer.jpg").read_bytes() == b"newer"
    assert mount_status(info)["catalog"] == str(third)


def test_secrets_are_in_no_file_argument_or_environment(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "correct-horse")
    session = Session("file", {"key": "battery-staple"}, {"AWS_SESSION_TOKEN": "horse-staple"}, root=data.root)
    info = restart_mount(start_mount(data.settings(session=session)))
    pids = (info.pid, *workers(info))
    seen = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ")]
    seen += [file.read_bytes() for file in (data.folder / "runtime").rglob("*") if file.is_file()]
    seen.append(Path(info.log).read_bytes())
    for secret in (b"correct-horse", b"battery-staple", b"horse-staple"):
        assert not any(secret in text for text in seen)


def test_without_resend_whoever_has_a_request_answers_it(data: Dataset) -> None:
    keeper = data.keeper("--no-resend")
    (info,) = list_mounts()
    with Readers(data.mountpoint, data.plain, 2) as readers:
        for _ in range(4):
            info = restart_mount(info)
            time.sleep(0.1)
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    stop_mount(data.mountpoint)
    assert keeper.wait(60) == 0


def test_in_the_foreground_the_process_stays_and_passes_signals_on(data: Dataset, monkeypatch) -> None:
    monkeypatch.setenv("CACHEFS_MIN_FREE", "0")
    mounted = subprocess.Popen(
        [CACHEFS, "mount", "-f", str(data.plain), str(data.mountpoint), "-d", str(data.config.home)],
        stdout=subprocess.PIPE,
    )
    assert mounted.stdout is not None
    assert str(data.mountpoint).encode() in mounted.stdout.readline()
    with registry.starting(AT_ONCE):
        pass  # others can be mounted while it is
    pids = {mounted.pid}
    for _ in range(2):
        (info,) = list_mounts()
        pids.add(restart_mount(info).pid)
    assert len(pids) == 3
    assert mounted.poll() is None
    read_all(data)
    mounted.terminate()
    assert mounted.wait(60) == 0
    mounted.stdout.close()
    assert mounted_at(data.mountpoint) is None
    until(lambda: list_mounts() == [])


# --- an heir that comes to nothing ------------------------------------------------------------------------------------


def test_an_interpreter_that_is_missing_or_broken_changes_nothing(data: Dataset) -> None:
    info = start_mount(data.settings(workers=1))
    ours = this_installation()
    for bad in (
        Installation("/nowhere/python", ours.path),
        Installation(sys.executable, "/nowhere"),
        Installation("/bin/true", ""),
    ):
        broken = bad if bad.python != sys.executable else Installation(str(bare(data)), bad.path)
        with pytest.raises(MountError):
            restart_mount(info, broken)
        assert info.alive
        read_all(data)
    restart_mount(info)


def bare(data: Dataset) -> Path:
    """A Python that finds no installation of ours."""
    file = data.folder / "bare-python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("when", ["start", "ready", "serving", "done"])
def test_an_heir_that_dies_leaves_everything_as_it_was(data: Dataset, when: str) -> None:
    info = start_mount(data.settings(workers=2))
    with Readers(data.mountpoint, data.plain, 2) as readers:
        with pytest.raises(MountError, match="SIGKILL"):
            restart_mount(info, installation(data.folder, "die", when))
        time.sleep(0.1)
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    (again,) = list_mounts()
    assert again == info
    assert again.alive
    until(lambda: serving(info) == {info.pid, *workers(info)})
    assert all(worker["answers"] for worker in mount_status(info)["workers"])
    assert len(list((data.folder / "runtime/mounts").glob("*.sock"))) == 1
    read_all(data)
    restart_mount(info)  # and a good one follows


@pytest.mark.parametrize("when", ["ready", "done"])
def test_an_heir_that_hangs_is_given_up(data: Dataset, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hasty(data)), this_installation().path]))
    info = start_mount(data.settings(workers=1))
    with pytest.raises(MountError, match="does not answer"):
        restart_mount(info, installation(data.folder, "hang", when))
    read_all(data)
    assert info.alive


def hasty(data: Dataset) -> Path:
    """A folder to import from that makes keepers patient for seconds only."""
    folder = data.folder / "hasty"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--announce' in sys.orig_argv:\n"
        "    from cachefs_sidecar import succession\n"
        "    succession.READY_SECONDS = succession.STEP_SECONDS = 2.0\n"
    )
    return folder


@pytest.mark.parametrize("when", ["start", "serving"])
def test_an_heir_that_babbles_is_ended(data: Dataset, when: str) -> None:
    info = start_mount(data.settings(workers=1))
    with pytest.raises(MountError, match="does not keep to the protocol"):
        restart_mount(info, installation(data.folder, "babble", when))
    assert info.alive
    read_all(data)


def test_another_format_is_refused(data: Dataset) -> None:
    info = start_mount(data.settings(workers=1))
    with pytest.raises(MountError, match="hands over in format 1, and this version of cachefs takes 2"):
        restart_mount(info, installation(data.folder, "future", "start"))
    assert info.alive
    read_all(data)


def test_the_command_says_so_with_exit_code_1(data: Dataset) -> None:
    info = start_mount(data.settings(workers=1))
    assert data.catalog is not None
    good = data.catalog.read_bytes()
    data.catalog.write_bytes(b"?" * len(good))  # no worker of the heir can open it
    script("restart", data.mountpoint).failed(1, "came to nothing")
    data.catalog.write_bytes(good)
    assert info.alive
    read_all(data)


# --- a keeper that is killed ------------------------------------------------------------------------------------------


def test_a_mount_without_its_keeper_gets_another(data: Dataset) -> None:
    info = start_mount(data.settings(workers=2))
    with Readers(data.mountpoint, data.plain, 2) as readers:
        os.kill(info.pid, signal.SIGKILL)
        until(lambda: not info.alive)
        time.sleep(0.1)
        script("restart", data.mountpoint).ok()
        time.sleep(0.1)
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    (new,) = list_mounts()
    assert new.alive
    assert len(workers(new)) == 2
    os.kill(workers(new)[0], signal.SIGKILL)
    until(lambda: mount_status(new)["workers"][0]["restarts"] == 1)
    read_all(data)


@pytest.mark.parametrize("when", ["serving", "done"])
def test_a_keeper_that_dies_while_it_hands_over_is_followed(data: Dataset, when: str) -> None:
    info = start_mount(data.settings(workers=2))
    with Readers(data.mountpoint, data.plain, 2) as readers:
        with pytest.raises(MountError, match="ended while it was asked"):
            restart_mount(info, installation(data.folder, "orphan", when))
        until(lambda: bool(list_mounts()) and list_mounts()[0].alive)
        tally = readers.end()
    assert (tally.failed, tally.wrong) == ({}, [])
    (new,) = list_mounts()
    assert new.pid != info.pid
    until(lambda: serving(new) == {new.pid, *workers(new)})
    read_all(data)


def test_a_keeper_that_dies_before_it_hands_over_leaves_its_workers(data: Dataset) -> None:
    info = start_mount(data.settings(workers=2))
    with pytest.raises(MountError):
        restart_mount(info, installation(data.folder, "orphan", "ready"))
    read_all(data)
    script("restart", data.mountpoint).ok()
    read_all(data)


def test_a_mount_with_nobody_left_is_said_to_be(data: Dataset) -> None:
    info = start_mount(data.settings(workers=1))
    for pid in (info.pid, *workers(info)):
        os.kill(pid, signal.SIGKILL)
    until(lambda: mounts.is_dead(data.mountpoint) and not info.alive)
    script("restart", data.mountpoint).failed(1, "unmount it and mount it again")
    stop_mount(data.mountpoint)

"""The mount as its users meet it: real mounts of this kernel."""

from __future__ import annotations

import errno
import filecmp
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefs.client.session import Session
from cachefs.errors import CatalogError, ConfigError, MountError
from cachefs.mountinfo import mounted_at
from cachefs_sidecar import mounts
from cachefs_sidecar.control import (
    list_mounts,
    mount_status,
    refresh_mount,
    start_mount,
    stop_mount,
)
from tests.kernel.mounting import Dataset, drop_pages, until

pytestmark = pytest.mark.needs_fuse

FILES = {
    "a.jpg": os.urandom(110_000),
    "empty": b"",
    "train/n01/x.jpg": os.urandom(4096),
    "train/n01/y.jpg": os.urandom(160_001),
    "train/n02/deep/er/z.bin": os.urandom(3_000_000),
    "odd/new\nline": b"1",
    "odd/ spaces ": b"2",
    "odd/e\u0301 and \u00e9": b"3",
    "odd/" + "long" * 63 + "255": b"4",
    "odd/-rf": b"5",
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    dataset.write(FILES)
    dataset.snapshot()
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def counts(data: Dataset) -> dict[str, int]:
    (info,) = list_mounts()
    return dict(mount_status(info)["counts"])


# --- reading ----------------------------------------------------------------------------------------------------


def test_the_tree_is_the_plain_tree(data: Dataset) -> None:
    start_mount(data.settings())
    assert subprocess.run(["diff", "-r", data.plain, data.mountpoint], check=False).returncode == 0
    for command in (
        "find . | sort | md5sum",
        "tar cf - --sort=name --mtime=@0 --owner=0 --group=0 --mode=0 . | md5sum",
    ):
        assert shell(command, data.plain) == shell(command, data.mountpoint)
    # Sizes, times and the space that each takes, as `ls -l` shows them.
    listing = "find . -type f -printf '%P %s %T@ %k\\n' | sort"
    assert shell(listing, data.plain) == shell(listing, data.mountpoint)
    assert shell("find . -type d -empty -o -size +100k | sort", data.plain) == shell(
        "find . -type d -empty -o -size +100k | sort", data.mountpoint
    )


def shell(command: str, folder: Path) -> str:
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_hot_read_never_reaches_the_workers(data: Dataset) -> None:
    start_mount(data.settings())
    file = data.mountpoint / "train/n01/y.jpg"

    def read() -> bytes:
        fd = os.open(file, os.O_RDONLY)
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)

    assert read() == FILES["train/n01/y.jpg"]
    assert not (data.mountpoint / "nothing").exists()
    os.listdir(data.mountpoint / "odd")
    before = counts(data)
    for _ in range(100):
        assert read() == FILES["train/n01/y.jpg"]
        assert not (data.mountpoint / "nothing").exists()
        assert len(os.listdir(data.mountpoint / "odd")) == 5
    assert counts(data) == before


def test_parts_maps_and_seeks(data: Dataset) -> None:
    start_mount(data.settings())
    content = FILES["train/n02/deep/er/z.bin"]
    with open(data.mountpoint / "train/n02/deep/er/z.bin", "rb") as file:
        file.seek(2_999_990)
        assert file.read() == content[2_999_990:]
        file.seek(1_234_567)
        assert file.read(100_000) == content[1_234_567:1_334_567]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert view[777_777:888_888] == content[777_777:888_888]
        assert os.lseek(file.fileno(), 0, os.SEEK_END) == len(content)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: (m / "new").write_bytes(b"x"),
        lambda m: os.open(m / "a.jpg", os.O_RDWR),
        lambda m: (m / "new").mkdir(),
        lambda m: (m / "a.jpg").unlink(),
        lambda m: (m / "train").rmdir(),
        lambda m: (m / "a.jpg").rename(m / "b.jpg"),
        lambda m: (m / "a.jpg").chmod(0o600),
        lambda m: os.truncate(m / "a.jpg", 0),
        lambda m: os.utime(m / "a.jpg"),
        lambda m: (m / "link").symlink_to("a.jpg"),
        lambda m: os.link(m / "a.jpg", m / "hard"),
        lambda m: os.setxattr(m / "a.jpg", "user.x", b"1"),
        lambda m: os.mkfifo(m / "fifo"),
    ],
)
def test_nothing_can_be_changed(data: Dataset, attempt: Callable[[Path], object]) -> None:
    start_mount(data.settings(workers=1))
    with pytest.raises(OSError) as caught:
        attempt(data.mountpoint)
    assert caught.value.errno == errno.EROFS


def test_attributes(data: Dataset) -> None:
    start_mount(data.settings(uid=1234, gid=567))
    info = os.stat(data.mountpoint / "a.jpg")
    assert (info.st_mode, info.st_uid, info.st_gid, info.st_nlink) == (0o100444, 1234, 567, 1)
    assert os.stat(data.mountpoint / "train").st_mode == 0o040555
    space = os.statvfs(data.mountpoint)
    assert space.f_blocks * space.f_frsize >= sum(map(len, FILES.values()))
    assert (space.f_bfree, space.f_namemax) == (0, 255)
    assert os.getxattr(data.mountpoint / "a.jpg", "user.cachefs.cached") == b"1"
    assert "user.cachefs.version" in os.listxattr(data.mountpoint / "a.jpg")


def test_a_miss_comes_through_the_fetcher(data: Dataset) -> None:
    """The real fetcher, started on demand, from a file:// origin."""
    data.write({"cold/small.jpg": os.urandom(110_000), "cold/large.bin": os.urandom(20_000_000)}, cached=False)
    data.snapshot()
    info = start_mount(data.settings())
    assert filecmp.cmp(data.plain / "cold/small.jpg", data.mountpoint / "cold/small.jpg", shallow=False)
    with open(data.mountpoint / "cold/large.bin", "rb") as large, open(data.plain / "cold/large.bin", "rb") as plain:
        for offset in (17_000_000, 0, 8_388_600):
            large.seek(offset)
            plain.seek(offset)
            assert large.read(65536) == plain.read(65536)
    assert mount_status(info)["counts"]["misses"] >= 2
    (data.plain / "a.jpg").unlink()  # cached: needs no origin
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]


def test_an_object_that_was_replaced_is_stale(data: Dataset) -> None:
    data.write({"cold.jpg": b"as listed"}, cached=False)
    data.snapshot()
    info = start_mount(data.settings())
    (data.plain / "cold.jpg").write_bytes(b"replaced!")
    with pytest.raises(OSError) as caught:
        (data.mountpoint / "cold.jpg").read_bytes()
    assert caught.value.errno == errno.ESTALE
    assert "cold.jpg" in Path(info.log).read_text()


# --- refresh ----------------------------------------------------------------------------------------------------


def test_refresh_changes_names_and_bytes_at_once(data: Dataset) -> None:
    info = start_mount(data.settings())
    mnt = data.mountpoint
    kept = os.stat(mnt / "train/n01/x.jpg")
    with open(mnt / "a.jpg", "rb", buffering=0) as old:
        assert old.read(1000) == FILES["a.jpg"][:1000]
        assert not (mnt / "new/file").exists()
        assert "added" not in os.listdir(mnt / "train")
        assert (mnt / "train/n01/y.jpg").read_bytes() == FILES["train/n01/y.jpg"]
        before = os.stat(mnt / "a.jpg")

        data.write({"a.jpg": b"another", "new/file": b"here", "train/added": b"too"})
        (data.plain / "train/n01/y.jpg").unlink()
        shutil.rmtree(data.plain / "train/n02")
        assert refresh_mount(info, data.snapshot("b")) >= 4

        assert (mnt / "a.jpg").read_bytes() == b"another"
        assert os.stat(mnt / "a.jpg").st_ino != before.st_ino
        assert (mnt / "new/file").read_bytes() == b"here"
        assert sorted(os.listdir(mnt / "train")) == ["added", "n01"]
        assert not (mnt / "train/n01/y.jpg").exists()
        assert subprocess.run(["diff", "-r", data.plain, mnt], check=False).returncode == 0
        assert os.stat(mnt / "train/n01/x.jpg").st_ino == kept.st_ino
        drop_pages(Path(f"/proc/self/fd/{old.fileno()}"))
        old.seek(0)
        assert old.read() == FILES["a.jpg"]  # an open file goes on as it was
    assert mount_status(info)["catalog"] == str(data.catalog)
    (again,) = list_mounts()
    assert again.catalog == str(data.catalog)


def test_a_damaged_catalog_changes_nothing(data: Dataset, tmp_path: Path) -> None:
    info = start_mount(data.settings())
    bad = tmp_path / "bad.sqlite"
    bad.write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(CatalogError):
        refresh_mount(info, bad)
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]
    assert refresh_mount(info, data.snapshot("b")) == 0


# --- mount points -----------------------------------------------------------------------------------------------


def test_mount_points_that_cannot_be_used(data: Dataset, tmp_path: Path) -> None:
    def refused(mountpoint: Path, says: str) -> None:
        with pytest.raises(MountError, match=says):
            start_mount(data.settings(mountpoint=mountpoint))

    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    (tmp_path / "file").touch()
    refused(tmp_path / "missing", "does not exist")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "full", "is not empty .'thing'")
    refused(Path("/proc"), "is already a mount of proc")
    start_mount(data.settings())
    refused(data.mountpoint, f"already a mount of file://{data.plain} .fuse.cachefs.; `cachefs umount`")
    assert len(list_mounts()) == 1


def test_a_damaged_catalog_is_said_and_nothing_is_mounted(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"?" * 5000)
    with pytest.raises(CatalogError):
        start_mount(data.settings(catalog=tmp_path / "bad"))
    assert mounted_at(data.mountpoint) is None
    settings = data.settings(session=Session("file", {"x": object()}, {}))
    with pytest.raises(ConfigError, match="cannot be passed"):
        start_mount(settings)


def test_odd_mount_points(data: Dataset, tmp_path: Path) -> None:
    odd = tmp_path / "with space\tand\\back,comma \u00e9"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    info = start_mount(data.settings(mountpoint=tmp_path / "link"))
    assert info.mountpoint == str(odd)
    assert (odd / "a.jpg").read_bytes() == FILES["a.jpg"]
    stop_mount(tmp_path / "link")
    assert os.listdir(odd) == []


def test_a_dead_mount_is_replaced(data: Dataset) -> None:
    info = start_mount(data.settings(workers=1))
    os.stat(data.mountpoint)
    worker = mount_status(info)["workers"][0]["pid"]
    for pid in (info.pid, worker):
        os.kill(pid, signal.SIGKILL)
    until(lambda: mounts.is_dead(data.mountpoint))
    until(lambda: list_mounts() == [])  # a killed process is still there for a moment
    start_mount(data.settings())
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]


def test_two_mounts_share_a_cache(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    start_mount(data.settings(workers=1))
    start_mount(data.settings(workers=1, mountpoint=tmp_path / "second"))
    assert [info.mountpoint for info in list_mounts()] == [str(data.mountpoint), str(tmp_path / "second")]
    stop_mount(data.mountpoint)
    assert (tmp_path / "second/a.jpg").read_bytes() == FILES["a.jpg"]
    stop_mount(tmp_path / "second")
    assert list_mounts() == []


# --- the end ----------------------------------------------------------------------------------------------------


def test_a_mount_in_use_says_by_whom(data: Dataset) -> None:
    info = start_mount(data.settings())
    with subprocess.Popen(["sleep", "60"], cwd=data.mountpoint / "train") as user:
        with pytest.raises(MountError, match=rf"in use by sleep \(pid {user.pid}\).*--lazy"):
            stop_mount(data.mountpoint)
        stop_mount(data.mountpoint, lazy=True)
        assert os.listdir(data.mountpoint) == []
        assert os.listdir(f"/proc/{user.pid}/cwd/n01") == ["x.jpg", "y.jpg"]
        user.kill()
    until(lambda: not info.alive)
    assert not Path(info.control).exists()


def test_what_is_no_mount_of_ours(data: Dataset) -> None:
    with pytest.raises(MountError, match="nothing is mounted"):
        stop_mount(data.mountpoint)
    with pytest.raises(MountError, match="not one of cachefs"):
        stop_mount("/proc")


def test_sigterm_unmounts_and_open_files_go_on(data: Dataset) -> None:
    info = start_mount(data.settings())
    with open(data.mountpoint / "a.jpg", "rb", buffering=0) as file:
        os.kill(info.pid, signal.SIGTERM)
        until(lambda: mounted_at(data.mountpoint) is None)
        assert file.read() == FILES["a.jpg"]
        assert info.alive
    until(lambda: not info.alive)
    assert list_mounts() == []


def test_a_mount_can_come_back_while_the_old_one_ends(data: Dataset) -> None:
    first = start_mount(data.settings())
    with open(data.mountpoint / "a.jpg", "rb", buffering=0) as file:
        stop_mount(data.mountpoint, lazy=True)
        second = start_mount(data.settings())
        assert file.read() == FILES["a.jpg"]
    until(lambda: not first.alive)
    assert [info.pid for info in list_mounts()] == [second.pid]
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]


def test_no_secret_is_to_be_seen(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-1")
    monkeypatch.setenv("MY_OWN_TOKEN", "hush-2")
    session = Session("file", {"secret": "hush-3"}, {"AWS_SECRET_ACCESS_KEY": "hush-1"}, root=data.root)
    info = start_mount(data.settings(session=session, notes={"region": "here"}))
    (data.mountpoint / "a.jpg").read_bytes()
    pids = [info.pid, *(worker["pid"] for worker in mount_status(info)["workers"])]
    seen = [Path(f"/proc/{pid}/{what}").read_bytes() for pid in pids for what in ("environ", "cmdline")]
    seen += [json.dumps(mount_status(info)).encode(), Path(info.log).read_bytes(), repr(info).encode()]
    seen += [file.read_bytes() for file in (data.folder / "runtime/mounts").glob("*.json")]
    assert not any(b"hush" in text for text in seen)
    assert info.notes == {"region": "here"}
    assert "hush" not in repr(data.settings(session=session))


def test_a_trace_shows_the_protocol_by_name(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEFS_DEBUG", "fuse")
    data.write({f"many/{number}": b"x" for number in range(300)})
    data.snapshot()
    info = start_mount(data.settings())
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]
    for number in range(300):
        assert (data.mountpoint / f"many/{number}").read_bytes() == b"x"
    until(lambda: "name='299' -> 128 bytes" in Path(info.log).read_text())
    trace = Path(info.log).read_text()
    node = os.stat(data.mountpoint / "a.jpg").st_ino
    assert "|NO_OPEN_SUPPORT|" in trace
    assert f"node={node} pid={os.getpid()} offset=0 size=" in trace
    assert "-> 110000 bytes" in trace
    assert "IOCTL" in trace
    assert "OPEN unique=" in trace
    assert "-> ENOSYS" in trace


def test_foreground_ends_with_ctrl_c(data: Dataset) -> None:
    keeper = data.keeper()
    assert (data.mountpoint / "a.jpg").read_bytes() == FILES["a.jpg"]
    keeper.send_signal(signal.SIGINT)
    assert keeper.wait(60) == 0
    assert mounted_at(data.mountpoint) is None


# --- without privilege ------------------------------------------------------------------------------------------

NOBODY = 65534
DROP = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]

# In a mount namespace of its own, where anybody may open /dev/fuse, as udev has it on Debian and Ubuntu.
OPEN_DEVICE = (
    'mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse && shift && exec "$@"'
)

UNPRIVILEGED = """
import os, sys
from pathlib import Path
from tests.kernel.mounting import Dataset
from cachefs_sidecar.control import *
from cachefs.errors import MountError
data = Dataset(Path(sys.argv[1]))
data.write({"dir/a": b"content"})
data.snapshot()
info = start_mount(data.settings())
assert (data.mountpoint / "dir/a").read_bytes() == b"content"
assert os.stat(data.mountpoint / "dir/a").st_uid == os.getuid()
print(open("/proc/self/mountinfo").read())
assert mount_status(info)["workers"]
with open(data.mountpoint / "dir/a"):
    try:
        stop_mount(data.mountpoint)
        raise SystemExit("a mount in use was unmounted")
    except MountError as error:
        assert "in use" in str(error), error
stop_mount(data.mountpoint)
assert list_mounts() == []
try:
    start_mount(data.settings(allow_other=True))
except MountError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="no fusermount3 (Debian package fuse3)")
def test_without_privilege_through_fusermount(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own folders let nobody else in.
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "program.py").write_text(UNPRIVILEGED)
        (place / "data").mkdir()
        monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(place / "data/run"))
        monkeypatch.setenv("HOME", str(place / "data"))
        paths = [p for p in sys.path if "site-packages" in p or Path(p, "cachefs").is_dir()]
        paths += [str(Path(__file__).parent), str(Path(mounts.__file__).parents[1]), str(Path(__file__).parents[2])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        program = [python_for_nobody(), str(place / "program.py"), str(place / "data")]
        if os.geteuid() == 0:
            for folder in (place, place / "data"):
                shutil.chown(folder, NOBODY, NOBODY)
            program = ["unshare", "-m", "sh", "-c", OPEN_DEVICE, "sh", name, *DROP, *program]
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd="/", check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        (line,) = [line for line in done.stdout.splitlines() if f"{place}/data/mnt" in line and "refused" not in line]
        assert f"{place}/data/mnt ro,nosuid,nodev" in line
        assert f"file://{place}/data/plain" in line
        if not mounts.user_allow_other():
            assert "refused: allow_other: only root" in done.stdout


def python_for_nobody() -> str:
    """This interpreter, or the system's of the same version: one below /root is out of another user's reach."""
    if os.geteuid() != 0:
        return sys.executable
    same = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for python in (sys.executable, "/usr/bin/python3"):
        # Through a shell: setpriv itself still may what root may.
        command = [*DROP, "sh", "-c", 'exec "$@"', "sh", python, "-c", same]
        try:
            if subprocess.run(command, capture_output=True, cwd="/", check=False).returncode == 0:
                return python
        except FileNotFoundError:
            pytest.skip("no setpriv (Debian package util-linux)")
    pytest.skip(f"no Python {sys.version_info[0]}.{sys.version_info[1]} here that another user may run")

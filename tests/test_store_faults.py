"""The store when things go wrong: killed in the middle, full, failing, gone, somebody else's."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachefs.config import CacheConfig, Floor
from cachefs.digest import BLOCK_SIZE, content_key, version_ref
from cachefs.errors import CacheError, CacheFull, CacheUnusable
from cachefs.store import Reader, Store, claim, layout
from cachefs.store.folder import Folder

DATASET = "d5" * 16

needs_root = pytest.mark.needs_root  # to mount a small file system


def ref(number: int) -> str:
    return version_ref(f"bucket/{number}", "v1")


def config(*dirs: Path, min_free: int | str | Floor = 0) -> CacheConfig:
    return CacheConfig.make(dirs, min_free=min_free)


def served(dirs: tuple[Path, ...], name: str) -> bytes | None:
    found = Reader(dirs).open(DATASET, name)
    if found is None:
        return None
    with open(found[0], "rb") as file:
        return file.read()


def tree(root: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything there is below `root`, with times: equal before and after means untouched."""
    return [
        (str(p), p.lstat().st_mtime_ns, p.lstat().st_mode, p.read_bytes() if p.is_file() else b"")
        for p in sorted([root, *root.rglob("*")])
    ]


def oserror(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this uid 0 may not mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


# --- directories that cannot or must not be a cache ---


def test_missing_directories_are_made_where_their_parent_exists(tmp_path: Path) -> None:
    Store.open(config(tmp_path / "cache"))
    with pytest.raises(CacheUnusable, match=r"deep.*does not exist"):
        Store.open(config(tmp_path / "deep" / "cache"))
    assert not (tmp_path / "deep").exists()


def test_the_default_place_is_made_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "home" / ".cache" / "cachefs"
    monkeypatch.setattr("cachefs.store.directories.default_cache_dir", lambda: place)
    Store.open(config(place))
    assert place.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_is_no_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheUnusable, match="not a directory"):
        Store.open(config(tmp_path / "file"))
    with pytest.raises(CacheUnusable, match="below a file"):
        Store.open(config(tmp_path / "file" / "cache"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    mine = tmp_path / "photos"
    (mine / "tmp").mkdir(parents=True)
    (mine / "tmp" / "precious").write_text("x")
    before = tree(mine)
    with pytest.raises(CacheUnusable, match=r"other files \(tmp\)"):
        Store.open(config(mine))
    assert tree(mine) == before


@pytest.mark.parametrize("which", ["home", "further"])
def test_a_future_format_is_refused_and_untouched(tmp_path: Path, which: str) -> None:
    dirs = (tmp_path / "home", tmp_path / "further")
    Store.open(config(*dirs)).put(b"x", links=[(DATASET, ref(1))])
    place = tmp_path / which
    marker = place / "cachefs.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 2, "new": []}))
    (place / "tmp" / "half").write_text("x")
    before = tree(place)
    with pytest.raises(CacheUnusable, match="newer cachefs \\(format 2, this one knows 1\\)"):
        Store.open(config(*dirs))
    assert tree(place) == before


def test_a_reader_serves_nothing_of_a_future_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layout, "FORMAT", 2)
        Store.open(config(tmp_path / "cache")).put(b"x", links=[(DATASET, ref(1))])
        assert served((tmp_path / "cache",), ref(1)) == b"x"
    assert served((tmp_path / "cache",), ref(1)) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "1"}', '{"format": 0}', '{"format": 1, "id": "../x"}']
)
def test_a_marker_that_makes_no_sense_is_refused_and_untouched(tmp_path: Path, text: str) -> None:
    Store.open(config(tmp_path / "cache")).put(b"x")
    (tmp_path / "cache" / "cachefs.json").write_text(text)
    before = tree(tmp_path / "cache")
    with pytest.raises(CacheUnusable, match="cannot be understood"):
        Store.open(config(tmp_path / "cache"))
    assert tree(tmp_path / "cache") == before


def test_a_directory_of_another_home_is_refused_and_untouched(tmp_path: Path) -> None:
    Store.open(config(tmp_path / "a", tmp_path / "b"))
    Store.open(config(tmp_path / "c"))
    for dirs, name in (("b", "b"), ("cb", "b"), ("ac", "c"), ("ba", "b"), ("abc", "c")):
        refused = tmp_path / name
        before = tree(refused)
        with pytest.raises(CacheUnusable, match=f"{refused}: belongs to another cache"):
            Store.open(config(*(tmp_path / name for name in dirs)))
        assert tree(refused) == before
    Store.open(config(tmp_path / "a", tmp_path / "b"))


def test_what_a_client_and_a_killed_start_leave_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache"
    (place / "run").mkdir(parents=True)
    (place / "run" / "start.lock").touch()
    (place / "lost+found").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(claim, "_write_marker", lambda *a: (_ for _ in ()).throw(oserror(errno.EIO)))
        with pytest.raises(CacheUnusable):
            Store.open(config(place))
    assert (place / "blobs").is_dir()
    (place / "tmp" / "probe").touch()
    (place / "refs" / "probe").touch()
    Store.open(config(place)).put(b"x", links=[(DATASET, ref(1))])
    assert served((place,), ref(1)) == b"x"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object) -> None:
        raise oserror(number)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CacheUnusable, match="no hard links"):
        Store.open(config(tmp_path / "cache"))
    assert not (tmp_path / "cache" / "cachefs.json").exists()


def test_a_file_system_that_copies_instead_of_linking_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", shutil.copy2)
    with pytest.raises(CacheUnusable, match="no hard links"):
        Store.open(config(tmp_path / "cache"))


def test_a_file_system_that_forgets_times_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "utime", lambda *a, **k: None)
    with pytest.raises(CacheUnusable, match="modification times"):
        Store.open(config(tmp_path / "cache"))


def test_a_home_without_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSockets(socket.socket):
        def bind(self, address: Any) -> None:
            raise oserror(errno.EOPNOTSUPP)

    monkeypatch.setattr(socket, "socket", NoSockets)
    with pytest.raises(CacheUnusable, match="no Unix sockets"):
        Store.open(config(tmp_path / "cache"))


def test_a_deep_home_has_sockets_too(tmp_path: Path) -> None:
    place = tmp_path / ("d" * 120)
    Store.open(config(place))
    assert os.listdir(place / "run") == []


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory that everybody may search, and a test that is nobody: no privilege hides a missing permission."""
    place = Path(tempfile.mkdtemp())  # tmp_path lies below a directory of its owner alone
    place.chmod(0o755)
    uid = os.geteuid()
    if uid == 0:
        os.chown(place, 65534, -1)
        os.seteuid(65534)
    try:
        yield place
    finally:
        os.seteuid(uid)
        for folder in (place, place / "cache", place / "cache" / "tmp"):
            folder.chmod(0o755)
        shutil.rmtree(place)


def test_a_user_without_privileges_has_the_whole_store(unprivileged: Path) -> None:
    """Attributes, links, times and modes need rights that root does not notice: all of them, on read-only blobs."""
    store = Store.open(config(unprivileged / "cache"))
    data = os.urandom(BLOCK_SIZE + 100)
    keys = [store.put(content, links=[(DATASET, ref(n))]) for n, content in enumerate((b"small", data))]
    assert all(store.path(key).stat().st_mode & 0o777 == 0o444 for key in keys)
    assert all(os.getxattr(store.path(key), "user.cachefs.key") == key.hex().encode() for key in keys)
    os.utime(store.path(keys[1]))
    assert served(store.config.dirs, ref(1)) is None
    again = Store.open(store.config)
    assert again.check(keys[1])
    assert served(store.config.dirs, ref(1)) == data
    assert again.put(b"small", links=[(DATASET, ref(3)), (DATASET, ref(1))]) == keys[0]
    assert not again.has(keys[1])
    part = again.part(ref(4), len(data))
    for block in (1, 0):
        part.write(block, data[block * BLOCK_SIZE :][:BLOCK_SIZE])
    os.chmod(part.path, 0o444)  # killed while it finished
    part.close()
    part = again.part(ref(4), len(data))
    assert part.finish([(DATASET, ref(4))]) == keys[1]
    assert again.path(keys[1]).stat().st_mode & 0o777 == 0o444
    assert again.drop(keys[1]) < BLOCK_SIZE
    assert served(store.config.dirs, ref(4)) is None
    for number in range(5):
        again.unlink_ref(DATASET, ref(number))
    assert again.usage() == (0, 0)
    assert again.out == {}


@pytest.mark.parametrize("name", ["cache", "new"])
def test_a_directory_that_may_not_be_written_is_refused(unprivileged: Path, name: str) -> None:
    Store.open(config(unprivileged / "cache"))
    for folder in (unprivileged / "cache" / "tmp", unprivileged / "cache", unprivileged):
        folder.chmod(0o555)
    with pytest.raises(CacheUnusable, match=r"not writable for uid \d+.*choose another cache directory"):
        Store.open(config(unprivileged / name))


@needs_root
def test_a_read_only_file_system_is_refused_as_home_and_left_out_else(tmp_path: Path, small_disk: Path) -> None:
    Store.open(config(small_disk / "cache"))
    Store.open(config(tmp_path / "home", small_disk / "further"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place in (small_disk / "cache", small_disk / "new"):
        with pytest.raises(CacheUnusable, match="read-only"):
            Store.open(config(place))
    store = Store.open(config(tmp_path / "home", small_disk / "further"))
    assert list(store.out) == [small_disk / "further"]
    assert "read-only" in store.out[small_disk / "further"]
    store.put(b"x", links=[(DATASET, ref(1))])
    assert served(store.config.dirs, ref(1)) == b"x"


def test_a_further_directory_that_is_missing_or_failing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, missing, failing = tmp_path / "home", tmp_path / "unmounted" / "cache", tmp_path / "failing"
    probe = claim._probe

    def fail(places: layout.Places, seal: int) -> None:
        if places.root == failing:
            raise oserror(errno.EIO)
        probe(places, seal)

    monkeypatch.setattr(claim, "_probe", fail)
    store = Store.open(config(home, missing, failing))
    assert store.live == (home,)
    assert set(store.out) == {missing, failing}
    assert "does not exist" in store.out[missing]
    assert "Input/output error" in store.out[failing]
    for number in range(20):
        store.put(b"%d" % number, links=[(DATASET, ref(number))])
    assert store.usage().blobs == 20


# --- full ---


def fill_up(disk: Path) -> None:
    with open(disk / "other", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    info = os.statvfs(disk)
    assert info.f_bavail == 0


@needs_root
def test_a_full_disk_refuses_new_blobs_and_serves_old_ones(small_disk: Path) -> None:
    place = small_disk / "cache"
    store = Store.open(config(place))
    data = [os.urandom(700_000) for _ in range(8)]
    stored = 0
    with contextlib.suppress(CacheFull):
        for content in data:
            store.put(content, links=[(DATASET, ref(stored))])
            stored += 1
    assert 3 <= stored < 6
    assert store.usage().blobs == stored
    assert os.listdir(place / "tmp") == []
    assert store.out == {}, "full passes: the directory stays in"
    fill_up(small_disk)
    again = Store.open(config(place))
    assert [served((place,), ref(n)) for n in range(stored)] == data[:stored]
    with pytest.raises(CacheFull):
        again.part(ref(99), BLOCK_SIZE * 3).write(1, bytes(BLOCK_SIZE))
    assert os.listdir(place / "parts") == []
    assert again.unlink_ref(DATASET, ref(0)) >= 700_000
    again.put(data[7][:500_000], links=[(DATASET, ref(7))])
    assert served((place,), ref(7)) == data[7][:500_000]


@needs_root
def test_a_new_cache_on_a_full_disk_is_refused(small_disk: Path) -> None:
    fill_up(small_disk)
    with pytest.raises(CacheUnusable, match="full"):
        Store.open(config(small_disk / "cache"))


@needs_root
def test_enospc_in_the_middle_of_a_write(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others fill the disk between the look at the free space and the write."""
    store = Store.open(config(small_disk / "cache"))
    monkeypatch.setattr(Folder, "free", lambda self, floor: 1 << 40)
    with pytest.raises(CacheFull, match="No space"):
        store.put(os.urandom(5_000_000), links=[(DATASET, ref(1))])
    assert store.usage() == (0, 0)
    assert os.listdir(small_disk / "cache" / "tmp") == []
    store.put(os.urandom(1_000_000), links=[(DATASET, ref(1))])


@needs_root
def test_a_full_directory_leaves_the_blob_to_another(tmp_path: Path, small_disk: Path) -> None:
    store = Store.open(config(tmp_path / "home", small_disk / "further"))
    data = [os.urandom(500_000) for _ in range(30)]
    for number, content in enumerate(data):
        store.put(content, links=[(DATASET, ref(number))])
    assert [served(store.config.dirs, ref(n)) for n in range(30)] == data
    assert len(store.live) == 2
    assert store.part(ref(99), 50_000_000).path.is_relative_to(tmp_path / "home")


def test_the_floor_is_kept(tmp_path: Path) -> None:
    store = Store.open(config(tmp_path / "cache", min_free="99%"))
    with pytest.raises(CacheFull, match="free-space floor"):
        store.put(b"x", links=[(DATASET, ref(1))])
    assert store.usage() == (0, 0)


def test_a_failed_link_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(config(tmp_path / "cache"))
    link = os.link

    def fail(source: str, target: str) -> None:
        if target.endswith(ref(2)):
            raise oserror(errno.ENOSPC)
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(CacheFull):
            store.put(b"x", links=[(DATASET, ref(1)), (DATASET, ref(2))])
    assert store.usage() == (0, 0)
    assert list(store.refs(DATASET)) == []


# --- failing ---


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_a_failing_directory_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    store = Store.open(config(good, bad))
    keys = [store.put(b"%d" % n, links=[(DATASET, ref(n))]) for n in range(30)]
    in_bad = [key for key in keys if store.path(key).is_relative_to(bad)]
    assert 0 < len(in_bad) < 30
    write = Folder.write_tmp

    def fail(self: Folder, name: str, data: bytes) -> str:
        if self.places.root == bad:
            raise oserror(number)
        return write(self, name, data)

    monkeypatch.setattr(Folder, "write_tmp", fail)
    new = [store.put(b"new %d" % n, links=[(DATASET, ref(100 + n))]) for n in range(30)]
    assert list(store.out) == [bad]
    assert os.strerror(number) in store.out[bad]
    assert all(store.path(key).is_relative_to(good) for key in new)
    assert not any(store.has(key) for key in in_bad), "what is in a failing directory is a miss"
    assert store.put(b"%d" % keys.index(in_bad[0]), links=[]) == in_bad[0]
    assert store.has(in_bad[0])


def test_the_last_directory_failing_is_an_error_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(config(tmp_path / "cache"))
    key = store.put(b"x", links=[(DATASET, ref(1))])

    def fail(self: Folder, name: str, data: bytes) -> str:
        raise oserror(errno.EIO)

    monkeypatch.setattr(Folder, "write_tmp", fail)
    for _ in range(2):
        with pytest.raises(CacheError, match="Input/output error") as caught:
            store.put(b"y", links=[(DATASET, ref(2))])
        assert not isinstance(caught.value, CacheFull)
    assert list(store.out) == [tmp_path / "cache"]
    assert not store.has(key)
    assert store.usage() == (0, 0)
    assert list(store.keys()) == []
    assert store.unlink_ref(DATASET, ref(1)) == 0
    with pytest.raises(CacheError):
        store.path(key)
    with pytest.raises(CacheError):
        store.part(ref(3), 5)


def test_too_many_open_files_is_no_failure_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(config(tmp_path / "cache"))

    def fail(*args: object) -> int:
        raise oserror(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", fail)
        with pytest.raises(CacheError, match="Too many open files"):
            store.put(b"x", links=[(DATASET, ref(1))])
    assert store.out == {}
    store.put(b"x", links=[(DATASET, ref(1))])


def test_a_bad_sector_is_a_damaged_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(config(tmp_path / "cache"))
    key = store.put(b"x" * 100, links=[(DATASET, ref(1))])

    def fail(*args: object) -> bytes:
        raise oserror(errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        assert not store.check(key)
    assert served(store.config.dirs, ref(1)) is None
    assert store.out == {}


@pytest.mark.parametrize("directories", [1, 2])
def test_a_directory_that_goes_away(tmp_path: Path, directories: int) -> None:
    dirs = tuple(tmp_path / str(n) for n in range(directories))
    store = Store.open(config(*dirs))
    part = store.part(ref(1000), BLOCK_SIZE)
    for number in range(20):
        store.put(b"%d" % number, links=[(DATASET, ref(number))])
    gone = dirs[-1]
    shutil.rmtree(gone)
    gone.mkdir()  # as the mount point of an unmounted disk
    if directories == 1:
        with pytest.raises(CacheError, match="is gone"):
            store.put(b"new", links=[(DATASET, ref(1))])
    else:
        for number in range(20, 60):
            store.put(b"%d" % number, links=[(DATASET, ref(number))])
            assert served(dirs, ref(number)) == b"%d" % number
    assert list(store.out) == [gone]
    assert list(gone.iterdir()) == [], "nothing may be written below a bare mount point"
    store.unlink_ref(DATASET, ref(5))
    store.drop(content_key(b"6"))
    store.sweep()
    store.usage()
    part.close()


def test_folders_that_somebody_tidied_up_are_made_again(tmp_path: Path) -> None:
    store = Store.open(config(tmp_path / "cache"))
    store.put(b"1", links=[(DATASET, ref(1))])
    for name in ("tmp", "parts"):
        shutil.rmtree(tmp_path / "cache" / name)
    for child in (tmp_path / "cache" / "blobs").iterdir():
        shutil.rmtree(child)
    for child in (tmp_path / "cache" / "refs").iterdir():
        shutil.rmtree(child)
    store.put(b"1", links=[(DATASET, ref(1))])
    store.part(ref(2), 1).write(0, b"x")
    assert served(store.config.dirs, ref(1)) == b"1"
    assert store.out == {}


# --- killed ---

# Every call by which the store changes the disk.
CHANGES = ("open", "pwrite", "setxattr", "utime", "rename", "link", "unlink", "ftruncate", "mkdir", "fchmod", "chmod")


def killed_at(count: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its `count`-th change to the disk. False: it had fewer."""
    pid = os.fork()
    if pid == 0:
        numbers = itertools.count()
        for name in CHANGES:
            original = getattr(os, name)

            def call(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
                if next(numbers) == count:
                    if _name == "pwrite":
                        _original(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                return _original(*args, **kwargs)

            setattr(os, name, call)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


SMALL, OLD, LARGE = b"small" * 9000, b"old" * 9000, bytes(range(256)) * ((BLOCK_SIZE + 4096) // 256)


def fill_part(store: Store) -> None:
    part = store.part(ref(50), len(LARGE))
    part.write(1, LARGE[BLOCK_SIZE:])
    part.write(1, bytes(4096))  # what was there turns out wrong, and is written again
    part.write(1, LARGE[BLOCK_SIZE:])
    part.write(0, LARGE[:BLOCK_SIZE])
    part.finish([(DATASET, ref(4))])


ACTIONS: dict[str, tuple[Callable[[Store], object], dict[int, set[bytes | None]]]] = {
    "put": (lambda s: s.put(SMALL, links=[(DATASET, ref(3)), (DATASET, ref(4))]), {3: {SMALL}, 4: {SMALL}}),
    "put large": (lambda s: s.put(LARGE, links=[(DATASET, ref(3))]), {3: {LARGE}}),
    "replace": (lambda s: s.put(SMALL, links=[(DATASET, ref(1)), (DATASET, ref(2))]), {1: {SMALL}, 2: {SMALL}}),
    "link": (lambda s: s.link(content_key(OLD), [(DATASET, ref(3))]), {3: {OLD}}),
    "unlink": (lambda s: [s.unlink_ref(DATASET, ref(n)) for n in (1, 2)], {1: {None}, 2: {None}}),
    "drop": (lambda s: s.drop(content_key(OLD)), {1: {None}, 2: {None}}),
    "part": (fill_part, {4: {LARGE}}),
    "check": (lambda s: s.check(content_key(OLD)), {}),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_killed_at_every_single_change(tmp_path: Path, name: str) -> None:
    action, outcome = ACTIONS[name]
    expected: dict[int, set[bytes | None]] = {1: {OLD}, 2: {OLD}, 3: {None}, 4: {None}}
    expected.update(outcome)
    for count in itertools.count():
        place = tmp_path / str(count)
        store = Store.open(config(place))
        store.put(OLD, links=[(DATASET, ref(1)), (DATASET, ref(2))])
        killed = killed_at(count, partial(action, store))
        before: dict[int, bytes | None] = {1: OLD, 2: OLD, 3: None, 4: None}
        for number in before:
            # Also None: a dropped blob's refs, between its unsealing and its end.
            assert served((place,), ref(number)) in expected[number] | {before[number], None}, (count, number)
        again = Store.open(config(place))
        assert os.listdir(place / "tmp") == []
        for key in list(again.keys()):
            assert again.check(key), "a blob is whole from the moment it has its name"
        again.sweep()
        held = {f.stat().st_ino: f.stat().st_blocks * 512 for d in ("blobs", "refs", "parts") for f in files(place / d)}
        assert again.usage().bytes == sum(held.values()), "bytes that no scan finds"
        action(again)
        for number in before:
            assert served((place,), ref(number)) in expected[number], "the same again succeeds"
        assert list(again.parts()) == []
        shutil.rmtree(place)
        if not killed:
            assert count >= (1 if name == "check" else 2), "the calls were not counted"
            break


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


STORING = """
import sys, random
from pathlib import Path
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.store import Store
rnd = random.Random(int(sys.argv[2]))
store = Store.open(CacheConfig.make([Path(sys.argv[1])], min_free=0))
print("storing", flush=True)
while True:
    seed = rnd.randrange(1 << 30)
    size = rnd.choice([1000, 110_000, 110_000, BLOCK_SIZE + 70_000])
    ref = version_ref(str(seed), str(size))
    data = random.Random(seed).randbytes(size)
    if size > BLOCK_SIZE and seed % 2:
        part = store.part(ref, size)
        part.write(1, data[BLOCK_SIZE:])
        part.write(0, data[:BLOCK_SIZE])
        part.finish([("d5" * 16, ref)])
    else:
        store.put(data, links=[("d5" * 16, ref)])
    if rnd.random() < 0.5:
        for victim in store.refs("d5" * 16):
            store.unlink_ref("d5" * 16, victim)
            break
"""


def test_killed_at_any_time_while_storing(tmp_path: Path) -> None:
    """Eight fetchers in turn, each killed at a moment of chance; their cache stays whole and leaks nothing."""
    place = tmp_path / "cache"
    rnd = random.Random()
    environ = {**os.environ, "PYTHONPATH": str(Path(layout.__file__).parents[2])}
    seen = 0
    for _ in range(8):
        seed = rnd.randrange(1 << 30)
        worker = subprocess.Popen(
            [sys.executable, "-c", STORING, place, str(seed)], stdout=subprocess.PIPE, env=environ
        )
        try:
            assert worker.stdout is not None
            assert select.select([worker.stdout], [], [], 30)[0]
            assert worker.stdout.readline() == b"storing\n"
            time.sleep(rnd.uniform(0, 0.2))  # the moment of chance
            assert worker.poll() is None, "it must have been killed, not failed"
        finally:
            worker.kill()
            worker.communicate(timeout=30)
        reader = Reader((place,))
        for path in files(place / "refs"):
            found = reader.open(DATASET, path.name)
            assert found is not None, "nothing here ever unseals a blob"
            with open(found[0], "rb") as file:
                data = file.read()
            assert content_key(data).hex() == os.getxattr(path, "user.cachefs.key").decode()
            seen += 1
        store = Store.open(config(place))
        assert os.listdir(place / "tmp") == []
        store.sweep()
        for name in list(store.parts()):
            store.discard_part(name)
        assert {f.stat().st_ino for f in files(place / "refs")} == {
            f.stat().st_ino for f in files(place / "blobs") if f.suffix != ".blocks"
        }
        assert sum(f.stat().st_blocks * 512 for f in files(place / "blobs")) == store.usage().bytes
    assert seen > 0


def test_tmp_is_reclaimed_at_the_next_start(tmp_path: Path) -> None:
    store = Store.open(config(tmp_path / "cache"))
    assert killed_at(1, lambda: store.put(os.urandom(100_000), links=[(DATASET, ref(1))]))
    assert [f.stat().st_size for f in files(tmp_path / "cache" / "tmp")] == [50_000]
    Store.open(store.config)
    assert files(tmp_path / "cache" / "tmp") == []

"""A session driven by bytes: what the kernel asks and hears, with no mount."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.catalog import Builder, Catalog
from cachefs.client import Located
from cachefs.config import CacheConfig
from cachefs.digest import content_key, version_ref
from cachefs.errors import OriginUnreachable, StaleObject
from cachefs.messages import Entry
from cachefs.store import Reader, Store
from cachefs_sidecar.fuse import misses as misses_module
from cachefs_sidecar.fuse import reading as reading_module
from cachefs_sidecar.fuse.abi import ROOT, Init, Opcode
from cachefs_sidecar.fuse.misses import Misses
from cachefs_sidecar.fuse.negotiation import WANTED, Agreement
from cachefs_sidecar.fuse.reading import Reading
from cachefs_sidecar.fuse.session import _MUTATIONS, FOREVER, Session
from cachefs_sidecar.fuse.tree import Tree
from tests.fuse_kernel import Kernel, Reply, directory, read_body

DATASET = "0" * 32
CACHED = os.urandom(100_000)
LARGE = os.urandom(3_000_000)
TIME_NS = 1_600_000_000_000_000_005


class Origin:
    """In place of the fetcher: objects by path, each need recorded; `gate` holds back those of `slow` paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, bytes | Exception] = {}
        self.needs: list[tuple[str, int, int | None, bool]] = []
        self.slow: set[str] = set()
        self.gate = asyncio.Event()
        self.cancelled = 0
        self.piece = 1_000_000

    async def need(
        self,
        path: str,
        *,
        version: str = "",
        size: int = -1,
        offset: int = 0,
        length: int | None = None,
        damaged: bool = False,
        descriptor: bool = False,
    ) -> Located:
        self.needs.append((path, offset, length, damaged))
        if path in self.slow:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        content = self.objects[path]
        if isinstance(content, Exception):
            raise content
        start = offset // self.piece * self.piece
        stop = min(len(content), start + self.piece)
        file = self.folder / "located"
        file.write_bytes(content[start:stop])
        fd = os.open(file, os.O_RDONLY)
        file.unlink()
        return Located(fd, "", len(content), version, start, stop, start, False)

    async def close(self) -> None:
        self.gate.set()


class Mounted:
    """A session, its loop and its stores, with a socket for a kernel."""

    def __init__(self, folder: Path, *, flags: int = int(WANTED), deadline: float = 60.0) -> None:
        self.folder = folder
        self.config = CacheConfig.make([folder / "cache"], min_free=0)
        self.store = Store.open(self.config)
        self.origin = Origin(folder)
        self.passed_on: list[int] = []
        self.catalog = self.build("a", {"d/cached": CACHED, "d/cold": b"cold", "d/large": LARGE, "empty": b""})
        self.put("d/cached", CACHED)
        self.lock = threading.Lock()
        self.tree = Tree([self.catalog], Catalog.open, uid=11, gid=12)
        self.reading = Reading(self.tree, Reader(self.config.dirs), DATASET)
        self.loop = uvloop.new_event_loop()
        self.misses = Misses(
            self.loop, self.origin, self.reading, self.lock, deadline=deadline, pass_on=self.passed_on.append
        )
        self.kernel = Kernel()
        self.session = Session(
            self.kernel.device.fileno(), Agreement(40, flags), self.tree, self.reading, self.misses, self.lock
        )
        self.misses.replies = self.session
        self.threads = [
            threading.Thread(target=self.loop.run_forever),
            threading.Thread(target=self.session.serve),
        ]
        for thread in self.threads:
            thread.start()

    def build(self, name: str, objects: dict[str, bytes], previous: Catalog | None = None) -> Path:
        file = self.folder / f"{name}.sqlite"
        builder = Builder(file, identity="test", root="b", previous=previous)
        for path, content in objects.items():
            self.origin.objects[f"b/{path}"] = content
            builder.add(Entry(f"b/{path}", len(content), TIME_NS, self.version(content)))
        builder.seal().close()
        return file

    @staticmethod
    def version(content: bytes) -> str:
        return content_key(content).hex()

    def put(self, path: str, content: bytes, version: str = "") -> bytes:
        ref = version_ref(f"b/{path}", version or self.version(content))
        return self.store.put(content, links=[(DATASET, ref)])

    def node(self, path: str) -> int:
        with Catalog.open(self.catalog) as catalog:
            row = catalog.find(f"b/{path}")
            assert row is not None
            return row.id

    def read(self, path: str, offset: int = 0, size: int = 131072) -> Reply:
        return self.kernel.ask(Opcode.READ, self.node(path), read_body(offset, size))

    def close(self) -> None:
        self.kernel.hang_up()
        self.threads[1].join(60)
        asyncio.run_coroutine_threadsafe(self.misses.close(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.threads[0].join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        self.reading.close()
        self.tree.close()
        self.loop.close()
        self.kernel.close()


@contextmanager
def mounted(folder: Path, **options: object) -> Iterator[Mounted]:
    mount = Mounted(folder, **options)  # type: ignore[arg-type]
    try:
        yield mount
    finally:
        mount.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    with mounted(tmp_path) as m:
        yield m


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


# --- names ------------------------------------------------------------------------------------------------------


def test_lookup_finds_and_remembers_what_is_not_there(mount: Mounted) -> None:
    found = mount.kernel.ask(Opcode.LOOKUP, mount.node("d"), b"cached\0")
    node, generation, valid = struct.unpack_from("=QQQ", found.body)
    assert (node, generation, valid) == (mount.node("d/cached"), 0, FOREVER)
    missing = mount.kernel.ask(Opcode.LOOKUP, ROOT, b"nothing\0")
    assert (missing.error, struct.unpack_from("=QQQ", missing.body)) == (0, (0, 0, FOREVER))
    assert mount.kernel.ask(Opcode.LOOKUP, ROOT, b"x" * 256 + b"\0").error == -errno.ENAMETOOLONG
    assert mount.kernel.ask(Opcode.LOOKUP, 9999, b"x\0").error == -errno.ESTALE


def test_attributes(mount: Mounted) -> None:
    body = mount.kernel.ask(Opcode.GETATTR, mount.node("d/cached"), bytes(16)).body
    node, size, blocks, _, mtime = struct.unpack_from("=QQQQQ", body, 16)
    assert (node, size, blocks, mtime) == (mount.node("d/cached"), 100_000, 200, TIME_NS // 10**9)
    mode, links, uid, gid = struct.unpack_from("=IIII", body, 16 + 60)
    assert (mode, links, uid, gid) == (0o100444, 1, 11, 12)
    root = mount.kernel.ask(Opcode.GETATTR, ROOT, bytes(16)).body
    assert struct.unpack_from("=I", root, 16 + 60)[0] == 0o040555
    created = struct.unpack_from("=Q", root, 16 + 32)[0]
    assert abs(created - time.time()) < 60
    assert mount.kernel.ask(Opcode.GETATTR, 9999, bytes(16)).error == -errno.ESTALE


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("room", [24, 200, 400, 1000, 4096, 32768])
def test_listings_are_whole_in_pages_of_any_size(tmp_path: Path, opcode: Opcode, room: int) -> None:
    with mounted(tmp_path) as mount:
        names = {f"n{number}-{'x' * (number % 7)}" for number in range(40)}
        new = mount.build("b", dict.fromkeys(names, b"."))
        with mount.lock:
            mount.session.switch_before_next([new])
        plus = opcode == Opcode.READDIRPLUS
        seen: list[bytes] = []
        cookie = 0
        smallest = 160 if plus else 32
        if room < smallest:  # an empty page would be the end of the directory
            assert mount.kernel.ask(opcode, ROOT, read_body(cookie, room)).error == -errno.EINVAL
            return
        while body := mount.kernel.ask(opcode, ROOT, read_body(cookie, room)).body:
            assert len(body) <= room
            entries = directory(body, plus=plus)
            cookie = entries[-1][1]
            seen += [name for _, _, name, _ in entries]
        assert seen[:2] == [b".", b".."]
        assert sorted(seen[2:]) == sorted(name.encode() for name in names)


def test_a_listing_says_of_each_entry_what_a_lookup_says(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        odd: dict[str, bytes] = {
            "a": b"",
            "before 1970": b".",
            "folder/x": b".",
            "n" * 255: b"x" * 4097,
            "caf\u00e9": b"x",
        }
        builder = Builder(tmp_path / "odd.sqlite", identity="test", root="b")
        for path, content in odd.items():
            time_ns = {"a": 0, "before 1970": -1}.get(path, TIME_NS)
            builder.add(Entry(f"b/{path}", len(content), time_ns, "v"))
        builder.seal().close()
        with mount.lock:
            mount.session.switch_before_next([tmp_path / "odd.sqlite"])
        body = mount.kernel.ask(Opcode.READDIRPLUS, ROOT, read_body(2, 65536)).body
        at = 0
        for _, _, name, kind in directory(body, plus=True):
            assert body[at : at + 128] == mount.kernel.ask(Opcode.LOOKUP, ROOT, name + b"\0").body
            assert kind == struct.unpack_from("=I", body, at + 100)[0] >> 12
            at += 152 + len(name) + -len(name) % 8
        assert at == len(body)
        assert len(directory(body, plus=True)) == len(odd)


def test_odd_positions_in_a_listing(mount: Mounted) -> None:
    for opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
        for cookie in (2**32, 2**63 - 1, 2**63, 2**64 - 1):  # behind the last entry, and no number of SQLite's
            assert mount.kernel.ask(opcode, ROOT, read_body(cookie, 4096))[2] == b""
        whole = mount.kernel.ask(opcode, ROOT, read_body(0, 2**32 - 1)).body  # more than a page can have
        assert whole == mount.kernel.ask(opcode, ROOT, read_body(0, 4096)).body
        assert mount.kernel.ask(opcode, 9999, read_body(0, 4096)).error == -errno.ESTALE
        assert mount.kernel.ask(opcode, mount.node("empty"), read_body(2, 4096)).body == b""  # no directory


def test_a_listing_from_a_damaged_catalog_is_an_error(mount: Mounted) -> None:
    bad = mount.folder / "bad.sqlite"
    shutil.copy(mount.catalog, bad)
    with contextlib.closing(sqlite3.connect(bad, isolation_level=None)) as damaged:
        damaged.execute("UPDATE entries SET size = 'text' WHERE name = CAST('cold' AS BLOB)")
    with mount.lock:
        mount.session.switch_before_next([bad])
    assert mount.kernel.ask(Opcode.READDIRPLUS, mount.node("d"), read_body(0, 4096)).error == -errno.EIO


def test_dot_dot_is_the_parent(mount: Mounted) -> None:
    entries = directory(mount.kernel.ask(Opcode.READDIR, mount.node("d"), read_body(0, 4096)).body, plus=False)
    assert [(inode, name) for inode, _, name, _ in entries[:2]] == [(mount.node("d"), b"."), (ROOT, b"..")]


def test_the_kernel_opens_by_itself(mount: Mounted) -> None:
    for opcode in (Opcode.OPEN, Opcode.OPENDIR):
        assert mount.kernel.ask(opcode, ROOT, bytes(8)).error == -errno.ENOSYS


def test_an_older_kernel_is_told_to_keep_pages(tmp_path: Path) -> None:
    with mounted(tmp_path, flags=0) as mount:
        for opcode, flags in ((Opcode.OPEN, 2), (Opcode.OPENDIR, 2 | 8)):
            assert mount.kernel.ask(opcode, ROOT, bytes(8))[2] == struct.pack("=QII", 0, flags, 0)


def test_every_mutation_is_refused(mount: Mounted) -> None:
    answers = {opcode: mount.kernel.ask(opcode, ROOT, b"name\0" * 20).error for opcode in _MUTATIONS}
    assert answers == dict.fromkeys(_MUTATIONS, -errno.EROFS)


def test_the_rest_of_the_protocol(mount: Mounted) -> None:
    ask = mount.kernel.ask
    assert ask(Opcode.ACCESS, ROOT, bytes(8)).error == -errno.ENOSYS
    assert ask(Opcode.LSEEK, ROOT, bytes(24)).error == -errno.ENOSYS
    assert ask(Opcode.STATX, ROOT, bytes(24)).error == -errno.ENOSYS
    assert ask(4711, ROOT).error == -errno.ENOSYS
    assert ask(Opcode.IOCTL, ROOT, bytes(32)).error == -errno.ENOTTY
    assert ask(Opcode.READLINK, ROOT).error == -errno.EINVAL
    assert ask(Opcode.DESTROY, 0).error == 0
    blocks, free, available, files = struct.unpack_from("=QQQQ", ask(Opcode.STATFS, ROOT).body)
    assert (blocks, free, available, files) == (-(-(len(CACHED) + len(LARGE) + 4) // 4096), 0, 0, 4 + 1)
    mount.kernel.send(Opcode.FORGET, 5, bytes(8))
    mount.kernel.send(Opcode.BATCH_FORGET, 0, struct.pack("=IIQQ", 1, 0, 5, 1))
    assert ask(Opcode.GETATTR, ROOT, bytes(16)).error == 0  # the next answer: a FORGET has none


def test_extended_attributes(mount: Mounted) -> None:
    cached, cold = mount.node("d/cached"), mount.node("d/cold")

    def get(node: int, name: str, room: int = 100) -> Reply:
        body = struct.pack("=II", room, 0) + name.encode() + b"\0"
        return mount.kernel.ask(Opcode.GETXATTR, node, body)

    assert get(cached, "user.cachefs.version").body == mount.version(CACHED).encode()
    assert get(cached, "user.cachefs.version", 0).body == struct.pack("=II", 32, 0)
    assert get(cached, "user.cachefs.version", 31).error == -errno.ERANGE
    assert get(cached, "user.cachefs.cached").body == b"1"
    assert get(cold, "user.cachefs.cached").body == b"0"
    assert get(cold, "user.cachefs.digest").error == -errno.ENODATA
    assert get(cold, "user.other").error == -errno.ENODATA
    assert get(cold, "security.selinux").error == -errno.EOPNOTSUPP
    names = mount.kernel.ask(Opcode.LISTXATTR, cached, struct.pack("=II", 200, 0)).body.split(b"\0")
    assert {b"user.cachefs.version", b"user.cachefs.cached"} <= set(names)
    if b"user.cachefs.digest" in names:  # where the disk keeps attributes
        assert get(cached, "user.cachefs.digest").body == content_key(CACHED).hex().encode()
    assert mount.kernel.ask(Opcode.LISTXATTR, ROOT, struct.pack("=II", 200, 0)).body == b""


# --- bytes that are here ----------------------------------------------------------------------------------------


def test_a_hit_is_answered_without_the_fetcher(mount: Mounted) -> None:
    assert mount.read("d/cached").body == CACHED
    assert mount.read("d/cached", 4096, 4096).body == CACHED[4096:8192]
    assert mount.read("d/cached", 98304, 131072).body == CACHED[98304:]
    assert mount.read("d/cached", 100_000).body == b""
    assert mount.read("empty").body == b""
    assert mount.origin.needs == []
    assert mount.session.counts["hits"] == 5


def test_a_resent_request_is_answered_under_its_new_number(mount: Mounted) -> None:
    unique = mount.kernel.send(Opcode.READ, mount.node("d/cached"), read_body(0, 10), unique=1 << 63 | 8)
    assert mount.kernel.reply() == Reply(0, unique, CACHED[:10])


@pytest.mark.parametrize("wrong", [CACHED[:-1], CACHED + b"x", b"x" + CACHED[1:]], ids=["short", "long", "changed"])
def test_a_damaged_blob_is_a_miss_that_says_so(mount: Mounted, wrong: bytes) -> None:
    file = Path(mount.store.path(content_key(CACHED)))
    sealed = file.stat()
    os.chmod(file, 0o600)
    file.write_bytes(wrong)
    os.utime(file, ns=(sealed.st_mtime_ns, sealed.st_mtime_ns))  # as bits rot: behind the file system's back
    if len(wrong) == len(CACHED) and "user.cachefs.key" not in os.listxattr(file):
        pytest.skip("this disk keeps no extended attributes, so the key is not beside the blob")
    assert mount.read("d/cached").body == CACHED
    assert mount.origin.needs == [("b/d/cached", 0, len(CACHED), True)]
    assert mount.session.counts["damaged"] == 1


def test_reading_a_directory_or_more_than_agreed(mount: Mounted) -> None:
    assert mount.read("d").error == -errno.EISDIR
    assert mount.read("d/cached", 0, 2 << 20).error == -errno.EINVAL


# --- bytes that are waited for ----------------------------------------------------------------------------------


def test_a_miss_is_read_from_where_the_fetcher_says(mount: Mounted) -> None:
    assert mount.read("d/cold").body == b"cold"
    assert mount.origin.needs == [("b/d/cold", 0, 4, False)]


def test_a_read_over_several_answers_is_whole(mount: Mounted) -> None:
    assert mount.read("d/large", 990_000, 131072).body == LARGE[990_000 : 990_000 + 131072]
    assert [need[1] for need in mount.origin.needs] == [990_000, 1_000_000]


def test_a_readable_range_is_asked_for_once(mount: Mounted) -> None:
    for offset in range(0, 1_000_000 - 131072, 131072):
        assert mount.read("d/large", offset, 131072).body == LARGE[offset : offset + 131072]
    assert len(mount.origin.needs) == 1


def test_a_waiting_read_holds_up_nobody(mount: Mounted) -> None:
    mount.origin.slow.add("b/d/cold")
    waiting = mount.kernel.send(Opcode.READ, mount.node("d/cold"), read_body(0, 4096))
    assert mount.read("d/cached").body == CACHED
    assert mount.read("d/large", 0, 4096).body == LARGE[:4096]
    assert mount.kernel.ask(Opcode.GETATTR, ROOT, bytes(16)).error == 0
    mount.loop.call_soon_threadsafe(mount.origin.gate.set)
    assert mount.kernel.reply() == Reply(0, waiting, b"cold")


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (StaleObject("b/d/cold: replaced at the origin; run `cachefs refresh`"), errno.ESTALE),
        (OriginUnreachable("b/d/cold: nothing answers"), errno.EHOSTUNREACH),
        (OSError(errno.ENOMEM, "no memory"), errno.ENOMEM),
        (RuntimeError("a fault of ours"), errno.EIO),
    ],
)
def test_a_failed_read_has_its_errno_and_names_the_object(
    mount: Mounted, caplog: pytest.LogCaptureFixture, failure: Exception, number: int
) -> None:
    mount.origin.objects["b/d/cold"] = failure
    with caplog.at_level(logging.ERROR, "cachefs.mount"):
        assert mount.read("d/cold").error == -number
    assert "b/d/cold" in caplog.text
    assert mount.misses.counts["errors"] == 1


def test_an_object_of_another_size_is_stale(mount: Mounted) -> None:
    mount.origin.objects["b/d/cold"] = b"longer than it was"
    assert mount.read("d/cold").error == -errno.ESTALE


def test_no_read_waits_for_ever(tmp_path: Path) -> None:
    with mounted(tmp_path, deadline=0.05) as mount:
        mount.origin.slow.add("b/d/cold")
        assert mount.read("d/cold").error == -errno.ETIMEDOUT


def test_an_interrupt_ends_the_read_of_a_dying_reader_only(mount: Mounted) -> None:
    mount.origin.slow.add("b/d/cold")
    node = mount.node("d/cold")
    with subprocess.Popen(["sleep", "60"]) as gone:
        gone.kill()
    dying = mount.kernel.send(Opcode.READ, node, read_body(0, 4), pid=gone.pid)
    living = mount.kernel.send(Opcode.READ, node, read_body(0, 4), pid=os.getpid())
    hidden = mount.kernel.send(Opcode.READ, node, read_body(0, 4), pid=0)
    until(lambda: mount.misses.waiting == 3)
    for unique in (living, hidden, dying):
        mount.kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", unique), unique=unique | 1)
    assert mount.kernel.reply() == Reply(-errno.EINTR, dying, b"")
    assert mount.origin.cancelled == 1
    assert mount.passed_on == []
    mount.loop.call_soon_threadsafe(mount.origin.gate.set)
    assert {mount.kernel.reply().unique for _ in range(2)} == {living, hidden}


def test_an_interrupt_for_another_workers_request_is_passed_on(mount: Mounted) -> None:
    mount.kernel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", 1000), unique=1001)
    until(lambda: mount.passed_on == [1000])


def test_an_interrupt_passed_on_to_us_finds_our_request(mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misses_module, "UNKNOWN_SECONDS", 2.0)  # long enough on a slow machine
    mount.origin.slow.add("b/d/cold")
    with subprocess.Popen(["sleep", "60"]) as gone:
        gone.kill()
    # It may even be here before the request is in hand.
    node = mount.node("d/cold")
    mount.loop.call_soon_threadsafe(mount.misses.interrupt_passed_on, 500)
    mount.kernel.send(Opcode.READ, node, read_body(0, 4), pid=gone.pid, unique=500)
    assert mount.kernel.reply() == Reply(-errno.EINTR, 500, b"")
    assert mount.passed_on == []


# --- descriptors ------------------------------------------------------------------------------------------------


def test_descriptors_are_bounded_and_closed_when_idle(mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "MAX_WINDOWS", 2)
    mount.origin.piece = 200_000
    before = len(os.listdir("/proc/self/fd"))
    for offset in range(0, 2_800_000, 200_000):
        assert mount.read("d/large", offset, 4096).body == LARGE[offset : offset + 4096]
    assert mount.read("d/cached", 0, 4096).body == CACHED[:4096]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    for _ in range(2):
        with mount.lock:
            mount.reading.sweep()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_descriptors_keep_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that did not fit into the cache are memory for as long as a descriptor of them is open."""
    monkeypatch.setattr(reading_module, "IN_MEMORY_LEAST", 600_000)
    monkeypatch.setattr(reading_module, "IN_MEMORY_MOST", 600_000)
    with mounted(tmp_path) as mount:
        mount.origin.piece = 250_000
        for offset in range(0, 3_000_000, 250_000):
            assert mount.read("d/large", offset, 4096).body == LARGE[offset : offset + 4096]
        assert mount.reading._memory <= 600_000
        assert mount.reading._windows == 2
        needs = len(mount.origin.needs)
        assert mount.read("d/large", 2_750_000 + 4096, 4096).body == LARGE[2_754_096 : 2_754_096 + 4096]
        assert len(mount.origin.needs) == needs  # what came last is still there
        assert mount.read("d/cached", 0, 4096).body == CACHED[:4096]
        for _ in range(2):
            with mount.lock:
                mount.reading.sweep()
        assert (mount.reading._memory, mount.reading._windows) == (0, 0)


def test_halves_of_reads_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READs that cross a block's edge keep their first half while they wait for the second: in turns."""
    block = 65_536
    monkeypatch.setattr(misses_module, "BLOCK_SIZE", block)
    monkeypatch.setattr(misses_module, "HALVES_LEAST", 4 * 8192)
    monkeypatch.setattr(misses_module, "HALVES_MOST", 4 * 8192)
    with mounted(tmp_path) as mount:
        mount.origin.piece = block
        node = mount.node("d/large")
        asked = {
            mount.kernel.send(Opcode.READ, node, read_body(edge - 4096, 8192)): edge - 4096
            for edge in range(block, 20 * block, block)
        }
        for _ in range(len(asked)):
            reply = mount.kernel.reply()
            offset = asked.pop(reply.unique)
            assert reply.body == LARGE[offset : offset + 8192]
        assert 8192 <= mount.misses._halves.most <= 4 * 8192
        assert mount.misses._halves.used == 0


# --- refresh ----------------------------------------------------------------------------------------------------


def test_after_a_switch_old_nodes_go_on(mount: Mounted) -> None:
    old_cached, old_directory = mount.node("d/cached"), mount.node("d")
    with Catalog.open(mount.catalog) as previous:
        new = mount.build("b", {"d/cached": b"new content", "d/other": b"other"}, previous)
    with mount.lock:
        mount.session.switch_before_next([new, mount.catalog])
    assert mount.kernel.ask(Opcode.READ, old_cached, read_body(0, 131072)).body == CACHED
    found = mount.kernel.ask(Opcode.LOOKUP, old_directory, b"cached\0").body
    node = struct.unpack_from("=Q", found)[0]
    assert node != old_cached
    assert mount.kernel.ask(Opcode.READ, node, read_body(0, 131072)).body == b"new content"
    assert struct.unpack_from("=Q", mount.kernel.ask(Opcode.LOOKUP, old_directory, b"large\0").body) == (0,)


def test_a_session_without_a_whole_catalog_ends(mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args.exc_type.__name__))
    (mount.folder / "bad.sqlite").write_bytes(b"not a catalog" * 1000)
    with mount.lock:
        mount.session.switch_before_next([mount.folder / "bad.sqlite"])
    mount.kernel.send(Opcode.GETATTR, ROOT, bytes(16))
    mount.threads[1].join(60)
    assert failures == ["CatalogError"]


# --- hostile input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounted(tmp_path_factory.mktemp("fuzz")) as m:
        yield m


@given(opcode=st.integers(0, 60), node=st.sampled_from([0, 1, 2, 3, 2**63, 2**64 - 1]), body=st.binary(max_size=80))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_ends_the_session(target: Mounted, opcode: int, node: int, body: bytes) -> None:
    target.kernel.send(opcode, node, body)
    target.kernel.raw(body or b"?")
    last = target.kernel.send(Opcode.GETATTR, ROOT, bytes(16))
    while target.kernel.reply().unique != last:
        pass


def test_flags_that_are_asked_for_are_known() -> None:
    assert Init.AUTO_INVAL_DATA not in WANTED
    assert Init.EXPLICIT_INVAL_DATA in WANTED

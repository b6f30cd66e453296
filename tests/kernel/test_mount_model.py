"""Random histories of origin, cache and processes against a dict, through a real mount: the kernel gets the bytes of
the snapshot or ESTALE, whatever was replaced, refreshed, evicted, damaged or killed before.

The same idea as tests/test_filesystem_model.py, which says how the model knows what the cache must have. Here names
and versions are always those of the catalog, and pages that the kernel keeps may answer in place of the cache.

Without MODEL_EXAMPLES the same examples come every time. MODEL_EXAMPLES=200 searches at random and longer, and makes
what it finds shorter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test

from cachefs.catalog.hold import KEEP
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, content_key
from cachefs_sidecar.control import mount_status, refresh_mount, start_mount, stop_mount
from cachefs_sidecar.fuse.tree import GENERATIONS
from cachefs_sidecar.registry import MountSettings
from cachefs_sidecar.testbed import stop_fetcher
from tests.kernel.mounting import drop_pages

pytestmark = pytest.mark.needs_fuse

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

NAMES = ("a", "b", "d/c", "d/e")
LARGE = BLOCK_SIZE + 3

names = st.sampled_from(NAMES)
sizes = st.sampled_from([0, 1, 5000, 5000, 300_000, LARGE])
offsets = st.sampled_from([0, 1, 4095, 4999, 299_999, BLOCK_SIZE - 1, LARGE - 2, LARGE])
lengths = st.sampled_from([1, 5, 4096, 200_000, BLOCK_SIZE])


class Version(NamedTuple):
    mtime_ns: int
    data: bytes

    def __repr__(self) -> str:
        return f"<{self.data[:8]!r}, {len(self.data)} bytes>"


@dataclass(eq=False)
class Held:
    """spoiled: its blob was written to, or touched, since it was opened."""

    fd: int
    name: str
    version: Version
    spoiled: bool = False


class Model(RuleBasedStateMachine):
    files = Bundle("files")
    io = "open-free"

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="mount-model-", dir=MEMORY))
        self.root, self.home, self.mnt = (self.place / name for name in ("origin", "cache", "mnt"))
        for folder in (self.root / "d", self.mnt):
            folder.mkdir(parents=True)
        self.clock = 1_700_000_000_000_000_000
        self.origin: dict[str, Version] = {}
        self.served: dict[str, Version] = {}
        # What the cache must have, and what it, or the kernel, may have.
        self.cached: set[tuple[str, Version]] = set()
        self.linked: set[tuple[str, Version]] = set()
        self.ever: set[tuple[str, Version]] = set()
        self.open: list[Held] = []
        self.config = CacheConfig.make(self.home, min_free=0, idle=5, deadline=100)
        self.session = Session("file", {}, {}, root=str(self.root))
        self.connection = Connection(self.config, self.session)

    @initialize(sizes=st.tuples(*[sizes] * 4))
    def mount(self, sizes: tuple[int, ...]) -> None:
        for name, size in zip(("d/keep", *NAMES), (1, *sizes), strict=True):
            self.put(name, size)
        made = self.connection.make_catalog()
        self.served = dict(self.origin)
        self.info = start_mount(
            MountSettings(
                mountpoint=self.mnt,
                catalog=Path(made.file),
                dataset=self.connection.attach().dataset,
                cache=self.config,
                session=self.session,
                origin=f"file://{self.root}",
                workers=2,
                io=self.io,
            )
        )

    def teardown(self) -> None:
        for held in self.open:
            os.close(held.fd)
        self.connection.close()
        if os.path.ismount(self.mnt):
            stop_mount(self.mnt)
        stop_fetcher(self.home)
        shutil.rmtree(self.place)

    # --- the origin ---

    def put(self, name: str, size: int) -> None:
        self.write(name, (b"%08d" % (self.clock // 10**9 % 10**8 + 1) * (size // 8 + 1))[:size])

    def write(self, name: str, data: bytes) -> None:
        self.clock += 1_000_000_000
        new = self.place / "new"
        new.write_bytes(data)
        os.utime(new, ns=(self.clock, self.clock))
        new.replace(self.root / name)
        self.origin[name] = Version(self.clock, data)

    @rule(name=names, size=sizes)
    def replace_object(self, name: str, size: int) -> None:
        self.put(name, size)

    @rule(name=names, of=st.sampled_from([None, *NAMES]))
    def copy_or_delete_object(self, name: str, of: str | None) -> None:
        if of in self.origin:
            self.write(name, self.origin[of].data)
        elif self.origin.pop(name, None):
            (self.root / name).unlink()

    @rule()
    def refresh(self) -> None:
        made = self.connection.make_catalog(refresh=True)
        refresh_mount(self.info, made.file)
        self.served = dict(self.origin)

    # --- bytes ---

    def judge(self, name: str, version: Version, got: bytes | OSError, start: int = 0, stop: int | None = None) -> None:
        where = (name, version)
        if isinstance(got, OSError):
            assert got.errno == errno.ESTALE, got
            assert self.origin.get(name) != version, "the origin has it"
            assert where not in self.cached, "the cache has it"
            return
        expected = version.data[start:stop]
        if 0 < len(got) < len(expected):  # read(2) gives what comes before the block that cannot be had
            assert self.origin.get(name) != version, "the origin has it"
            assert where not in self.cached, "the cache has it"
            expected = expected[: len(got)]
        assert got == expected, (name, version, start, stop)
        if not got:
            return  # an empty answer needs no bytes
        fetched, self.ever = where not in self.ever, self.ever | {where}
        whole = len(version.data) <= BLOCK_SIZE or (start == 0 and stop is None)
        if fetched and whole:  # else pages of the kernel may have answered
            self.cached.add(where)
            self.linked.add(where)

    def opened(self, name: str) -> int | None:
        """A descriptor; None where the snapshot has no such name, and rightly so."""
        try:
            fd = os.open(self.mnt / name, os.O_RDONLY)
        except FileNotFoundError:
            assert name not in self.served
            return None
        assert name in self.served
        return fd

    @rule(name=names, cold=st.booleans())
    def read_whole(self, name: str, cold: bool) -> None:
        if (fd := self.opened(name)) is None:
            return
        with os.fdopen(fd, "rb", buffering=0) as file:
            if cold:
                drop_pages(self.mnt / name)
            self.judge(name, self.served[name], attempt(file.readall))

    @rule(name=names, ranges=st.lists(st.tuples(offsets, lengths), min_size=1, max_size=4))
    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> None:
        if (fd := self.opened(name)) is None:
            return
        try:
            for offset, length in ranges:
                drop_pages(self.mnt / name)
                got = attempt(partial(os.pread, fd, length, offset))
                self.judge(name, self.served[name], got, offset, offset + length)
        finally:
            os.close(fd)

    @rule(target=files, name=names)
    def keep_open(self, name: str) -> Held | None:
        if (fd := self.opened(name)) is None:
            return None
        self.open.append(Held(fd, name, self.served[name]))
        return self.open[-1]

    @rule(held=consumes(files))
    def go_on(self, held: Held | None) -> None:
        """A file that was open before a refresh has what it had."""
        if held is None:
            return
        self.judge(held.name, held.version, attempt(partial(os.pread, held.fd, 2 * LARGE, 0)))
        self.open.remove(held)
        os.close(held.fd)

    # --- names ---

    @rule()
    def look(self) -> None:
        found = {str(path.relative_to(self.mnt)): path.stat() for path in self.mnt.rglob("*") if path.is_file()}
        expected = {name: (len(version.data), version.mtime_ns) for name, version in self.served.items()}
        assert {name: (info.st_size, info.st_mtime_ns) for name, info in found.items()} == expected
        assert sorted(os.listdir(self.mnt / "d")) == sorted(n[2:] for n in self.served if n.startswith("d/"))
        for name in NAMES:
            assert (self.mnt / name).exists() == (name in self.served)

    @rule(name=names)
    def attributes(self, name: str) -> None:
        if name not in self.served:
            with pytest.raises(FileNotFoundError):
                os.getxattr(self.mnt / name, "user.cachefs.version")
            return
        version = self.served[name]
        where = (name, version)
        assert os.getxattr(self.mnt / name, "user.cachefs.version").decode() == (
            f"{version.mtime_ns}-{len(version.data)}"
        )
        cached = os.getxattr(self.mnt / name, "user.cachefs.cached")
        if where in self.linked:
            assert cached == b"1"
        elif where not in self.ever and version.data:
            assert cached == b"0"
        if cached == b"1":
            assert os.getxattr(self.mnt / name, "user.cachefs.digest").decode() == content_key(version.data).hex()

    # --- the cache and its processes ---

    @rule(name=st.sampled_from(["", *NAMES]))
    def evict(self, name: str) -> None:
        self.connection.evict(str(self.root / name) if name else str(self.root))
        self.cached.clear()
        self.linked.clear()

    def blobs(self) -> list[Path]:
        return sorted(file for file in (self.home / "blobs").glob("??/*") if file.suffix != ".blocks")

    @rule(number=st.integers(0, 7), at=st.integers(0, 4095), write=st.booleans())
    def damage_or_touch(self, number: int, at: int, write: bool) -> None:
        if not (blobs := self.blobs()):
            return
        blob = blobs[number % len(blobs)]
        if write:
            blob.chmod(0o600)
            data = bytearray(blob.read_bytes() or b"?")
            for page in range(0, len(data), 4096):
                data[page + at % min(4096, len(data) - page)] ^= 0xFF
            with open(blob, "r+b") as file:
                file.write(data)
            # The kernel may read ahead, and so have the blob checked, while this writes; one write has one time.
            os.utime(blob)
        else:
            os.utime(blob, ns=(self.clock * 2, self.clock * 2))
        for held in self.open:
            held.spoiled |= content_key(held.version.data).hex() == blob.name
        hit = {where for where in self.cached if content_key(where[1].data).hex() == blob.name}
        self.linked -= hit
        if write:
            self.cached -= hit

    @rule()
    def kill_fetcher(self) -> None:
        if stop_fetcher(self.home, sign=signal.SIGKILL):
            self.cached &= self.linked  # what was touched is found by the index, which may have lost it

    @rule(which=st.integers(0, 1))
    def kill_worker(self, which: int) -> None:
        workers = [worker["pid"] for worker in mount_status(self.info)["workers"] if worker["pid"]]
        if workers:
            with contextlib.suppress(ProcessLookupError):  # killed just before, and not yet replaced
                os.kill(workers[which % len(workers)], signal.SIGKILL)


class Passing(Model):
    """The same in passthrough mode: who has a file open reads its blob whatever becomes of it, and nobody else is led
    to one that somebody wrote to."""

    io = "passthrough"

    def opened(self, name: str) -> int | None:
        try:
            return super().opened(name)
        except OSError as error:
            others = [held for held in self.open if held.spoiled and held.version == self.served[name]]
            if error.errno != errno.EIO or not others:
                raise
            return None

    def judge(self, name: str, version: Version, got: bytes | OSError, start: int = 0, stop: int | None = None) -> None:
        if not any(held.spoiled and held.version == version for held in self.open):
            super().judge(name, version, got, start, stop)


def attempt(work: Callable[[], bytes]) -> bytes | OSError:
    try:
        return work()
    except OSError as error:
        return error


@pytest.mark.timeout(0 if EXAMPLES else 300)
@pytest.mark.parametrize(
    ("model", "examples"),
    [pytest.param(Model, 16, id="open-free"), pytest.param(Passing, 8, id="passthrough", marks=pytest.mark.needs_root)],
)
def test_a_mount_and_a_dict(model: type[Model], examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=40,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
            phases=list(Phase) if EXAMPLES else [Phase.generate],  # shrinking takes minutes
        ),
    )


def test_damage_below_a_file_that_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker keeps the descriptor of what is read in several READs: of a part that became a blob, and of a blob."""
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    model = Model()
    try:
        model.mount((LARGE, 1, 1, 1))
        for _ in range(2):
            model.read_whole("a", cold=True)
            model.read_ranges("a", [(0, 5), (BLOCK_SIZE // 2, 5)])
            model.damage_or_touch([blob.stat().st_size for blob in model.blobs()].index(LARGE), 3, write=True)
            model.read_ranges("a", [(at, 4096) for at in (0, 4096, BLOCK_SIZE // 2, BLOCK_SIZE - 8192)])
    finally:
        model.teardown()


def test_refreshes_at_once_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    model = Model()
    try:
        model.mount((1, 1, 1, 1))
        catalogs = []
        for name in NAMES[:KEEP]:  # more, and the first is removed, as nobody serves it yet
            model.put(name, 5000)
            catalogs.append(model.connection.make_catalog(refresh=True).file)
        with ThreadPoolExecutor(len(catalogs)) as pool:
            list(pool.map(partial(refresh_mount, model.info), catalogs))
        refresh_mount(model.info, catalogs[-1])
        model.served = dict(model.origin)
        model.look()
        for name in NAMES:
            model.read_whole(name, cold=True)
    finally:
        model.teardown()


def test_a_mount_keeps_its_snapshot_through_many_refreshes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    model = Model()
    try:
        model.mount((1, 1, 1, 1))
        model.read_whole("a", cold=True)
        folder = Path(model.info.catalog).parent
        for size in range(2 * KEEP):
            model.put("a", 5000 + size)
            model.connection.make_catalog(refresh=True)
        assert len(list(folder.glob("*.sqlite"))) == KEEP + 1, "the newest few, and the one that is mounted"
        for worker in mount_status(model.info)["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        model.look()
        for name in NAMES:
            model.read_whole(name, cold=True)
        # Taken over by the mount, that snapshot is one of the few before; after some more it is let go.
        for size in range(GENERATIONS):
            model.put("a", 5000 + size)
            refresh_mount(model.info, model.connection.make_catalog(refresh=True).file)
        model.connection.make_catalog(refresh=True)
        assert not Path(model.info.catalog).exists()
    finally:
        model.teardown()

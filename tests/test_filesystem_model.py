"""Random histories of origin, cache and readers against a dict: every answer of the fsspec face is the one that
SEMANTICS.md allows, whatever was replaced, listed, evicted, damaged or killed before.

The model knows for every reader which version of a name it serves (as listed, or as first read), and for every version
whether the cache must have it, may have it, or cannot. A version that the origin has, or the cache must have, is never
an error. A kill -9 may lose what the index learned last: then both outcomes are allowed, until one is seen.

Without MODEL_EXAMPLES the same examples come every time. MODEL_EXAMPLES=500 searches at random and longer, and makes
what it finds shorter.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cachefs import CacheFileSystem
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, content_key
from cachefs.errors import IsADirectory, ObjectNotFound, StaleObject
from cachefs.fetcher.embedded import stop_embedded
from cachefs_sidecar.testbed import stop_fetcher

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

NAMES = ("a", "b", "d/c", "d/e")
FOLDER = "d"
LARGE = BLOCK_SIZE + 3
SIZES = (0, 1, 5000, 5000, LARGE)

# Room for two objects of 5000 bytes on pages of 4 KiB and not for three: the rest streams.
TINY = 5 * 4096

names = st.sampled_from(NAMES)
sizes = st.sampled_from(SIZES)
bounds = st.sampled_from([None, 0, 1, 7, 4999, 6000, BLOCK_SIZE, BLOCK_SIZE + 1, LARGE + 5, -1, -2, -6000])


class Version(NamedTuple):
    """One content that a name had at the origin."""

    mtime_ns: int
    data: bytes

    def __repr__(self) -> str:
        return f"<{self.data[:8]!r}, {len(self.data)} bytes>"

    @property
    def described(self) -> tuple[int, str]:
        return len(self.data), f"{self.mtime_ns}-{len(self.data)}"


Names = dict[str, Version]


@dataclass(eq=False)
class Reader:
    """An instance and what it serves. snapshot: as listed, None = versions as first read, kept under `key`."""

    fs: CacheFileSystem
    snapshot: Names | None = None
    key: object = None
    listed: dict[str, Names] = field(default_factory=dict)


@dataclass(eq=False)
class Held:
    file: Any
    name: str
    versions: set[Version]
    damaged: bool = False


class Allowed(NamedTuple):
    versions: set[Version]
    errors: set[type[Exception]]


class Model(RuleBasedStateMachine):
    readers = Bundle("readers")
    files = Bundle("files")

    def __init__(self, fetcher: str) -> None:
        super().__init__()
        self.fetcher = fetcher
        self.place = Path(tempfile.mkdtemp(prefix="model-", dir=MEMORY))
        self.root = self.place / "origin"
        self.home = self.place / "cache"
        (self.root / FOLDER).mkdir(parents=True)
        self.clock = 1_700_000_000_000_000_000
        self.origin: Names = {}
        self.listed: Names | None = None
        self.catalogs: dict[object, Path] = {}
        self.generation = 1
        # (key of the reader, name) -> versions that may be the one first read; None among them: none was.
        self.pins: dict[tuple[object, str], set[Version | None]] = {}
        self.lasting: set[tuple[object, str]] = set()
        # What must be linked for readers of that key; what the index and the store must know; what they may know.
        self.linked: dict[tuple[object, str], Version] = {}
        self.known: set[tuple[str, Version]] = set()
        self.ever: set[tuple[str, Version]] = set()
        self.open: list[Held] = []

    @initialize(
        target=readers,
        tiny=st.sampled_from([False, False, True]),
        sizes=st.tuples(*[sizes] * 4),
        catalogued=st.booleans(),
    )
    def begin(self, tiny: bool, sizes: tuple[int, ...], catalogued: bool) -> Reader:
        self.tiny = tiny
        self.put("d/keep", 1)  # a local directory outlives its files, one of a catalog does not
        for name, size in zip(NAMES, sizes, strict=True):
            self.put(name, size)
        if catalogued:
            self.make_catalog(refresh=False)
        return self.reader()

    def teardown(self) -> None:
        for held in self.open:
            held.file.close()
        stop_embedded(self.home)
        stop_fetcher(self.home)
        shutil.rmtree(self.place)

    # --- the origin ---

    def path(self, name: str) -> str:
        return str(self.root / name) if name else str(self.root)

    def put(self, name: str, size: int) -> None:
        self.clock += 1_000_000_000
        self.write(name, (b"%08d" % (self.clock // 10**9 % 10**8) * (size // 8 + 1))[:size])

    def write(self, name: str, data: bytes) -> None:
        new = self.place / "new"
        new.write_bytes(data)
        os.utime(new, ns=(self.clock, self.clock))
        new.replace(self.path(name))
        self.origin[name] = Version(self.clock, data)

    @rule(name=names, size=sizes)
    def replace_object(self, name: str, size: int) -> None:
        self.put(name, size)

    @rule(name=names, of=st.sampled_from([None, *NAMES]))
    def copy_or_delete_object(self, name: str, of: str | None) -> None:
        """Equal contents share a blob."""
        if of in self.origin:
            self.clock += 1_000_000_000
            self.write(name, self.origin[of].data)
        elif self.origin.pop(name, None):
            os.unlink(self.path(name))

    # --- instances ---

    def options(self) -> dict[str, Any]:
        return {
            "target_protocol": "file",
            "cache_dir": str(self.home),
            "cache_size": TINY if self.tiny else None,
            "min_free": "0",
            "fetcher": self.fetcher,
            "deadline": 100.0,
        }

    def reader(self) -> Reader:
        return self.serves_now(Reader(CacheFileSystem(**self.options(), skip_instance_cache=True)))

    def serves_now(self, reader: Reader) -> Reader:
        reader.listed.clear()
        reader.snapshot = None if self.listed is None else dict(self.listed)
        reader.fs.info(self.path(""))  # opens the catalog: it may be removed after several refreshes
        reader.key = self.generation if self.listed is None else frozenset(self.listed.items())
        return reader

    @rule(target=readers, reader=readers, how=st.sampled_from(["new", "pickled", "invalidated"]))
    def another_reader(self, reader: Reader, how: str) -> Any:
        if how == "new":
            return self.reader()
        if how == "invalidated":
            reader.fs.invalidate_cache()
            self.serves_now(reader)
            return multiple()
        assert pickle.loads(pickle.dumps(reader.fs)) is reader.fs
        revive, (_, cls, options) = reader.fs.__reduce__()
        CacheFileSystem.clear_instance_cache()
        return self.serves_now(Reader(revive("of another process", cls, options)))

    # --- what may come ---

    def allowed(self, reader: Reader, name: str) -> Allowed:
        if name == FOLDER:
            return Allowed(set(), {IsADirectory})
        if reader.snapshot is not None:
            found = self.reachable(reader, name, reader.snapshot.get(name))
            if not self.catalogs[reader.key].exists():  # after several refreshes: then only what is linked is served
                found.errors.add(StaleObject)
            return found
        if kept := self.linked.get((reader.key, name)):
            return Allowed({kept}, set())
        found = Allowed(set(), set())
        for pin in self.pins.get((reader.key, name), {None}):
            more = self.reachable(reader, name, pin or self.origin.get(name))
            found.versions.update(more.versions)
            found.errors.update(more.errors)
        return found

    def reachable(self, reader: Reader, name: str, version: Version | None) -> Allowed:
        if version is None:
            return Allowed(set(), {ObjectNotFound})
        sure = self.origin.get(name) == version or self.linked.get((reader.key, name)) == version
        if sure or (name, version) in self.known:
            return Allowed({version}, set())
        if (name, version) in self.ever:
            return Allowed({version}, {StaleObject})
        return Allowed(set(), {StaleObject})

    def check(
        self, reader: Reader, name: str, allowed: Allowed, got: object, start: int | None = None, end: int | None = None
    ) -> set[Version]:
        """Compare bytes or an error with what is allowed, and learn from it which versions it may be."""
        if isinstance(got, Exception):
            note(f"{name}: {got!r}")
            assert type(got) in allowed.errors, (name, got, allowed)
            assert not isinstance(got, StaleObject) or str(self.root) in str(got), got
            return set()
        assert isinstance(got, bytes)
        found = {version for version in allowed.versions if version.data[start:end] == got}
        if not got and not found and (start, end) != (None, None) and StaleObject in allowed.errors:
            return set()  # the size of a version is known without its bytes, and none were asked for
        assert found, (name, got[:8], len(got), allowed)
        whole = start is None and end is None
        for version in found:
            fetched = (name, version) not in self.ever
            self.ever.add((name, version))
            if len(found) > 1 or self.tiny or (len(version.data) > BLOCK_SIZE and not whole):
                continue
            self.linked[reader.key, name] = version
            if fetched:
                self.known.add((name, version))
        if reader.snapshot is None and self.pins.get((reader.key, name)) != found:
            self.pins[reader.key, name] = set(found)
            self.lasting.discard((reader.key, name))
        return found

    # --- bytes ---

    @rule(reader=readers, name=st.sampled_from((*NAMES, FOLDER)), start=bounds, end=bounds)
    def cat(self, reader: Reader, name: str, start: int | None, end: int | None) -> None:
        allowed = self.allowed(reader, name)
        got = attempt(lambda: reader.fs.cat_file(self.path(name), start, end))
        self.check(reader, name, allowed, got, start, end)

    @rule(reader=readers, some=st.lists(names, min_size=1, max_size=3))
    def cat_whole(self, reader: Reader, some: list[str]) -> None:
        for name in some:
            self.cat(reader, name, None, None)

    @rule(reader=readers, ranges=st.lists(st.tuples(names, bounds, bounds), min_size=1, max_size=5))
    def cat_ranges(self, reader: Reader, ranges: list[tuple[str, int | None, int | None]]) -> None:
        before = [self.allowed(reader, name) for name, _, _ in ranges]
        paths, starts, ends = [self.path(n) for n, _, _ in ranges], [s for _, s, _ in ranges], [e for _, _, e in ranges]
        results = reader.fs.cat_ranges(paths, starts, ends, on_error="return")
        assert len(results) == len(ranges)
        for (name, start, end), allowed, got in zip(ranges, before, results, strict=True):
            self.check(reader, name, allowed, got, start, end)

    @rule(reader=readers, name=names, steps=st.lists(st.tuples(st.integers(0, 2), bounds, bounds), max_size=4))
    def read_file(self, reader: Reader, name: str, steps: list[tuple[int, int | None, int | None]]) -> None:
        """open, seek, read, beside the same in memory."""
        held = self.hold(reader, name)
        if held is None:
            return
        for whence, offset, count in steps:
            target = (0, held.file.tell(), held.file.size)[whence] + (offset or 0)
            if target < 0:
                with pytest.raises((ValueError, OSError)):
                    held.file.seek(offset or 0, whence)
                continue
            assert held.file.seek(offset or 0, whence) == target
            length = -1 if count is None or count < 0 else count
            got = attempt(partial(held.file.read, length))
            stop = None if length < 0 else target + length
            self.match(held, got, target, stop)
        held.file.close()
        self.open.remove(held)

    @rule(target=files, reader=readers, name=names)
    def keep_open(self, reader: Reader, name: str) -> Held | None:
        return self.hold(reader, name)

    @rule(held=consumes(files))
    def go_on(self, held: Held | None) -> None:
        if held is None:
            return  # it was refused; that it is in the bundle keeps what is drawn apart from what happened
        assert held.file.seek(0) == 0
        self.match(held, attempt(held.file.read), 0, None)
        held.file.close()
        self.open.remove(held)

    def hold(self, reader: Reader, name: str) -> Held | None:
        """Open and read the eight bytes that tell versions apart; None when that was refused."""
        allowed = self.allowed(reader, name)
        file = attempt(lambda: reader.fs.open(self.path(name)))
        if isinstance(file, Exception):
            self.check(reader, name, allowed, file)
            return None
        got = attempt(lambda: file.read(8))
        versions = self.check(reader, name, allowed, got, 0, 8)
        if not versions:
            file.close()
            return None
        assert file.size in {len(version.data) for version in versions}
        held = Held(file, name, {version for version in versions if len(version.data) == file.size})
        self.open.append(held)
        return held

    def match(self, held: Held, got: object, start: int, stop: int | None) -> None:
        """An open file goes on with its version; only one that is not whole in the cache may find it gone."""
        if held.damaged:
            return  # somebody wrote into the very file that is open
        if isinstance(got, Exception):
            assert isinstance(got, StaleObject), got
            assert held.file.size > BLOCK_SIZE
            assert self.origin.get(held.name) not in held.versions
        else:
            assert got in [version.data[start:stop] for version in held.versions], (held, start, stop)

    # --- names ---

    @rule(reader=readers, name=names)
    def info(self, reader: Reader, name: str) -> None:
        path, possible = self.path(name), self.described(reader, name)
        info = attempt(lambda: reader.fs.info(path))
        if isinstance(info, Exception):
            assert isinstance(info, ObjectNotFound), info
            assert None in possible
        else:
            assert info["type"] == "file"
            assert info["name"] == path
            assert (info["size"], info["ETag"]) in {version.described for version in possible if version}
        possible |= self.allowed(reader, name).versions  # a cached name exists, whatever the origin says by now
        for question in (reader.fs.exists, reader.fs.isfile):
            assert question(path) in {version is not None for version in possible}
        assert not reader.fs.isdir(path)

    def described(self, reader: Reader, name: str) -> set[Version | None]:
        if reader.snapshot is not None:
            return {reader.snapshot.get(name)}
        above = name.rpartition("/")[0]
        if name in reader.listed.get(above, {}):
            return {reader.listed[above][name]}
        return {pin or self.origin.get(name) for pin in self.pins.get((reader.key, name), {None})}

    @rule(reader=readers, below=st.sampled_from(["", FOLDER]))
    def ls(self, reader: Reader, below: str) -> None:
        path = self.path(below)
        if reader.snapshot is None and below not in reader.listed:
            reader.listed[below] = level(self.origin, below)
        expected = level(reader.snapshot, below) if reader.snapshot is not None else reader.listed[below]
        entries = reader.fs.ls(path, detail=True)
        assert (
            [entry["name"] for entry in entries]
            == reader.fs.ls(path, detail=False)
            == sorted(reader.fs.ls(path, False))
        )
        files = {entry["name"]: (entry["size"], entry["ETag"]) for entry in entries if entry["type"] == "file"}
        assert files == described(self, expected)
        folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
        assert folders == ([] if below else [self.path(FOLDER)])
        assert reader.fs.isdir(path)
        assert not reader.fs.isfile(path)
        self.find(reader, below)

    def find(self, reader: Reader, below: str) -> None:
        served = reader.snapshot if reader.snapshot is not None else self.origin
        expected = {name: version for name, version in served.items() if not below or name.startswith(below + "/")}
        found = reader.fs.find(self.path(below), detail=True)
        assert {name: (info["size"], info["ETag"]) for name, info in found.items()} == described(self, expected)

    # --- the cache ---

    def connection(self, root: str) -> Connection:
        config = CacheConfig.make(self.home, min_free=0, deadline=100, fetcher=self.fetcher)
        return Connection(config, Session("file", {}, {}, root=root))

    @rule(refresh=st.booleans())
    def make_catalog(self, refresh: bool) -> None:
        connection = self.connection(str(self.root))
        made = connection.make_catalog(refresh=refresh)
        connection.close()
        if self.listed is None or refresh:
            assert made.changed == (self.listed != self.origin)
            self.listed = dict(self.origin)
            self.catalogs[frozenset(self.listed.items())] = Path(made.file)
        assert (made.files, made.skipped) == (len(self.listed), 0)

    @precondition(lambda self: self.listed is None)
    @rule()
    def forget_first_seen(self) -> None:
        connection = self.connection("")
        connection.refresh()
        connection.close()
        self.generation += 1

    @rule(below=st.sampled_from(["", "root", *NAMES]))
    def evict(self, below: str) -> None:
        connection = self.connection("")
        connection.evict(below and self.path("" if below == "root" else below))
        connection.close()
        self.linked.clear()
        self.known.clear()
        self.lasting.update(self.pins)  # eviction asks the index, which writes what it knows first
        if not below:
            assert not self.blobs()

    def blobs(self) -> list[Path]:
        return sorted(file for file in (self.home / "blobs").glob("??/*") if file.suffix != ".blocks")

    @rule(number=st.integers(0, 7), at=st.integers(0, 4095))
    def damage(self, number: int, at: int) -> None:
        if not (blobs := self.blobs()):
            return
        blob = blobs[number % len(blobs)]
        blob.chmod(0o600)
        with open(blob, "r+b") as file:
            data = bytearray(file.read())
            for page in range(0, len(data), 4096):
                data[page + at % min(4096, len(data) - page)] ^= 0xFF
            if not data and not self.tiny:  # an empty blob can only grow, and would then take more room than there is
                data += b"?"
            file.seek(0)
            file.write(data)
        for held in self.open:
            held.damaged |= any(is_key(blob, version) for version in held.versions)
        self.linked = {where: version for where, version in self.linked.items() if not is_key(blob, version)}
        self.known = {(name, version) for name, version in self.known if not is_key(blob, version)}

    @rule(number=st.integers(0, 7))
    def touch(self, number: int) -> None:
        """Somebody sets the time of a blob, into the future: it is checked, found right and sealed, if it is known."""
        if not (blobs := self.blobs()):
            return
        blob = blobs[number % len(blobs)]
        os.utime(blob, ns=(self.clock * 2, self.clock * 2))
        self.linked = {where: version for where, version in self.linked.items() if not is_key(blob, version)}

    @rule()
    def end_fetcher(self) -> None:
        """kill -9 where it is a process; in this process it can only end properly, which loses nothing."""
        if self.fetcher == "inprocess":
            stop_embedded(self.home)
        elif stop_fetcher(self.home, sign=signal.SIGKILL):
            self.known.clear()
            for where in self.pins.keys() - self.lasting:
                self.pins[where].add(None)

    @precondition(lambda self: getattr(self, "tiny", False))
    @invariant()
    def capacity_is_kept(self) -> None:
        """Of bytes of objects; the map of an incomplete large one, a page, is not counted."""
        kept = [*(self.home / "blobs").glob("??/*"), *(self.home / "parts").glob("*")]
        assert sum(file.stat().st_blocks * 512 for file in kept if file.suffix != ".map") <= TINY, kept


def attempt(work: Any) -> Any:
    try:
        return work()
    except (OSError, ValueError) as error:
        return error


def level(names: Names, below: str) -> Names:
    return {name: version for name, version in names.items() if name.rpartition("/")[0] == below}


def described(model: Model, names: Names) -> dict[str, tuple[int, str]]:
    return {model.path(name): version.described for name, version in names.items()}


def is_key(blob: Path, version: Version) -> bool:
    return content_key(version.data).hex() == blob.name


def run(fetcher: str, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: Model(fetcher),  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=steps,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
            phases=list(Phase) if EXAMPLES else [Phase.generate],  # shrinking takes minutes
        ),
    )


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_a_fetcher_in_this_process():
    run("inprocess", examples=60, steps=40)


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_a_fetcher_that_is_killed():
    run("auto", examples=14, steps=40)

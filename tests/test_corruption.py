"""Bad states of a cache, made by hand: whatever was damaged or lost, readers get right bytes, and the cache heals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from cachefs import CacheFileSystem
from cachefs.catalog import Catalog
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, content_key, snapshot_ref
from cachefs.errors import StaleObject
from cachefs.messages import Catalogued
from cachefs.store import Reader, Store, scrub
from cachefs_sidecar.testbed import stop_fetcher
from tests.command_line import script
from tests.test_fetcher import wait_until

# As many as make it sure that some are in each of two directories.
FILES = {f"d{n % 2}/{n}.jpg": random.Random(n).randbytes(5000 + n) for n in range(32)}
LARGE = random.Random(9).randbytes(BLOCK_SIZE) + b"the second block"


class Cache:
    """A local origin and a cache of it."""

    def __init__(self, folder: Path, *dirs: Path) -> None:
        self.root, self.dirs, self.home = folder / "origin", dirs, dirs[0]
        for name, data in FILES.items():
            file = self.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def path(self, name: str) -> str:
        return str(self.root / name)

    def reader(self, **options: Any) -> CacheFileSystem:
        return CacheFileSystem(
            target_protocol="file",
            cache_dir=[str(d) for d in self.dirs],
            deadline=100.0,
            skip_instance_cache=True,
            **options,
        )

    def connection(self) -> Connection:
        return Connection(CacheConfig.make(self.dirs, deadline=100), Session("file", {}, {}, root=str(self.root)))

    def ask(self, question: Callable[[Connection], Any]) -> Any:
        connection = self.connection()
        try:
            return question(connection)
        finally:
            connection.close()

    def make_catalog(self) -> Path:
        made = self.ask(lambda connection: connection.make_catalog())
        assert isinstance(made, Catalogued)
        assert made.files == len(FILES)
        return Path(made.file)

    def read(self, fs: CacheFileSystem | None = None) -> dict[str, bytes]:
        fs = fs or self.reader()
        return {name: fs.cat_file(self.path(name)) for name in FILES}

    def blobs(self) -> list[Path]:
        return sorted(file for d in self.dirs for file in (d / "blobs").glob("??/*") if file.suffix != ".blocks")

    def refs(self) -> list[Path]:
        return sorted(self.home.glob("refs/*/??/*"))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask(lambda connection: connection.status()).status
        return status

    def fetched(self) -> int:
        return int(self.status()["counters"]["origin_requests"])

    def log(self) -> str:
        return (self.home / "run" / "fetcher.log").read_text()

    def stop(self) -> None:
        stop_fetcher(self.home)

    def lose_origin(self) -> None:
        shutil.rmtree(self.root)


@pytest.fixture
def cache(tmp_path: Path, cache_dir: Path) -> Cache:
    return Cache(tmp_path, cache_dir)


def truncate(file: Path) -> None:
    file.chmod(0o600)
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    file.chmod(0o600)
    os.truncate(file, 0)


def grow(file: Path) -> None:
    file.chmod(0o600)
    with file.open("ab") as opened:
        opened.write(b"more")


def scribble(file: Path) -> None:
    """Bytes in the middle and at both ends, in place: hard links see them too."""
    file.chmod(0o600)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        for at in (0, size // 2, max(0, size - 16)):
            opened.seek(at)
            opened.write(b"\xa5 not as it was!")


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def remove(file: Path) -> None:
    file.unlink()


DAMAGES = [truncate, empty, grow, scribble, replace_by_directory, remove]


# --- what the cache knows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, empty, scribble, remove])
def test_a_damaged_catalog_is_listed_again(cache: Cache, damage: Callable[[Path], None]):
    before = cache.make_catalog()
    expected = before.read_bytes()
    damage(before)
    fs = cache.reader()
    assert cache.read(fs) == FILES
    assert fs.find(str(cache.root)) == sorted(cache.path(name) for name in FILES)
    with cache.root.joinpath("d0/new").open("wb"):
        pass  # what is listed now is the origin of now
    made = cache.ask(lambda connection: connection.make_catalog())
    assert made.files == len(FILES) + 1
    assert Path(made.file).read_bytes() != expected
    assert cache.log().count("the dataset is listed again") == 1
    assert cache.reader().exists(cache.path("d0/new"))
    assert cache.read() == FILES


def keep(record: Path) -> None:
    return


def as_written_before(record: Path) -> None:
    """By a version that did not note the last inode number."""
    fields = json.loads(record.read_bytes())
    del fields["last_id"]
    record.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "lose"),
    [(scribble, keep), (remove, keep), (truncate, as_written_before), (remove, as_written_before), (scribble, remove)],
)
def test_inode_numbers_are_not_used_again_after_a_damaged_catalog(
    cache: Cache, damage: Callable[[Path], None], lose: Callable[[Path], None]
):
    """A mount may still serve the catalog that is lost, and the kernel has pages under its numbers."""
    made = cache.make_catalog()
    with Catalog.open(made) as catalog:
        last = catalog.summary.last_id
    damage(made)
    (record,) = (cache.home / "datasets").glob("*.json")
    lose(record)
    with Catalog.open(cache.make_catalog()) as catalog:
        assert min(row.id for _, row in catalog.files()) > last
        last = catalog.summary.last_id
    assert json.loads(record.read_bytes())["last_id"] == last
    (cache.root / "new").write_bytes(b"")
    refreshed = cache.ask(lambda connection: connection.make_catalog(refresh=True))
    with Catalog.open(Path(refreshed.file)) as catalog:
        assert catalog.summary.last_id == last + 1  # and from there they go on one by one


@pytest.mark.needs_fuse
def test_a_mount_with_a_damaged_catalog_is_listed_again(cache: Cache, tmp_path: Path):
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    scribble(cache.make_catalog())
    cache.stop()
    script("mount", cache.root, mnt, "--cache-dir", cache.home).ok()
    try:
        assert {name: (mnt / name).read_bytes() for name in FILES} == FILES
    finally:
        script("umount", mnt).ok()
    assert cache.log().count("the dataset is listed again") == 1


def test_a_snapshot_that_is_lost_is_not_mixed_with_another(cache: Cache):
    served = cache.make_catalog()
    old = cache.reader()
    name = min(FILES)
    for round in range(5):
        (cache.root / name).write_bytes(b"round %d" % round)
        cache.ask(lambda connection: connection.make_catalog(refresh=True))
    served.unlink()
    for question in (old.cat_file, old.info, old.open):
        with pytest.raises(StaleObject, match="invalidate_cache"):
            question(cache.path(name))
    old.invalidate_cache()
    assert old.cat_file(cache.path(name)) == b"round 4"


@pytest.mark.parametrize("damage", [truncate, empty, scribble, replace_by_directory])
def test_a_damaged_index_costs_nothing_that_is_stored(cache: Cache, damage: Callable[[Path], None]):
    fs = cache.reader()
    assert cache.read(fs) == FILES
    cache.stop()
    for file in (cache.home / "index").glob("cache.db*"):
        damage(file)
    wait_until(lambda: cache.status()["scanned"])  # a fetcher answers before it has counted
    cache.lose_origin()
    assert cache.read(fs) == cache.read() == FILES
    assert damage is empty or "the index is damaged" in cache.log()


def test_an_index_damaged_while_it_is_used(cache: Cache):
    fs = cache.reader()
    assert cache.read(fs) == FILES
    for file in cache.refs():
        os.utime(file)  # so that every read asks the fetcher, and it the index
    scribble(cache.home / "index" / "cache.db")
    assert cache.read(fs) == FILES
    cache.stop()
    assert cache.read() == FILES


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": "file"}', "\0" * 100])
def test_a_damaged_dataset_record_costs_a_listing(cache: Cache, text: str):
    cache.make_catalog()
    assert cache.read() == FILES
    records = list((cache.home / "datasets").glob("*.json"))
    for record in records:
        record.write_text(text)
    assert cache.read() == FILES
    cache.make_catalog()
    assert cache.read() == FILES
    assert all(record.read_text() != text for record in records if record.stem in str(cache.refs()))


# --- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blobs_are_fetched_again(cache: Cache, damage: Callable[[Path], None], stopped: bool):
    fs = cache.reader()
    assert cache.read(fs) == FILES
    if stopped:
        cache.stop()
    for blob in cache.blobs():
        damage(blob)
    assert cache.read(fs) == FILES
    cache.lose_origin()
    assert cache.read(fs) == cache.read() == FILES


def dangle(ref: Path) -> None:
    ref.unlink()
    ref.symlink_to("nowhere")


def another_file(ref: Path) -> None:
    ref.unlink()
    ref.write_bytes(b"somebody's")


@pytest.mark.parametrize("damage", [dangle, another_file, replace_by_directory, remove])
def test_damaged_refs_are_misses(cache: Cache, damage: Callable[[Path], None]):
    fs = cache.reader()
    assert cache.read(fs) == FILES
    for ref in cache.refs():
        damage(ref)
    assert cache.read(fs) == FILES
    cache.stop()
    assert cache.read() == FILES


def test_a_time_in_the_future_costs_a_check_and_no_fetch(cache: Cache):
    fs = cache.reader()
    assert cache.read(fs) == FILES
    for blob in cache.blobs():
        os.utime(blob, (2**32, 2**32))  # in 2106
    cache.lose_origin()
    assert cache.read(fs) == FILES
    reader = Reader((cache.home,))
    for ref in cache.refs():
        assert reader.file(ref.parts[-3], ref.name), "not sealed again"


def test_readers_that_check_one_blob_at_once_do_not_take_each_other_for_damage(cache: Cache):
    """As after a boot: nothing is sealed, and everybody wants the same object."""
    fs, name = cache.reader(), min(FILES)
    assert fs.cat_file(cache.path(name)) == FILES[name]
    cache.lose_origin()
    (blob,) = cache.blobs()
    for _ in range(20):
        os.utime(blob)
        ranges = fs.cat_ranges([cache.path(name)] * 16, 0, None)
        assert ranges == [FILES[name]] * 16


def test_a_check_that_ends_during_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store.open(CacheConfig.make(tmp_path / "cache", min_free=0))
    key = store.put(b"content", links=[("d" * 32, "a" * 32)])
    os.utime(store.path(key))
    read = scrub._read

    def meanwhile(fd: int, size: int) -> list[bytes] | None:
        monkeypatch.setattr(scrub, "_read", read)
        assert store.check(key)
        return read(fd, size)

    monkeypatch.setattr(scrub, "_read", meanwhile)
    assert store.check(key)
    assert store.path(key).stat().st_mtime_ns == store.seal


# --- large objects ----------------------------------------------------------------------------------------------


@pytest.fixture
def large(cache: Cache) -> str:
    (cache.root / "large").write_bytes(LARGE)
    return cache.path("large")


PART, MAP = "*[!p]", "*.map"


@pytest.mark.parametrize("which", [PART, MAP])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_damaged_incomplete_object_is_fetched_again(
    cache: Cache, large: str, which: str, damage: Callable[[Path], None], stopped: bool
):
    fs = cache.reader()
    assert fs.cat_file(large, 0, 100) == LARGE[:100]
    if stopped:
        cache.stop()
    (part,) = (cache.home / "parts").glob(which)
    damage(part)
    assert fs.cat_file(large, 0, 100) == LARGE[:100]
    assert fs.cat_file(large) == LARGE
    assert cache.reader().cat_file(large) == LARGE


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_block_digests_are_made_again(cache: Cache, large: str, damage: Callable[[Path], None]):
    fs = cache.reader()
    assert fs.cat_file(large) == LARGE
    key = content_key(LARGE).hex()
    damage(cache.home / "blobs" / key[:2] / f"{key}.blocks")
    os.utime(cache.home / "blobs" / key[:2] / key)
    assert fs.cat_file(large) == LARGE
    assert cache.reader().cat_file(large) == LARGE


# --- directories and disks --------------------------------------------------------------------------------------


def taken_away(folder: Path) -> None:
    shutil.rmtree(folder)


def in_the_way(folder: Path) -> None:
    folder.rename(folder.with_name("aside"))
    folder.write_bytes(b"a file")


# A file in the place of a directory is refused at the start: it is the user's to settle.
@pytest.mark.parametrize(("lose", "stopped"), [(taken_away, False), (taken_away, True), (in_the_way, False)])
def test_one_of_two_directories_is_lost(tmp_path: Path, cache_dir: Path, lose: Callable[[Path], None], stopped: bool):
    second = tmp_path / "second"
    cache = Cache(tmp_path, cache_dir, second)
    fs = cache.reader()
    assert cache.read(fs) == FILES
    there = len(list(second.glob("blobs/??/*")))
    assert 0 < there < len(FILES)
    fetched = cache.fetched()
    if stopped:
        cache.stop()
        fetched = 0
    lose(second)
    assert cache.read(fs) == FILES
    assert cache.fetched() == fetched + there, "what was in the other directory was fetched again"
    if not stopped:
        assert list(cache.status()["out"]) == [str(second)]
    cache.lose_origin()
    assert cache.read(fs) == cache.read() == FILES


@pytest.mark.needs_root
def test_one_of_two_disks_turns_read_only(tmp_path: Path, cache_dir: Path):
    second = tmp_path / "second"
    second.mkdir()
    with tmpfs(second, "1m"):
        cache = Cache(tmp_path, cache_dir, second)
        fs = cache.reader()
        half = sorted(FILES)[: len(FILES) // 2]
        assert all(fs.cat_file(cache.path(name)) == FILES[name] for name in half)
        subprocess.run(["mount", "-o", "remount,ro", second], check=True)
        assert cache.read(fs) == FILES
        assert list(cache.status()["out"]) == [str(second)]
        cache.stop()


@pytest.mark.needs_root
def test_a_full_disk_makes_misses(tmp_path: Path, cache_dir: Path):
    cache_dir.mkdir()
    with tmpfs(cache_dir, "512k"):
        cache = Cache(tmp_path, cache_dir)
        fs = cache.reader()
        files = {f"{n}.bin": random.Random(n).randbytes(100_000) for n in range(8)}
        for name, data in files.items():
            (cache.root / name).write_bytes(data)
            assert fs.cat_file(cache.path(name)) == data
        stored = len(cache.blobs())
        assert 1 <= stored < len(files)
        filler = cache_dir / "somebody's"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            fill(file)
        again = cache.reader()
        for name, data in files.items():
            assert fs.cat_file(cache.path(name)) == again.cat_file(cache.path(name)) == data
        assert cache.read(fs) == FILES
        filler.unlink()
        cache.ask(lambda connection: connection.evict(str(cache.root)))
        (cache.root / "later").write_bytes(b"later")
        assert fs.cat_file(cache.path("later")) == b"later"
        assert [blob.name for blob in cache.blobs()] == [content_key(b"later").hex()]
        cache.stop()


def fill(file: FileIO) -> None:
    while True:
        file.write(bytes(4096))


class tmpfs:  # noqa: N801 - used as a with statement
    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size},mode=0700", "tmpfs", self.folder], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)


# --- processes and origins that end ---


def test_names_are_listed_again_when_the_fetcher_dies(cache: Cache):
    fs = cache.reader()
    for question in (fs.ls, fs.find, lambda path: fs.ls(path, refresh=True), lambda path: fs.find(path, maxdepth=1)):
        question(str(cache.root))
        assert stop_fetcher(cache.home, sign=signal.SIGKILL)
    fs.invalidate_cache()
    assert fs.ls(str(cache.root), detail=False) == [cache.path("d0"), cache.path("d1")]
    assert fs.find(str(cache.root)) == sorted(cache.path(name) for name in FILES)


@pytest.mark.parametrize("size", [5, BLOCK_SIZE + 5])
def test_what_the_snapshot_has_and_the_origin_no_more_is_stale(cache: Cache, size: int):
    """Not "no such file": the listing says that there is one."""
    file = cache.root / "gone"
    file.write_bytes(bytes(size))
    cache.ask(lambda connection: connection.make_catalog())
    fs = cache.reader()
    file.unlink()
    with pytest.raises(StaleObject, match=r"gone.*deleted.*cachefs refresh"):
        fs.cat_file(str(file))
    assert fs.exists(str(file))


# --- all at once ------------------------------------------------------------------------------------------------


def test_everything_but_the_marker_is_lost_under_readers(cache: Cache):
    """Sixteen threads read while somebody deletes what the cache has, again and again."""
    fs = cache.reader()
    assert cache.read(fs) == FILES
    with ThreadPoolExecutor(16) as pool:
        for victim in ("blobs", "refs", "index", "datasets"):
            readers = [pool.submit(cache.read, fs) for _ in range(16)]
            for path in (cache.home / victim).iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            assert all(reader.result() == FILES for reader in readers)
    assert cache.read() == FILES


def test_the_ref_of_another_object_is_never_served(cache: Cache):
    """A ref names exactly one object and version: two that change places would be wrong bytes, not misses."""
    refs = {snapshot_ref(cache.path(name), "g1"): name for name in FILES}
    fs = cache.reader()
    assert cache.read(fs) == FILES
    assert {ref.name for ref in cache.refs()} == refs.keys()
    for ref in cache.refs():
        assert ref.read_bytes() == FILES[refs[ref.name]]

"""The store and its reader: what is put is served whole, what is not intact is not served, nothing leaks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, block_range, content_key, digest, snapshot_ref, version_ref
from cachefs.errors import CacheError, CacheUnusable
from cachefs.store import Reader, Store, layout
from cachefs.store.folder import Folder

DATASET = "d5" * 16
OTHER = "07" * 16

# Until a file is on the disk, ext4 counts the metadata that it may need: st_blocks changes by some 4 KiB.
SLACK = 65536


def ref(number: int) -> str:
    return version_ref(f"bucket/{number}", "v1")


def config(*dirs: Path) -> CacheConfig:
    return CacheConfig.make(dirs, min_free=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(config(tmp_path / "cache"))


@pytest.fixture
def pair(tmp_path: Path) -> Store:
    return Store.open(config(tmp_path / "one", tmp_path / "two"))


def served(store: Store, name: str, dataset: str = DATASET) -> bytes | None:
    found = Reader(store.config.dirs).open(dataset, name)
    if found is None:
        return None
    fd, info = found
    with open(fd, "rb") as file:
        data = file.read()
    assert info.st_size == len(data)
    return data


def files_below(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def reboot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "boot") -> None:
    boot = tmp_path / name
    boot.write_text(f"00000000-{name}")
    monkeypatch.setattr(layout, "BOOT_ID", str(boot))


# --- the seal ---


def test_seal_is_in_whole_seconds_and_older_than_any_file() -> None:
    seal = layout.seal_ns()
    assert seal % 1_000_000_000 == 0
    assert 100_000_000 <= seal // 1_000_000_000 < 1_000_000_000
    assert seal == layout.seal_ns()


def test_seal_belongs_to_boot_and_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seals = {layout.seal_ns()}
    reboot(monkeypatch, tmp_path)
    seals.add(layout.seal_ns())
    monkeypatch.setattr(layout, "FORMAT", 2)
    seals.add(layout.seal_ns())
    assert len(seals) == 3


def test_without_a_boot_id_nothing_is_served_or_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put(b"x", links=[(DATASET, ref(1))])
    monkeypatch.setattr(layout, "BOOT_ID", str(tmp_path / "none"))
    assert served(store, ref(1)) is None
    with pytest.raises(CacheUnusable, match="mount /proc"):
        Store.open(store.config)


# --- blobs ---


@pytest.mark.parametrize("size", [0, 1, 110_000, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 12345])
def test_what_is_put_is_served(store: Store, size: int) -> None:
    data = os.urandom(size)
    key = store.put(data, links=[(DATASET, ref(1)), (OTHER, snapshot_ref("bucket/1", "g1"))])
    assert key == content_key(data)
    assert served(store, ref(1)) == data
    assert served(store, snapshot_ref("bucket/1", "g1"), OTHER) == data
    assert store.path(key).read_bytes() == data
    assert store.has(key)
    assert store.check(key)
    assert list(store.keys()) == [key]
    assert store.key_of(DATASET, ref(1)) == key
    blocks = Path(f"{store.path(key)}.blocks")
    if size > BLOCK_SIZE:
        ranges = [block_range(i, size) for i in range(-(-size // BLOCK_SIZE))]
        assert blocks.read_bytes() == b"".join(digest(data[a:b]) for a, b in ranges)
    else:
        assert not blocks.exists()


def test_a_blob_is_sealed_read_only_and_private(store: Store) -> None:
    old = os.umask(0o022)
    try:
        key = store.put(b"content", links=[(DATASET, ref(1))])
    finally:
        os.umask(old)
    info = store.path(key).stat()
    assert info.st_mtime_ns == store.seal
    assert stat.S_IMODE(info.st_mode) == 0o444
    assert info.st_nlink == 2
    assert info.st_atime > 1_500_000_000  # else each first read would write the inode
    home = store.config.home
    assert {stat.S_IMODE(d.stat().st_mode) for d in [home, *home.rglob("*")] if d.is_dir()} == {0o700}
    assert os.getxattr(store.path(key), "user.cachefs.key") == key.hex().encode()


def test_equal_content_is_stored_once(store: Store) -> None:
    keys = {store.put(b"same" * 5000, links=[(DATASET, ref(i))]) for i in range(5)}
    assert len(keys) == 1
    usage = store.usage()
    assert usage.blobs == 1
    assert usage.bytes == store.path(keys.pop()).stat().st_blocks * 512
    assert sorted(store.refs(DATASET)) == sorted(ref(i) for i in range(5))


def test_link_adds_and_replaces(store: Store) -> None:
    first, second = store.put(b"first", links=[(DATASET, ref(1))]), store.put(b"second", links=[(DATASET, ref(2))])
    assert store.link(second, [(DATASET, ref(3)), (OTHER, ref(3))])
    assert served(store, ref(3)) == b"second"
    assert store.link(second, [(DATASET, ref(1))])
    assert served(store, ref(1)) == b"second"
    assert not store.has(first), "a blob that lost its last ref must not stay"
    assert not store.link(first, [(DATASET, ref(9))])
    assert served(store, ref(9)) is None
    assert sorted(store.datasets()) == sorted([DATASET, OTHER])
    assert files_below(store.config.home / "tmp") == []


def test_put_replaces_what_a_ref_named(store: Store) -> None:
    first = store.put(b"first", links=[(DATASET, ref(1)), (DATASET, ref(2))])
    store.put(b"second", links=[(DATASET, ref(1))])
    assert (served(store, ref(1)), served(store, ref(2))) == (b"second", b"first")
    assert store.has(first)


def test_unlinking_the_last_ref_frees_the_blob(store: Store) -> None:
    data = os.urandom(BLOCK_SIZE + 5)
    key = store.put(data, links=[(DATASET, ref(1)), (OTHER, ref(1))])
    used = store.usage().bytes
    assert used >= len(data)
    assert store.unlink_ref(DATASET, ref(1)) == 0
    assert store.has(key)
    assert served(store, ref(1), OTHER) == data
    assert abs(store.unlink_ref(OTHER, ref(1)) - used) < SLACK
    assert not store.has(key)
    assert store.usage() == (0, 0)
    assert store.unlink_ref(OTHER, ref(1)) == 0
    assert files_below(store.config.home / "blobs", store.config.home / "refs") == []


def test_an_open_descriptor_outlives_eviction(store: Store) -> None:
    store.put(b"content", links=[(DATASET, ref(1))])
    found = Reader(store.config.dirs).open(DATASET, ref(1))
    assert found is not None
    store.unlink_ref(DATASET, ref(1))
    with open(found[0], "rb") as file:
        assert file.read() == b"content"


def test_a_dropped_blob_is_served_through_no_ref(store: Store) -> None:
    key = store.put(b"y" * 5000, links=[(DATASET, ref(1)), (DATASET, ref(2))])
    used = store.usage().bytes
    assert store.drop(key) == 0, "its refs still hold the bytes"
    assert served(store, ref(1)) is None
    assert not store.has(key)
    assert store.key_of(DATASET, ref(1)) is None
    assert store.unlink_ref(DATASET, ref(1)) == 0
    assert store.unlink_ref(DATASET, ref(2)) == used
    assert store.drop(key) == 0


def test_put_heals_refs_of_a_dropped_blob(store: Store) -> None:
    key = store.put(b"y", links=[(DATASET, ref(1)), (DATASET, ref(2))])
    store.drop(key)
    store.put(b"y", links=[(DATASET, ref(1))])
    assert served(store, ref(1)) == b"y"
    assert served(store, ref(2)) is None
    assert store.link(key, [(DATASET, ref(2))])
    assert served(store, ref(2)) == b"y"
    assert store.path(key).stat().st_nlink == 3


# --- damage ---


def damage(path: Path, at: int = 0) -> None:
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_any_write_to_a_blob_is_noticed(store: Store) -> None:
    key = store.put(b"content", links=[(DATASET, ref(1))])
    damage(store.path(key))
    assert served(store, ref(1)) is None
    assert Reader(store.config.dirs).file(DATASET, ref(1)) is None
    assert not store.check(key)


@pytest.mark.parametrize("size", [10, 2 * BLOCK_SIZE + 10])
def test_check_finds_damage_below_the_file_system(store: Store, size: int) -> None:
    data = os.urandom(size)
    key = store.put(data, links=[(DATASET, ref(1))])
    damage(store.path(key), size - 3)
    os.utime(store.path(key), ns=(0, store.seal))  # as a bad sector would: no mtime changes
    assert served(store, ref(1)) not in (None, data)
    assert not store.check(key)
    assert served(store, ref(1)) is None, "damaged: must not be served through any ref"
    assert store.put(data, links=[(DATASET, ref(1))]) == key
    assert served(store, ref(1)) == data
    assert store.check(key)
    assert store.usage().blobs == 1


def test_a_truncated_blob_is_damaged(store: Store) -> None:
    data = os.urandom(BLOCK_SIZE + 100)
    key = store.put(data, links=[(DATASET, ref(1))])
    os.truncate(store.path(key), BLOCK_SIZE)
    os.utime(store.path(key), ns=(0, store.seal))
    assert not store.check(key)


def test_lost_block_digests_are_found_again(store: Store) -> None:
    key = store.put(os.urandom(BLOCK_SIZE + 100), links=[(DATASET, ref(1))])
    blocks = Path(f"{store.path(key)}.blocks")
    good = blocks.read_bytes()
    damage(blocks)
    assert store.check(key)
    assert blocks.read_bytes() == good
    blocks.unlink()
    assert store.check(key)
    assert blocks.read_bytes() == good


def test_after_a_reboot_blobs_are_checked_before_they_are_served(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = store.put(b"content", links=[(DATASET, ref(1))])
    reboot(monkeypatch, tmp_path)
    assert served(store, ref(1)) is None
    again = Store.open(store.config)
    assert again.has(key)
    assert served(again, ref(1)) is None
    assert again.check(key)
    assert served(again, ref(1)) == b"content"


def test_put_checks_a_blob_of_an_earlier_boot(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    intact, torn = store.put(b"intact", links=[(DATASET, ref(1))]), store.put(b"torn", links=[(DATASET, ref(2))])
    inode = store.path(intact).stat().st_ino
    damage(store.path(torn))
    reboot(monkeypatch, tmp_path)
    again = Store.open(store.config)
    for number, data in enumerate([b"intact", b"torn"], 1):
        again.put(data, links=[(DATASET, ref(number))])
        assert served(again, ref(number)) == data
    assert again.path(intact).stat().st_ino == inode, "what is intact is not written again"


# --- names ---


@pytest.mark.parametrize("name", ["", "..", "../" * 10 + "ab", "ab", "AB" * 16, "g" * 32, "ab" * 15 + "a\n", "a/" * 16])
def test_only_hex_names_reach_the_disk(store: Store, name: str) -> None:
    before = files_below(store.config.home.parent)
    reader = Reader(store.config.dirs)
    assert reader.open(DATASET, name) is None
    assert reader.open(name, ref(1)) is None
    assert reader.file(name, name) is None
    with pytest.raises(CacheError, match="not a name"):
        store.put(b"x", links=[(DATASET, ref(1)), (DATASET, name)])
    with pytest.raises(CacheError):
        store.unlink_ref(name, ref(1))
    with pytest.raises(CacheError):
        list(store.refs(name))
    with pytest.raises(CacheError):
        store.part(name, 5)
    assert files_below(store.config.home.parent) == before


def test_a_key_has_16_bytes(store: Store) -> None:
    for key in (b"", b"short", bytes(17)):
        with pytest.raises(CacheError):
            store.has(key)
        with pytest.raises(CacheError):
            store.drop(key)


# --- what file systems differ in ---


def test_without_extended_attributes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> bytes:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "getxattr", refuse)
    data = os.urandom(BLOCK_SIZE + 7)
    key = store.put(data, links=[(DATASET, ref(1))])
    store.put(b"small", links=[(DATASET, ref(2))])
    assert store.key_of(DATASET, ref(1)) == key
    store.put(b"other", links=[(DATASET, ref(2))])
    assert store.usage().blobs == 2
    store.unlink_ref(DATASET, ref(1))
    assert not store.has(key)
    assert store.sweep() == 0
    assert served(store, ref(2)) == b"other"


def test_more_refs_than_a_file_may_have_links(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def few(source: str, target: str) -> None:
        if os.stat(source).st_nlink >= 4:
            raise OSError(errno.EMLINK, "too many links")
        link(source, target)

    monkeypatch.setattr(os, "link", few)
    for number in range(10):
        store.put(b"label", links=[(DATASET, ref(number))])
    assert [served(store, ref(n)) for n in range(10)] == [b"label"] * 10
    assert store.usage().blobs == 1
    assert store.sweep() == 0
    for number in range(10):
        store.unlink_ref(DATASET, ref(number))
    assert files_below(*(store.config.home / d for d in ("blobs", "refs", "tmp"))) == []


# --- several directories ---


def test_blobs_spread_and_refs_stay_with_them(pair: Store) -> None:
    for number in range(60):
        pair.put(b"%d" % number, links=[(DATASET, ref(number))])
    for folder in pair.live:
        blobs, refs = files_below(folder / "blobs"), files_below(folder / "refs")
        assert 10 < len(blobs) < 50
        assert {b.stat().st_ino for b in blobs} == {r.stat().st_ino for r in refs}
    assert [served(pair, ref(n)) for n in range(60)] == [b"%d" % n for n in range(60)]
    assert pair.usage().blobs == 60
    assert len(set(pair.refs(DATASET))) == 60
    assert list(pair.datasets()) == [DATASET]
    again = Store.open(pair.config)
    keys = list(again.keys())
    assert [again.path(key) for key in keys] == [pair.path(key) for key in keys]


def test_a_ref_moves_between_directories(pair: Store) -> None:
    for number in range(40):
        pair.put(b"%d" % number, links=[(DATASET, ref(1))])
        assert served(pair, ref(1)) == b"%d" % number
        assert len(files_below(*(d / "refs" for d in pair.live))) == 1
    assert pair.usage().blobs == 1


def test_a_blob_is_found_where_it_is_not_expected(pair: Store) -> None:
    alone = Store.open(config(pair.config.home))
    keys = [alone.put(b"%d" % n, links=[(DATASET, ref(n))]) for n in range(20)]
    assert all(pair.has(key) and pair.path(key).is_relative_to(pair.config.home) for key in keys)
    assert pair.put(b"3", links=[(DATASET, ref(100))]) == keys[3]
    assert pair.usage().blobs == 20


def test_a_damaged_blob_is_dropped_wherever_it_lies(pair: Store) -> None:
    """Its content goes to its first choice; the damaged one elsewhere must not stay beside it."""
    alone = Store.open(config(pair.config.home))
    for number in range(20):
        key = alone.put(b"%d" % number, links=[(DATASET, ref(number)), (OTHER, ref(number))])
        damage(alone.path(key))
        pair.put(b"%d" % number, links=[(DATASET, ref(number))])
        assert served(pair, ref(number)) == b"%d" % number
        assert len(list(pair.keys())) == number + 1


# --- sweeping ---


def test_sweep_removes_what_nobody_can_reach(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = store.put(os.urandom(BLOCK_SIZE + 1), links=[(DATASET, ref(1))])
    used = store.usage().bytes
    orphan = store.put(os.urandom(BLOCK_SIZE + 1))
    lost = store.put(b"lost", links=[(DATASET, ref(2)), (DATASET, ref(3))])
    store.drop(lost)
    stray = store.path(orphan).parent / ("ab" * 16 + ".blocks")
    stray.write_bytes(bytes(16))
    assert store.sweep() > BLOCK_SIZE
    assert not stray.exists()
    assert list(store.keys()) == [kept]
    assert list(store.refs(DATASET)) == [ref(1)]
    assert abs(store.usage().bytes - used) < SLACK
    reboot(monkeypatch, tmp_path)
    again = Store.open(store.config)
    assert again.sweep() == 0
    assert again.check(kept)


# --- readers ---


def test_a_reader_may_be_older_than_its_cache(tmp_path: Path) -> None:
    reader = Reader((tmp_path / "later",))
    assert reader.open(DATASET, ref(1)) is None
    Store.open(config(tmp_path / "later")).put(b"x", links=[(DATASET, ref(1))])
    assert reader.file(DATASET, ref(1)) is not None
    assert pickle.loads(pickle.dumps(reader)).file(DATASET, ref(1)) == reader.file(DATASET, ref(1))


def test_a_reader_survives_fork(store: Store) -> None:
    store.put(b"x", links=[(DATASET, ref(1))])
    reader = Reader(store.config.dirs)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(0 if reader.open(DATASET, ref(1)) else 1)
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_a_reader_leaks_no_descriptor(store: Store) -> None:
    key = store.put(b"x", links=[(DATASET, ref(1))])
    reader = Reader((*store.config.dirs, store.config.home))
    os.utime(store.path(key))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert reader.open(DATASET, ref(1)) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_needs_nothing_heavy() -> None:
    heavy = ("msgspec", "obstore", "fsspec", "diskcache", "asyncio", "json", "socket", "xxhash")
    code = f"import sys, cachefs.store; cachefs.store.Reader; print([m for m in {heavy} if m in sys.modules])"
    root = Path(layout.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


# --- threads ---


def test_a_ref_replaced_while_it_is_unlinked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the ref and the lock of its blob, another thread makes the ref name another blob."""
    store.put(b"old", links=[(DATASET, ref(1))])
    new = store.put(b"new")
    key_at = Folder.key_at
    to_replace = [ref(1)]

    def replacing(self: Folder, path: str, info: os.stat_result) -> str | None:
        found = key_at(self, path, info)
        if to_replace:
            store.link(new, [(DATASET, to_replace.pop())])
        return found

    monkeypatch.setattr(Folder, "key_at", replacing)
    store.unlink_ref(DATASET, ref(1))
    assert to_replace == []
    assert served(store, ref(1)) is None
    assert list(store.keys()) == [], "whichever blob the ref named, it must not stay behind without refs"


def run_threads(*targets: object) -> None:
    failures: list[BaseException] = []

    def guarded(target: object) -> None:
        try:
            target()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(t,)) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []


@pytest.mark.parametrize("size", [50_000, BLOCK_SIZE + 1])
def test_equal_content_put_at_once_becomes_one_blob(store: Store, size: int) -> None:
    for round in range(10 if size < BLOCK_SIZE else 2):
        data = os.urandom(size)
        barrier = threading.Barrier(8)

        def one(number: int, data: bytes = data, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            store.put(data, links=[(DATASET, ref(number))])

        run_threads(*(lambda n=round * 8 + i, f=one: f(n) for i in range(8)))
        assert store.path(content_key(data)).stat().st_nlink == 9
    assert files_below(store.config.home / "tmp") == []


@pytest.mark.parametrize("directories", [1, 2])
def test_puts_race_evictions_and_nothing_is_lost_or_leaked(tmp_path: Path, directories: int) -> None:
    store = Store.open(config(*(tmp_path / str(i) for i in range(directories))))
    contents = [os.urandom(5000) for _ in range(3)]
    names = [ref(n) for n in range(4)]
    reader = Reader(store.config.dirs)
    stop = threading.Event()

    def putter(seed: int) -> None:
        for i in range(300):
            store.put(contents[(seed + i) % 3], links=[(DATASET, names[(seed + i) % 3])])
            store.put(contents[i % 3], links=[(OTHER, names[(seed * i) % 4])])

    def evictor(seed: int) -> None:
        for i in range(300):
            store.unlink_ref(DATASET, names[(seed + i) % 3])
            store.unlink_ref(OTHER, names[i % 4])
            if i % 10 == 0:
                store.drop(content_key(contents[i % 3]))

    def read() -> None:
        while not stop.is_set():
            for i in range(3):
                found = reader.open(DATASET, names[i])
                if found is not None:
                    with open(found[0], "rb") as file:
                        assert file.read() == contents[i]

    watching = threading.Thread(target=read)
    watching.start()
    try:
        run_threads(*(lambda s=s, f=f: f(s) for f in (putter, evictor) for s in (0, 1)))
    finally:
        stop.set()
        watching.join(30)
    store.sweep()  # what lost a race for the same ref
    for dataset in (DATASET, OTHER):
        for name in set(store.refs(dataset)):
            key = store.key_of(dataset, name)
            assert key is not None
            assert store.check(key)
            assert served(store, name, dataset) in contents
    for dataset in (DATASET, OTHER):
        for name in list(store.refs(dataset)):
            store.unlink_ref(dataset, name)
    assert store.usage() == (0, 0)
    assert files_below(*(d / s for d in store.live for s in ("blobs", "refs", "tmp"))) == []


def test_the_store_says_what_came_onto_the_disk(store: Store) -> None:
    """Not what was there before, and less what it replaced; a large object that was written block by block, once."""
    one, two, large = (os.urandom(size) for size in (1 << 20, 2 << 20, BLOCK_SIZE + (1 << 20)))
    store.put(one, links=[(DATASET, ref(1))])
    assert store.arrived() == 1 << 20
    store.put(one, links=[(OTHER, ref(1)), (OTHER, ref(2))])
    assert store.arrived() == 0
    store.put(two, links=[(DATASET, ref(1))])
    assert store.arrived() == 2 << 20
    store.put(two, links=[(OTHER, ref(1)), (OTHER, ref(2))])
    assert abs(store.arrived() + (1 << 20)) < SLACK  # nothing names the first any more
    for number in range(2):
        part = store.part(ref(9), len(large))
        for block in (0, 1, 0):
            start, stop = block_range(block, len(large))
            part.write(block, large[start:stop])
        assert store.arrived() == len(large) + 4096  # and a map
        part.finish([(DATASET, ref(3 + number))])
        assert abs(store.arrived() + (len(large) if number else 0)) < SLACK
    store.path(content_key(one[:0] + two)).chmod(0o600)
    store.path(content_key(two)).write_bytes(two[:-1] + b"?")
    store.put(two, links=[(DATASET, ref(1)), (OTHER, ref(1)), (OTHER, ref(2))])
    assert abs(store.arrived()) < 2 * (1 << 20) + SLACK
    assert abs(store.usage().bytes - len(large) - len(two)) < SLACK


def test_many_that_put_the_same_count_once(store: Store) -> None:
    contents = [os.urandom(1 << 16) for _ in range(20)]

    def put(seed: int) -> None:
        for number, content in enumerate(contents):
            store.put(content, links=[(DATASET, ref(number * 10 + seed))])

    threads = [threading.Thread(target=put, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.arrived() == 20 << 16

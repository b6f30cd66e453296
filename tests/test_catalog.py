"""Catalog files: reading, numbering, damage, interruption and a full disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cachefs.catalog import ROOT, Builder, Catalog, Row, builder
from cachefs.catalog import format as catalog_format
from cachefs.catalog.builder import Cancelled
from cachefs.errors import CacheError, CacheFull, CatalogError, ObjectNotFound
from cachefs.messages import Entry
from cachefs_sidecar.testbed.catalogs import ROOT_PATH, entries, make_catalog


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A catalog of 5,000 files in 5 directories; nobody writes to it."""
    file = tmp_path_factory.mktemp("sample") / "c.sqlite"
    make_catalog(file, 5000).close()
    return file


@pytest.fixture
def catalog(sample):
    with Catalog.open(sample) as catalog:
        yield catalog


def row_of(catalog: Catalog, path: str) -> Row:
    row = catalog.find(path)
    assert row is not None
    return row


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- reading ---


def test_summary(catalog):
    summary = catalog.summary
    assert (summary.identity, summary.root) == ("s3", ROOT_PATH)
    assert (summary.files, summary.directories, summary.skipped) == (5000, 6, 0)
    assert summary.last_id == 5007
    sizes = sorted(entry.size for entry in entries(5000))
    assert summary.bytes == sum(sizes)
    assert abs(summary.median_size / sizes[2500] - 1) < 0.01
    assert abs(summary.created - time.time()) < 100


def test_every_entry_is_found(catalog):
    for entry in entries(5000):
        row = catalog.find(entry.path)
        assert row is not None
        assert (row.size, row.mtime_ns, row.version, row.directory) == (
            entry.size,
            entry.mtime_ns,
            entry.version,
            False,
        )
        assert catalog.get(row.id) == row
        assert catalog.object_path(row.id) == entry.path
    assert [path for path, _ in catalog.files()] == sorted(
        (entry.path for entry in entries(5000)), key=lambda path: (path.rpartition("/")[0], path)
    )


def test_what_is_not_there(catalog):
    assert catalog.lookup(ROOT, b"nothing") is None
    assert catalog.lookup(2**64 - 1, b"x") is None
    assert catalog.get(0) is None
    assert catalog.get(2**64 - 1) is None
    assert catalog.children(2**64 - 1) == []
    assert catalog.children(9999) == []
    assert catalog.find("bucket/imagenet2") is None
    assert catalog.find("bucket/imagenet/train//n00000000") is None
    assert catalog.find("bucket/imagenet//") is None
    assert catalog.find("bucket/imagenet/train//") is None
    assert catalog.find("bucket/imagenet/\ud800") is None
    with pytest.raises(ObjectNotFound, match="inode 9999"):
        catalog.object_path(9999)
    with pytest.raises(ObjectNotFound, match="imagenet/nothing"):
        list(catalog.files(f"{ROOT_PATH}/nothing"))


def test_the_root(catalog):
    for path in (ROOT_PATH, ROOT_PATH + "/"):
        assert catalog.find(path) == (ROOT, 0, b"", True, 0, 0, "")
    assert catalog.object_path(ROOT) == ROOT_PATH


@pytest.mark.parametrize("root", ["", "/", "/data"])
def test_roots_without_a_bucket(tmp_path, root):
    builder = Builder(tmp_path / "c", identity="i", root=root)
    path = {"": "bucket/d/a", "/": "/d/a", "/data": "/data/d/a"}[root]
    builder.add(Entry(path, 1, 1, "v"))
    with builder.seal() as catalog:
        assert [path for path, _ in catalog.files()] == [path]
        row = catalog.find(path)
        assert row is not None
        assert catalog.object_path(row.id) == path
        top = catalog.find(root)
        assert top is not None
        assert (top.id, catalog.object_path(ROOT)) == (ROOT, root)


def test_children_continue_where_the_cookie_says(catalog):
    train = catalog.find(f"{ROOT_PATH}/train")
    folder = catalog.children(train.id)[2]
    whole = catalog.children(folder.id)
    assert len(whole) == 1000
    assert [row.id for row in whole] == list(range(whole[0].id, whole[0].id + 1000))
    assert catalog.children(folder.id, whole[499].id) == whole[500:]
    assert catalog.children(folder.id, whole[499].id, 7) == whole[500:507]
    assert catalog.children(folder.id, whole[-1].id) == []


def test_files_of_a_directory_and_of_a_file(catalog):
    folder = f"{ROOT_PATH}/train/n00000003"
    assert [path for path, _ in catalog.files(folder)] == [
        path for path, _ in catalog.files() if path.startswith(folder + "/")
    ]
    one = f"{folder}/n00000003_17.JPEG"
    assert [path for path, _ in catalog.files(one)] == [one]


def test_remembered_directories_stay_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("cachefs.catalog.catalog._REMEMBERED", 10)
    builder = Builder(tmp_path / "c", identity="i", root="b")
    paths = [f"b/{i}/{j}/{k}/f" for i in range(5) for j in range(5) for k in range(5)]
    builder.add_all(Entry(path, 1, 1, "v") for path in paths)
    with builder.seal() as catalog:
        for path, row in catalog.files():
            assert catalog.object_path(row.id) == path
            assert len(catalog._folders) <= 10


def test_a_very_deep_name(tmp_path):
    path = "b/" + "d/" * 3000 + "f"
    builder = Builder(tmp_path / "c", identity="i", root="b")
    builder.add(Entry(path, 1, 1, "v"))
    with builder.seal() as catalog:
        ((found, row),) = catalog.files()
        assert found == path
        assert catalog.object_path(row.id) == path


def test_opening_reads_little(tmp_path):
    """Whatever the number of entries: here 2.5 MB of them."""
    file = tmp_path / "c"
    make_catalog(file, 20_000).close()

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    with Catalog.open(file) as catalog:
        assert catalog.summary.files == 20_000
        assert read_so_far() - before < 100_000 < file.stat().st_size


def test_threads_may_take_turns(catalog):
    found = []
    thread = threading.Thread(target=lambda: found.append(catalog.get(ROOT)))
    thread.start()
    thread.join()
    assert found == [catalog.get(ROOT)]


def test_closed(sample):
    catalog = Catalog.open(sample)
    catalog.close()
    with pytest.raises(CatalogError, match="closed"):
        catalog.get(ROOT)


def test_a_name_with_what_a_url_means(tmp_path):
    file = tmp_path / "a?mode=rw#b%41 c.sqlite"
    make_catalog(file, 10).close()
    with Catalog.open(file) as catalog:
        assert catalog.summary.files == 10


# --- damage ---


def test_not_a_catalog(tmp_path, sample):
    with pytest.raises(CatalogError, match="No such file"):
        Catalog.open(tmp_path / "missing")
    with pytest.raises(CatalogError, match="directory"):
        Catalog.open(tmp_path)
    file = tmp_path / "c"
    file.write_bytes(b"")
    with pytest.raises(CatalogError, match="0 bytes"):
        Catalog.open(file)
    file.write_bytes(os.urandom(5000))
    with pytest.raises(CatalogError, match="not a catalog"):
        Catalog.open(file)
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE x(y)")
    other.close()
    with pytest.raises(CatalogError, match="not a catalog"):
        Catalog.open(file)


def test_a_future_format_is_refused_and_left_alone(tmp_path, sample):
    file = tmp_path / "c"
    data = bytearray(sample.read_bytes())
    data[60:64] = (3).to_bytes(4, "big")
    file.write_bytes(data)
    with pytest.raises(CatalogError, match=r"format 3.*upgrade cachefs"):
        Catalog.open(file)
    assert file.read_bytes() == data


def test_unfinished(tmp_path, sample):
    file = tmp_path / "c"
    shutil.copy(sample, file)
    with sqlite3.connect(file) as database:
        database.execute("DELETE FROM summary")
    database.close()
    with pytest.raises(CatalogError, match="never finished"):
        Catalog.open(file)


def test_cut_short_or_too_long(tmp_path, sample):
    file = tmp_path / "c"
    data = sample.read_bytes()
    for length in [1, 50, 99, 100, 4096, len(data) // 2, len(data) - 4096, len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(CatalogError):
            Catalog.open(file)
    file.write_bytes(data + b"x")
    with pytest.raises(CatalogError, match="instead of"):
        Catalog.open(file)


def use_all_of_it(catalog: Catalog) -> None:
    for path, row in catalog.files():
        catalog.find(path)
        catalog.object_path(row.id)
    for id in range(1, catalog.summary.files, 97):
        catalog.get(id)
        catalog.lookup(id, b"n00000001_1.JPEG")
        list(catalog.named(id))
    list(catalog.skipped())


def test_damage_gives_catalog_errors_and_nothing_else(tmp_path):
    """Bytes changed at random places: an answer or a CatalogError, no other exception and no endless loop."""
    whole = tmp_path / "whole"
    make_catalog(whole, 1500).close()
    data = whole.read_bytes()
    file = tmp_path / "c"
    rng = random.Random(7)
    failed = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 30, 3000])):
            damaged[rng.randrange(100, len(data))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            with Catalog.open(file) as catalog:
                use_all_of_it(catalog)
        except (CatalogError, ObjectNotFound):
            failed += 1
    assert failed > 50


def test_a_page_of_zeros_while_it_is_open(tmp_path, sample):
    file = tmp_path / "c"
    shutil.copy(sample, file)
    with Catalog.open(file) as catalog:
        with open(file, "r+b") as stream:
            stream.seek(4096)
            stream.write(bytes(file.stat().st_size - 4096))
        with pytest.raises(CatalogError, match="damaged"):
            use_all_of_it(catalog)


def test_a_circle_of_directories(tmp_path):
    file = tmp_path / "c"
    builder = Builder(file, identity="i", root="b")
    builder.add(Entry("b/d/e/f", 1, 1, "v"))
    builder.seal().close()
    with sqlite3.connect(file) as database:
        database.execute("UPDATE entries SET parent = 3 WHERE id = 2")  # d below e, e below d
    database.close()
    with Catalog.open(file) as catalog:
        with pytest.raises(CatalogError, match="no path to the root"):
            catalog.object_path(4)
        assert list(catalog.files()) == []
        assert list(catalog.named(3)) == catalog.children(3)


# --- building ---


def test_sealing_leaves_one_file(tmp_path):
    make_catalog(tmp_path / "c", 100).close()
    assert leftovers(tmp_path) == ["c"]


def test_an_existing_catalog_stays_until_the_new_one_is_complete(tmp_path):
    file = tmp_path / "c"
    old = make_catalog(file, 100)
    builder = Builder(file, identity="s3", root=ROOT_PATH, previous=old)
    builder.add_all(entries(50))
    with Catalog.open(file) as seen:
        assert seen.summary.files == 100
    new = builder.seal()
    assert (old.summary.files, len(list(old.files()))) == (100, 100)  # open readers keep theirs
    assert (new.summary.files, len(list(new.files()))) == (50, 50)


def test_an_empty_dataset(tmp_path):
    with Builder(tmp_path / "c", identity="i", root="b").seal() as catalog:
        assert catalog.children(ROOT) == []
        assert list(catalog.files()) == []
        assert catalog.summary.median_size == 0


def test_markers_give_their_time_to_directories_in_any_order(tmp_path):
    marker, implied, listed = Entry("b/d/", 0, 7, "v"), Entry("b/d/f", 1, 1, "v"), Entry("b/d", 0, 0, "", True)
    for number, order in enumerate([(marker, implied, listed), (listed, implied, marker), (implied, marker, listed)]):
        builder = Builder(tmp_path / str(number), identity="i", root="b")
        builder.add_all(order)
        with builder.seal() as catalog:
            assert row_of(catalog, "b/d")[3:] == (True, 0, 7, "")


def test_times_outside_of_what_can_be_stored(tmp_path):
    builder = Builder(tmp_path / "c", identity="i", root="b")
    builder.add(Entry("b/f", 1, 2**70, "v"))
    builder.add(Entry("b/g", 1, -(2**70), "v"))
    with builder.seal() as catalog:
        assert row_of(catalog, "b/f").mtime_ns == 2**63 - 1
        assert row_of(catalog, "b/g").mtime_ns == -(2**63 - 1)


def test_equal_sizes_have_an_exact_median(tmp_path):
    builder = Builder(tmp_path / "c", identity="i", root="b")
    builder.add_all(Entry(f"b/{i}", 114_660, 1, "v") for i in range(10))
    with builder.seal() as catalog:
        assert catalog.summary.median_size == 114_660


def test_a_removed_and_returned_object_has_a_new_number(tmp_path):
    here = Entry("b/f", 1, 1, "v")
    ids = []
    previous = None
    for number, listed in enumerate([[here], [], [here]]):
        builder = Builder(tmp_path / str(number), identity="i", root="b", previous=previous)
        builder.add_all(listed)
        previous = builder.seal()
        if listed:
            ids.append(row_of(previous, "b/f").id)
    assert ids == [2, 3]


def test_a_damaged_previous_catalog_costs_the_numbers_only(tmp_path, caplog):
    file = tmp_path / "old"
    old = make_catalog(file, 1000)
    with open(file, "r+b") as stream:
        stream.seek(8192)
        stream.write(b"\xff" * (file.stat().st_size - 3 * 4096))
    new = make_catalog(tmp_path / "new", 1000, previous=old)
    assert new.summary.files == 1000
    assert min(row.id for _, row in new.files()) > old.summary.last_id
    assert "inode numbers" in caplog.text


def test_the_snapshot_follows_names_sizes_and_versions_only(tmp_path):
    base = Entry("b/d/f", 5, 1, "v1")
    snapshots = {}
    for number, listed in enumerate(
        [
            [base],
            [Entry("b/d/f", 6, 1, "v1")],
            [Entry("b/d/f", 5, 1, "v2")],
            [Entry("b/d/g", 5, 1, "v1")],
            [Entry("b/df", 5, 1, "v1")],
            [base, Entry("b/e/", 0, 1, "v")],
            [base, Entry("b/d/f/", 0, 1, "v")],
            [],
        ]
    ):
        builder = Builder(tmp_path / str(number), identity="i", root="b")
        builder.add_all(listed)
        with builder.seal() as catalog:
            snapshots[catalog.summary.snapshot] = number
    assert len(snapshots) == 8
    same = Builder(tmp_path / "same", identity="i", root="b")
    same.add(Entry("b/d/f", 5, 2, "v1"))  # another time
    same.add(Entry("b/d/", 0, 9, "v"))  # a marker of a directory that is there anyway
    same.add(Entry("b//", 0, 9, "v"))  # something that is not served
    with same.seal() as catalog:
        assert snapshots[catalog.summary.snapshot] == 0


def test_directories_known_while_listing_stay_bounded(tmp_path):
    builder = Builder(tmp_path / "c", identity="i", root="b")
    for number in range(5000):
        builder.add(Entry(f"b/{number}/f", 1, 1, "v"))
        assert len(builder._staging._folders_known) <= 1001
    assert builder.seal().summary.directories == 5000


# --- interruption ---


def test_close_and_go_on(tmp_path):
    file = tmp_path / "c"
    first = Builder(file, identity="s3", root=ROOT_PATH)
    first.add_all(list(entries(3000))[:1500])
    first.checkpoint("one", 1500, 99)
    first.close()
    first.close()
    second = Builder(file, identity="s3", root=ROOT_PATH)
    assert second.finished("one") == (1500, 99)
    assert second.finished("two") is None
    second.add_all(list(entries(3000))[1400:])
    with second.seal() as catalog, make_catalog(tmp_path / "at once", 3000) as whole:
        assert catalog.summary._replace(created=0) == whole.summary._replace(created=0)
        assert list(catalog.files()) == list(whole.files())
    second.close()
    assert leftovers(tmp_path) == ["at once", "c"]


@pytest.mark.parametrize(
    "change",
    [{"identity": "other"}, {"root": "bucket"}, {"resume": False}],
)
def test_what_is_not_continued(tmp_path, change):
    arguments: dict[str, Any] = {"identity": "s3", "root": ROOT_PATH, "resume": True}
    first = Builder(tmp_path / "c", **arguments)
    first.add_all(entries(10))
    first.checkpoint("one")
    first.close()
    second = Builder(tmp_path / "c", **(arguments | change))
    assert second.finished("one") is None
    assert second.seal().summary.files == 0


def test_an_old_listing_is_not_continued(tmp_path, monkeypatch):
    first = Builder(tmp_path / "c", identity="i", root="b")
    first.checkpoint("one")
    first.close()
    now = time.time()
    for later, expected in ((3500, (0, 0)), (7200, None), (-100, None)):
        monkeypatch.setattr("cachefs.catalog.staging.time.time", lambda later=later: now + later)
        again = Builder(tmp_path / "c", identity="i", root="b")
        assert again.finished("one") == expected
        again._staging._database.close()  # as if killed: nothing is committed


@pytest.mark.parametrize("damage", ["rubbish", "empty", "future", "directory of zeros"])
def test_a_damaged_unfinished_listing_is_begun_again(tmp_path, damage):
    first = Builder(tmp_path / "c", identity="i", root="b")
    first.add_all(Entry(f"b/{i}", 1, 1, "v") for i in range(2000))
    first.checkpoint("one")
    first.close()
    building = tmp_path / "c.building"
    if damage == "future":
        with sqlite3.connect(building) as database:
            database.execute("PRAGMA user_version = 2")
        database.close()
    else:
        size = building.stat().st_size
        building.write_bytes({"rubbish": os.urandom(size), "empty": b""}.get(damage, bytes(size)))
    second = Builder(tmp_path / "c", identity="i", root="b")
    assert second.finished("one") is None
    assert second.seal().summary.files == 0


def test_damage_found_late_is_not_met_again(tmp_path):
    first = Builder(tmp_path / "c", identity="i", root="b")
    first.add_all(Entry(f"b/{i}", 1, 1, "v") for i in range(5000))
    first.close()
    building = tmp_path / "c.building"
    with open(building, "r+b") as stream:
        stream.seek(12 * 4096)
        stream.write(b"\xff" * (building.stat().st_size - 12 * 4096))
    second = Builder(tmp_path / "c", identity="i", root="b")
    with pytest.raises(CatalogError):
        second.seal()
    second.close()
    assert leftovers(tmp_path) == []


def test_two_at_once_are_refused(tmp_path):
    first = Builder(tmp_path / "c", identity="i", root="b")
    script = (
        "import sys; from pathlib import Path; from cachefs.catalog import Builder\n"
        "Builder(Path(sys.argv[1]), identity='i', root='b')"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path / "c"], capture_output=True, text=True)
    assert "another process is listing this dataset" in result.stderr
    first.add(Entry("b/f", 1, 1, "v"))
    assert first.seal().summary.files == 1


def test_killed_while_listing(tmp_path):
    """kill -9 at any moment: the next run continues from the last commit and ends with the same catalog."""
    script = """
import sys
from pathlib import Path
from typing import Any
from cachefs.catalog import Builder, staging
from cachefs_sidecar.testbed.catalogs import ROOT_PATH, entries
staging._COMMIT_SECONDS = 0.0
builder = Builder(Path(sys.argv[1]), identity="s3", root=ROOT_PATH)
for number, entry in enumerate(entries(10**9)):
    builder.add(entry)
    if number % 100 == 99:
        builder.checkpoint(str(number))
        if number == 4999:
            print("ready", flush=True)
"""
    file = tmp_path / "c"
    process = subprocess.Popen(
        [sys.executable, "-c", script, file], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    builder = Builder(file, identity="s3", root=ROOT_PATH)
    done = 4999
    while builder.finished(str(done + 100)):
        done += 100
    with builder.seal() as catalog:
        assert [path for path, _ in catalog.files()] == sorted(e.path for e in entries(done + 1))
    assert leftovers(tmp_path) == ["c"]


def test_a_failed_seal_can_be_repeated(tmp_path, monkeypatch):
    """No room for the catalog: said so, nothing half made is left, and the listing is not lost."""
    file = tmp_path / "c"
    first = Builder(file, identity="i", root="b")
    first.add_all(Entry(f"b/{i}", 1, 1, "v") for i in range(2000))
    first.add(Entry("b/7/x", 1, 1, "v"))  # makes seal skip the object b/7
    first.checkpoint("one")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "SCHEMA", "PRAGMA max_page_count = 20;" + catalog_format.SCHEMA)
        with pytest.raises(CacheFull, match="no space left"):
            first.seal()
    assert leftovers(tmp_path) == ["c.building"] or leftovers(tmp_path) == ["c.building", "c.building-journal"]
    with monkeypatch.context() as patch:
        patch.setattr("cachefs.catalog.builder.os.fsync", fail_with_eio)
        with pytest.raises(CacheError, match="Input/output error"):
            first.seal()
    first.close()
    assert leftovers(tmp_path) == ["c.building"]
    with sqlite3.connect(tmp_path / "c.building") as database:  # what the failed seals noted is not kept
        assert database.execute("SELECT (SELECT count(*) FROM folders), (SELECT count(*) FROM skipped)").fetchall() == [
            (0, 0)
        ]
    database.close()
    second = Builder(file, identity="i", root="b")
    assert second.finished("one") == (0, 0)
    with second.seal() as catalog:
        assert catalog.summary.files == 2000
        assert [name for name, _ in catalog.skipped()] == ["b/7"]


def fail_with_eio(descriptor: int) -> None:
    raise OSError(5, os.strerror(5))


def test_no_room_while_listing(tmp_path):
    first = Builder(tmp_path / "c", identity="i", root="b")
    first.checkpoint("x", 7, 8)
    first._staging.commit()
    first._staging._database.execute("PRAGMA max_page_count = 30")
    with pytest.raises(CacheFull, match="no space left"):
        first.add_all(Entry(f"b/{i}", 1, 1, "v") for i in range(10_000))
    first.close()
    second = Builder(tmp_path / "c", identity="i", root="b")
    second.add(Entry("b/f", 1, 1, "v"))
    assert second.finished("x") == (7, 8)
    second.discard()
    assert leftovers(tmp_path) == []


def test_a_directory_that_cannot_be_written(tmp_path):
    with pytest.raises(CacheError, match="unable to open"):
        Builder(tmp_path / "missing" / "c", identity="i", root="b")


def test_cancelled_while_sealing(tmp_path):
    file = tmp_path / "c"
    first = Builder(file, identity="i", root="b")
    first.add_all(Entry(f"b/{i}", 1, 1, "v") for i in range(3000))
    first.add(Entry("b/7/x", 1, 1, "v"))
    first.cancel()
    with pytest.raises(Cancelled):
        first.seal()
    first.close()
    assert leftovers(tmp_path) == ["c.building"]
    second = Builder(file, identity="i", root="b")
    second.discard()


def test_memory_does_not_grow_with_the_count(tmp_path):
    """Building 60,000 entries after 20,000 in a fresh process adds less than 100 bytes each."""
    script = """
import sys
from pathlib import Path
from typing import Any
from cachefs.catalog import staging, builder
staging.CACHE_KIB = builder.CACHE_KIB = 256
from cachefs_sidecar.testbed.catalogs import make_catalog
# Not ru_maxrss: that goes on, across exec, from what the process that started this one took.
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
make_catalog(Path(sys.argv[1], "a"), 20_000)
before = peak()
make_catalog(Path(sys.argv[1], "b"), 80_000)
print((peak() - before) / 60_000)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert float(result.stdout) < 25

"""Content keys of a whole dataset: the right ones, each object read once, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.digest import BLOCK_SIZE, content_key
from cachefs_sidecar.testbed import S3Server
from tests.command_line import CommandLine, credentials, s3, script_of
from tests.conftest import ThrottledBucket
from tests.dask_cluster import DaskCluster

OBJECTS = 60


@pytest.fixture(scope="module")
def dask(s3_server: S3Server) -> Iterator[DaskCluster]:
    with DaskCluster(credentials(s3_server.options)) as cluster:
        yield cluster


@pytest.fixture
def photos(throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch) -> ThrottledBucket:
    for number in range(OBJECTS):
        throttled.put(f"set/c{number % 7}/{number:02d}.jpg", content(number))
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    return throttled


def content(number: int) -> bytes:
    return b"%d" % number * 100


def keys_of(home: Path) -> dict[str, bytes | None]:
    """Content keys by the last part of the name, of the one dataset that there is."""
    (record,) = datasets.load_all(home)
    file = datasets.catalog_file(home, record)
    assert file is not None
    with Catalog.open(file) as catalog:
        return {path.rpartition("/")[2]: catalog.key(row.id) for path, row in catalog.files()}


RIGHT = {f"{number:02d}.jpg": content_key(content(number)) for number in range(OBJECTS)}


def leftovers(home: Path) -> list[str]:
    return [file.name for file in home.glob("catalogs/*/*") if file.suffix != ".sqlite" or len(file.stem) != 32]


def test_every_key_and_each_object_read_once(
    cachefs: CommandLine, photos: ThrottledBucket, dask: DaskCluster, cache_dir: Path
):
    large = os.urandom(BLOCK_SIZE + 1000)
    photos.put("set/large.tar", large)
    photos.put("set/empty", b"")
    url = f"{photos.url}/set"
    done = cachefs("seal", url, *s3(photos.options), *dask.options, "--batch", "10", "--json").ok().json
    assert (done["files"], done["sealed"], done["read"], done["unsealed"]) == (OBJECTS + 2, OBJECTS + 2, OBJECTS + 2, 0)
    assert keys_of(cache_dir) == RIGHT | {"large.tar": content_key(large), "empty": content_key(b"")}
    reads = photos.reads
    # Two blocks; obstore refuses how this server answers ranges, and then they are asked for in another way.
    assert reads.pop("set/large.tar") in (2, 3, 4)
    assert set(reads.values()) == {1}
    assert leftovers(cache_dir) == []
    photos.throttle.reset()
    again = cachefs("seal", url, *s3(photos.options), "--json").ok().json
    assert (again["sealed"], again["read"]) == (OBJECTS + 2, 0)
    assert not photos.reads


def test_what_changed_since_the_listing_is_named(cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path):
    url = f"{photos.url}/set"
    cachefs("index", url, *s3(photos.options)).ok()
    photos.put("set/c0/00.jpg", b"another")
    photos.delete("set/c1/01.jpg")
    failed = cachefs("seal", url, *s3(photos.options))
    assert failed.code == 1
    assert "00.jpg" in failed.err
    assert "01.jpg" in failed.err
    assert "58 files sealed; 2 not" in failed.said
    assert keys_of(cache_dir) == RIGHT | {"00.jpg": None, "01.jpg": None}
    # What is sealed stays so over a refresh, and only what is new is read.
    cachefs("refresh", url, *s3(photos.options)).ok()
    photos.throttle.reset()
    assert cachefs("seal", url, *s3(photos.options), "--json").ok().json["read"] == 1
    assert photos.reads == {"set/c0/00.jpg": 1}
    rest = {name: key for name, key in RIGHT.items() if name != "01.jpg"}
    assert keys_of(cache_dir) == rest | {"00.jpg": content_key(b"another")}


def test_a_part_of_a_dataset(cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path):
    cachefs("index", f"{photos.url}/set", *s3(photos.options)).ok()
    assert cachefs("seal", f"{photos.url}/set/c3", *s3(photos.options), "--json").ok().json["sealed"] == 9
    assert sum(key is not None for key in keys_of(cache_dir).values()) == 9
    cachefs("seal", f"{photos.url}/set/c8", *s3(photos.options)).failed(3, "c8", "refresh")


def wait_for_reads(photos: ThrottledBucket, count: int, process: subprocess.Popen[str]) -> None:
    while sum(photos.reads.values()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def wait_until_kept(cache_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until keys that were gathered would outlive the process."""
    copy = cache_dir.with_name("gathered")
    while True:
        assert process.poll() is None, process.communicate()
        # The file is its process's alone while that lives. One that was copied while it was written is no database.
        with contextlib.suppress(OSError, ValueError, sqlite3.DatabaseError):
            (file,) = cache_dir.glob("catalogs/*/gathered.keys")
            shutil.copy(file, copy)
            with contextlib.closing(sqlite3.connect(copy)) as database:
                if database.execute("SELECT count(*) FROM keys").fetchone() > (0,):
                    return
        time.sleep(0.01)


def command(photos: ThrottledBucket, cache_dir: Path, *more: str) -> list[str]:
    url = f"{photos.url}/set"
    return [*script_of("seal", url, *s3(photos.options)), "-d", str(cache_dir), "--batch", "4", "--json", *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    done: dict[str, Any] = json.loads(out)
    return done


def test_a_dask_worker_that_is_killed(photos: ThrottledBucket, cache_dir: Path):
    with DaskCluster() as own:
        photos.throttle.set(latency=2.0)  # so it is not done before one is killed
        process = start(command(photos, cache_dir, *own.options))
        wait_for_reads(photos, 10, process)
        os.kill(own.pids[0], signal.SIGKILL)
        photos.throttle.set(latency=0)
        photos.throttle.let_pass()
        assert end(process)["sealed"] == OBJECTS
    assert max(photos.reads.values()) <= 2
    assert keys_of(cache_dir) == RIGHT


def test_a_process_that_is_killed(photos: ThrottledBucket, cache_dir: Path):
    photos.throttle.set(latency=2.0)  # so it is not done before one is killed
    process = start(command(photos, cache_dir))
    wait_for_reads(photos, 4, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    photos.throttle.set(latency=0)
    photos.throttle.let_pass()
    assert end(process)["sealed"] == OBJECTS
    assert max(photos.reads.values()) <= 2
    assert keys_of(cache_dir) == RIGHT


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [
        pid for pid in map(int, text.split()) if b"cachefs.batch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_a_command_that_is_killed_goes_on(photos: ThrottledBucket, cache_dir: Path):
    photos.throttle.set(latency=1.2)  # what was hashed is kept after a second
    process = start(command(photos, cache_dir))
    wait_until_kept(cache_dir, process)
    process.kill()
    process.communicate()
    before = photos.reads
    photos.throttle.set(latency=0)
    done = end(start(command(photos, cache_dir)))
    assert done["sealed"] == OBJECTS
    assert done["read"] < OBJECTS
    assert sum(photos.reads.values()) <= sum(before.values()) + done["read"]
    assert max(photos.reads.values()) <= 2
    assert keys_of(cache_dir) == RIGHT


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_ctrl_c_keeps_what_was_done(photos: ThrottledBucket, cache_dir: Path, dask: DaskCluster, engine: str):
    more = dask.options if engine == "dask" else ()
    photos.throttle.set(latency=1.2)
    process = start(command(photos, cache_dir, *more))
    wait_until_kept(cache_dir, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "cachefs: interrupted; what was done until now stays done\n"
    photos.throttle.set(latency=0)
    done = end(start(command(photos, cache_dir)))
    assert done["sealed"] == OBJECTS
    assert done["read"] < OBJECTS


def test_two_at_once(photos: ThrottledBucket, cache_dir: Path, cachefs: CommandLine):
    photos.throttle.set(latency=2.0)
    process = start(command(photos, cache_dir))
    wait_for_reads(photos, 4, process)
    process.send_signal(signal.SIGSTOP)  # it is not done before the other one has looked
    try:
        cachefs("seal", f"{photos.url}/set", *s3(photos.options)).failed(4, "another process is sealing")
    finally:
        process.send_signal(signal.SIGCONT)
    photos.throttle.set(latency=0)
    assert end(process)["sealed"] == OBJECTS


def test_a_sealed_dataset_finds_what_another_has_stored(cachefs: CommandLine, tmp_path: Path, cache_dir: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    large = os.urandom(BLOCK_SIZE + 1000)
    for folder, name in ((one, "a"), (two, "b")):
        folder.mkdir()
        (folder / f"{name}.jpg").write_bytes(b"same" * 1000)
        (folder / f"{name}.tar").write_bytes(large)
    cachefs("warm", one).ok()
    cachefs("seal", two).ok()
    for file in two.iterdir():
        file.unlink()
    done = cachefs("warm", two, "--json").ok().json
    assert (done["objects"], done["failed"]) == (2, 0)


def blobs(home: Path) -> set[bytes]:
    return {bytes.fromhex(file.name) for file in home.glob("blobs/*/*") if file.suffix != ".blocks"}


def test_what_is_damaged_on_its_way_is_read_again(cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path):
    url = f"{photos.url}/set"
    cachefs("seal", url, *s3(photos.options)).ok()
    photos.throttle.reset()
    photos.throttle.flip("*/07.jpg", at=3, times=1)
    photos.throttle.flip("*/08.jpg", at=3, times=1)
    photos.throttle.flip("*/08.jpg", at=4, times=1)
    failed = cachefs("warm", url, *s3(photos.options))
    assert failed.code == 1
    assert "08.jpg: came with other bytes each time" in failed.err
    assert blobs(cache_dir) == set(RIGHT.values()) - {RIGHT["08.jpg"]}
    assert {name: count for name, count in photos.reads.items() if count > 1} == {
        "set/c0/07.jpg": 2,
        "set/c1/08.jpg": 2,
    }


def test_an_origin_that_keeps_versions_and_changes_bytes_is_served_as_it_is(
    cachefs: CommandLine, tmp_path: Path, cache_dir: Path
):
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / "a"
    file.write_bytes(b"one")
    cachefs("seal", folder).ok()
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    cachefs("warm", folder).ok()
    assert blobs(cache_dir) == {content_key(b"two")}


def test_so_is_what_is_damaged_of_a_large_object(cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path):
    """Its last block shows it."""
    large = {name: os.urandom(BLOCK_SIZE + 1000) for name in ("first", "second", "third")}
    for name, data in large.items():
        photos.put(f"set/{name}/x.tar", data)
    url = f"{photos.url}/set"
    cachefs("seal", url, *s3(photos.options)).ok()
    cachefs("warm", f"{url}/first", *s3(photos.options)).ok()  # from now on answers to ranges are not refused
    photos.throttle.reset()
    photos.throttle.flip("*/second/x.tar", at=3, times=1)
    cachefs("warm", f"{url}/second", *s3(photos.options)).ok()
    photos.throttle.flip("*/third/x.tar", at=3, times=2)
    photos.throttle.flip("*/third/x.tar", at=4, times=2)
    failed = cachefs("warm", f"{url}/third", *s3(photos.options))
    assert failed.code == 1
    assert "x.tar: came with other bytes each time" in failed.err
    assert photos.reads == {"set/second/x.tar": 4, "set/third/x.tar": 4}
    assert blobs(cache_dir) == {content_key(large["first"]), content_key(large["second"])}
    assert not list((cache_dir / "parts").iterdir())


def test_a_large_object_that_is_another_one_is_served_as_the_origin_has_it(
    cachefs: CommandLine, tmp_path: Path, cache_dir: Path
):
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / "a"
    file.write_bytes(bytes(BLOCK_SIZE + 1))
    cachefs("seal", folder).ok()
    times = file.stat()
    other = os.urandom(BLOCK_SIZE + 1)
    file.write_bytes(other)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    cachefs("warm", folder).ok()
    assert blobs(cache_dir) == {content_key(other)}

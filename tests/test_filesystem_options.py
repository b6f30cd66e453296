"""What an instance is made of: options, origins of this process, and what of them travels to other processes."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from cachefs import CacheFileSystem
from cachefs.errors import (
    ConfigError,
    OriginAccessDenied,
    UnsupportedOrigin,
)
from cachefs.fetcher.embedded import stop_embedded
from cachefs.fetcher.storeless import NoStore
from cachefs.store import Store
from tests.filesystems import FILES, Make, inprocess_home, local, make, seeded
from tests.machine import Bucket

__all__ = ["inprocess_home", "local", "make", "seeded"]

# --- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "target_protocol"),
        ({"target_protocol": "s3", "fs": MemoryFileSystem()}, "not both"),
        ({"fs": MemoryFileSystem(), "target_options": {"x": 1}}, "target_options"),
        ({"target_protocol": "s3", "anon": True}, "anon"),
        ({"target_protocol": "memory", "fetcher": "auto"}, "inprocess"),
        ({"target_protocol": "s3", "cache_size": "12Q"}, "12Q"),
        ({"target_protocol": "s3", "fetcher": "never"}, "never"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], complaint: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=complaint):
        CacheFileSystem(cache_dir=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_unknown_protocols(tmp_path: Path):
    with pytest.raises(UnsupportedOrigin, match="s4"):
        CacheFileSystem(target_protocol="s4", cache_dir=tmp_path / "cache")
    with pytest.raises(UnsupportedOrigin, match="cache"):
        CacheFileSystem(target_protocol="cachefs", cache_dir=tmp_path / "cache")


def test_wrong_credentials_are_said_and_not_shown(seeded: Bucket, cache_dir: Path):
    options = seeded.options | {"secret": "wrong-and-private"}
    fs = CacheFileSystem(target_protocol="s3", target_options=options, cache_dir=cache_dir)
    for ask in (fs.cat_file, fs.info, fs.open, fs.ls):
        with pytest.raises(OriginAccessDenied) as caught:
            ask(f"{seeded.name}/a.txt")
        assert "private" not in str(caught.value)
    assert "private" not in repr(fs)


def test_one_instance_for_one_origin(cache_dir: Path):
    """`fo` differs for every URL of a chain, and must not make an instance each."""
    options = {"target_protocol": "file", "cache_dir": str(cache_dir)}
    assert fsspec.filesystem("cachefs", fo="/a", **options) is fsspec.filesystem("cachefs", fo="/b", **options)
    fs, path = fsspec.url_to_fs("cachefs::file:///a/b", cachefs={"cache_dir": str(cache_dir)})
    assert path == "/a/b"
    assert fsspec.url_to_fs("cachefs::file:///a/c", cachefs={"cache_dir": str(cache_dir)})[0] is fs


def test_construction_asks_nobody(tmp_path: Path):
    fs = CacheFileSystem(
        target_protocol="s3",
        target_options={"endpoint_url": "http://127.0.0.1:1", "key": "k", "secret": "s"},
        cache_dir=tmp_path / "cache",
    )
    assert not (tmp_path / "cache").exists()
    other = CacheFileSystem(target_protocol="s3", cache_dir=tmp_path / "cache")
    assert fs.fsid != other.fsid


# --- bytes of this process ---------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Any:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs.clear()
    fs.pipe("/d/x", b"in memory")
    yield fs
    fs.store.clear()


def test_memory_is_read_in_this_process(memory: Any, inprocess_home: Path):
    options: dict[str, Any] = {"cache_dir": str(inprocess_home), "min_free": "0"}
    with fsspec.open("cachefs::memory://d/x", cachefs=options) as file:
        assert file.read() == b"in memory"
        assert str(inprocess_home) in file.name
    fs = CacheFileSystem(fs=memory, **options)
    assert fs.cat("/d/x") == b"in memory"
    assert fs.ls("/d", detail=False) == ["/d/x"]


def test_an_instance_is_read_in_this_process(memory: Any, inprocess_home: Path):
    inner = DirFileSystem(path="/d", fs=memory)
    fs = CacheFileSystem(fs=inner, cache_dir=str(inprocess_home), min_free="0")
    assert fs.cat_file("x") == b"in memory"
    assert fs.info("x")["size"] == 9
    with pytest.raises(ConfigError, match="target_protocol"):
        pickle.dumps(fs)
    with pytest.raises(ConfigError, match="inprocess"):
        CacheFileSystem(fs=inner, cache_dir=str(inprocess_home), fetcher="require")


def test_an_instance_of_plain_options_is_taken_apart(bucket: Bucket, cache_dir: Path):
    path = bucket.put("x", b"plain")
    inner = fsspec.filesystem("s3", **bucket.options, asynchronous=False)
    fs = CacheFileSystem(fs=inner, cache_dir=cache_dir)
    assert fs.config.fetcher == "auto"
    assert fs.cat_file(path) == b"plain"
    assert pickle.loads(pickle.dumps(fs)) is fs


def test_in_process_next_to_a_fetcher(seeded: Bucket, make: Make, memory: Any, cache_dir: Path):
    """Another process has the cache: its fetcher is used where it can be, and otherwise nothing is stored."""
    first = make(seeded)
    first.cat_file(f"{seeded.name}/a.txt")
    try:
        fs = make(seeded, fetcher="inprocess")
        assert fs.open(f"{seeded.name}/train/n01/1.jpg").read() == FILES["train/n01/1.jpg"]
        assert make(seeded).open(f"{seeded.name}/train/n01/1.jpg").name is not None
        inner = CacheFileSystem(target_protocol="memory", cache_dir=cache_dir)
        for _ in range(2):
            with inner.open("/d/x") as file:
                assert file.name is None
                assert file.read() == b"in memory"
        del first  # while it is connected, the fetcher does not end because it is idle
    finally:
        stop_embedded(cache_dir)


def test_no_store_answers_all_that_a_store_is_asked():
    asked = {name for name in vars(Store) if not name.startswith("_")} - {"open"}
    assert asked <= vars(NoStore).keys()


# --- into another process ---------------------------------------------------------------------------------------


def test_secrets_do_not_travel(bucket: Bucket, make: Make):
    fs = make(bucket)
    secret = bucket.options["secret"]
    for text in (pickle.dumps(fs), fs.to_json().encode(), json.dumps(fs.to_dict()).encode(), repr(fs).encode()):
        assert secret.encode() not in text
        assert bucket.options["key"].encode() not in text
    assert pickle.loads(pickle.dumps(fs)) is fs


def test_a_copy_without_secrets_reads(bucket: Bucket, make: Make):
    """The fetcher knows the origin by then; the credentials are its to keep."""
    path, other = bucket.put("x", b"bytes"), bucket.put("y", b"more")
    fs = make(bucket)
    fs.cat_file(path)
    copy = CacheFileSystem.from_json(fs.to_json())
    assert isinstance(copy, CacheFileSystem)
    assert copy is not fs
    assert copy.cat_file(other) == b"more"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_pickled, (pickle.dumps(fs), bucket.put("z", b"third"))) == b"third"


def test_a_child_that_is_spawned_gets_the_secrets(bucket: Bucket, make: Make):
    """As a DataLoader's workers do, before anything has told the fetcher who may read."""
    path = bucket.put("x", b"bytes")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_bytes, args=(make(bucket), path, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == b"bytes"
    process.join()
    assert process.exitcode == 0


def read_pickled(pickled: bytes, path: str) -> Any:
    return pickle.loads(pickled).cat_file(path)


def send_bytes(fs: CacheFileSystem, path: str, to: Any) -> None:
    to.send(fs.cat_file(path))

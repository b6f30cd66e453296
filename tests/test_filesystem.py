"""The fsspec face: names, bytes, refusals, options, and what travels to other processes."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import io
import json
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from cachefs import CacheFileSystem
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import (
    ConfigError,
    IsADirectory,
    ObjectNotFound,
    OriginAccessDenied,
    ReadOnlyError,
    StaleObject,
    UnsupportedOrigin,
)
from cachefs.fetcher.embedded import stop_embedded
from cachefs.origin import OriginSpec
from tests.machine import Bucket, ThrottledBucket

FILES = {
    "a.txt": b"first\nsecond\n",
    "empty": b"",
    "train/n01/1.jpg": random.Random(1).randbytes(110_000),
    "train/n01/2.jpg": random.Random(2).randbytes(90_000),
    "train/n02/3.jpg": random.Random(3).randbytes(60_000),
    "train/n02/deep/er/4.jpg": b"deep",
    "unicode/é\U0001f5bc.bin": b"unicode",
}


@pytest.fixture
def seeded(bucket: Bucket) -> Bucket:
    for key, data in FILES.items():
        bucket.put(key, data)
    return bucket


Make = Callable[..., CacheFileSystem]


@pytest.fixture
def make(cache_dir: Path) -> Make:
    """A new instance on the test's cache."""

    def make(bucket: Bucket, **options: Any) -> CacheFileSystem:
        fs = fsspec.filesystem(
            "cachefs",
            target_protocol="s3",
            target_options=bucket.options,
            cache_dir=str(cache_dir),
            skip_instance_cache=True,
            **options,
        )
        assert isinstance(fs, CacheFileSystem)
        return fs

    return make


# --- names ---------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_origin(seeded: Bucket, make: Make):
    fs, name = make(seeded), seeded.name
    assert fs.find(name) == sorted(f"{name}/{key}" for key in FILES)
    assert fs.ls(name, detail=False) == [f"{name}/{each}" for each in ("a.txt", "empty", "train", "unicode")]
    assert fs.ls(f"{name}/train/n01/1.jpg", detail=False) == [f"{name}/train/n01/1.jpg"]
    assert fs.glob(f"{name}/train/*/*.jpg") == [f"{name}/train/{k}" for k in ("n01/1.jpg", "n01/2.jpg", "n02/3.jpg")]
    assert fs.glob(f"{name}/**/4.jpg") == [f"{name}/train/n02/deep/er/4.jpg"]
    assert fs.find(f"{name}/train", maxdepth=2, withdirs=True) == [
        f"{name}/train",
        *(f"{name}/train/{k}" for k in ("n01", "n01/1.jpg", "n01/2.jpg", "n02", "n02/3.jpg", "n02/deep")),
    ]
    walked = {path: (sorted(dirs), sorted(files)) for path, dirs, files in fs.walk(f"{name}/train")}
    assert walked[f"{name}/train/n02"] == (["deep"], ["3.jpg"])
    assert fs.du(name) == sum(map(len, FILES.values()))
    assert fs.find(f"{name}/nothing") == []
    assert fs.find(f"{name}/a.txt") == [f"{name}/a.txt"]


def test_info(seeded: Bucket, make: Make):
    fs, name = make(seeded), seeded.name
    info = fs.info(f"{name}/a.txt")
    assert (info["name"], info["size"], info["type"]) == (f"{name}/a.txt", 13, "file")
    assert info["ETag"]
    assert abs(info["mtime"].timestamp() - (seeded.folder / "a.txt").stat().st_mtime) < 2
    assert fs.modified(f"{name}/a.txt") == info["mtime"]
    assert fs.info(f"{name}/train") == {"name": f"{name}/train", "size": 0, "type": "directory"}
    assert fs.isdir(f"{name}/train")
    assert not fs.isfile(f"{name}/train")
    assert fs.isfile(f"{name}/a.txt")
    assert fs.size(f"{name}/a.txt") == 13
    assert fs.exists(name)
    assert not fs.exists(f"{name}/none")
    with pytest.raises(FileNotFoundError):
        fs.info(f"{name}/none")


def test_a_file_is_described_alike_before_and_after_it_is_cached_and_in_a_listing(seeded: Bucket, make: Make):
    path = f"{seeded.name}/train/n01/1.jpg"
    before, listed, after = make(seeded), make(seeded), make(seeded)
    key, info = before.ukey(path), before.info(path)
    assert next(each for each in listed.ls(f"{seeded.name}/train/n01") if each["name"] == path) == info
    after.cat_file(path)
    assert after.info(path) == info
    assert after.ukey(path) == key
    assert after.ukey(f"{seeded.name}/a.txt") != key
    assert before.checksum(path) == after.checksum(path)


def test_listings_are_kept_until_they_are_invalidated(throttled: ThrottledBucket, make: Make):
    throttled.put("d/1", b"1")
    fs = make(throttled)
    assert len(fs.ls(f"{throttled.name}/d")) == 1
    throttled.put("d/2", b"2")
    before = throttled.throttle.traffic().total
    assert len(fs.ls(f"{throttled.name}/d")) == 1
    assert fs.info(f"{throttled.name}/d/1")["size"] == 1
    assert throttled.throttle.traffic().total == before
    assert len(fs.ls(f"{throttled.name}/d", refresh=True)) == 2
    throttled.put("d/3", b"3")
    fs.invalidate_cache(f"{throttled.name}/d")
    assert len(fs.ls(f"{throttled.name}/d")) == 3


@pytest.mark.parametrize(
    ("protocol", "given", "path"),
    [
        ("s3", "s3://b/k/", "b/k"),
        ("s3", "cachefs::s3://b/k", "b/k"),
        ("s3", "cachefs://b/k", "b/k"),
        ("s3", "/b/k", "b/k"),
        ("gs", "gcs://b/k", "b/k"),
        ("az", "abfs://c@account.dfs.core.windows.net/k", "c/k"),
        ("https", "https://h/k", "https://h/k"),
        ("https", "cachefs::https://h/k", "https://h/k"),
        ("file", "file:///x/../y", "/y"),
        ("file", "/", "/"),
    ],
)
def test_paths(protocol: str, given: str, path: str, cache_dir: Path):
    options = {"account_name": "account"} if protocol == "az" else {}
    fs = fsspec.filesystem("cachefs", target_protocol=protocol, target_options=options, cache_dir=str(cache_dir))
    assert fs._strip_protocol(given) == path
    assert fs._strip_protocol([given, given]) == [path, path]
    assert fs._strip_protocol(fs.unstrip_protocol(given)) == path
    assert fsspec.core.split_protocol(fs.unstrip_protocol(given))[0].startswith("cachefs::")


# --- bytes ---------------------------------------------------------------------------------------------------


def test_the_chained_url(seeded: Bucket, cache_dir: Path):
    url = f"cachefs::s3://{seeded.name}/"
    options = {"s3": seeded.options, "cachefs": {"cache_dir": str(cache_dir)}}
    with fsspec.open(url + "train/n01/1.jpg", **options) as file:
        assert file.read() == FILES["train/n01/1.jpg"]
    with fsspec.open(url + "a.txt", "rt", **options) as file:
        assert file.readlines() == ["first\n", "second\n"]
    with fsspec.open_files(url + "train/n01/*.jpg", **options) as files:
        assert [file.read() for file in files] == [FILES["train/n01/1.jpg"], FILES["train/n01/2.jpg"]]
    local = fsspec.open_local(url + "train/n02/3.jpg", **options)
    assert isinstance(local, str)
    assert Path(local).read_bytes() == FILES["train/n02/3.jpg"]


def test_compressed_and_text(bucket: Bucket, make: Make):
    data = gzip.compress("grüße\n".encode())
    path = bucket.put("x.txt.gz", data)
    fs = make(bucket)
    for _ in range(2):  # cold and cached
        assert fs.open(path, "rt", compression="infer", encoding="utf-8").read() == "grüße\n"
        assert fs.read_bytes(path) == data


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (0, 10), (5, None), (-10, None), (None, -10), (-20, -10), (100, 50), (119, 500), (500, 600), (0, 0)],
)
def test_ranges_mean_what_they_mean_locally(cached: bool, start, end, tmp_path: Path, local: CacheFileSystem):
    data = random.Random(0).randbytes(120)
    (tmp_path / "file").write_bytes(data)
    path = str(tmp_path / "file")
    if cached:
        local.cat_file(path)
    assert local.cat_file(path, start, end) == data[start:end]
    assert asyncio.run(local._cat_file(path, start, end)) == data[start:end]


@pytest.fixture(scope="module")
def inprocess_home(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("inprocess") / "cache"
    yield home
    stop_embedded(home)


@pytest.fixture
def local(inprocess_home: Path) -> CacheFileSystem:
    """Local storage through an embedded fetcher, which several tests share."""
    fs = fsspec.filesystem(
        "cachefs",
        target_protocol="file",
        cache_dir=str(inprocess_home),
        min_free="0",
        fetcher="inprocess",
        skip_instance_cache=True,
    )
    assert isinstance(fs, CacheFileSystem)
    return fs


@pytest.mark.parametrize("start", [0, 1])
def test_cat_of_many(start: int, seeded: Bucket, make: Make):
    fs, name = make(seeded), seeded.name
    if start:
        fs.cat_file(f"{name}/train/n01/1.jpg")  # one is cached, the others are not
    everything = fs.cat(name, recursive=True, on_error="omit")
    assert everything == {f"{name}/{key}": data for key, data in FILES.items()}
    assert fs.cat(f"{name}/a.txt") == FILES["a.txt"]
    assert fs.cat([f"{name}/a.txt"]) == {f"{name}/a.txt": FILES["a.txt"]}
    with pytest.raises(FileNotFoundError):
        fs.cat([f"{name}/a.txt", f"{name}/none"])
    kept = fs.cat([f"{name}/a.txt", f"{name}/none"], on_error="return")
    assert isinstance(kept[f"{name}/none"], ObjectNotFound)
    assert list(fs.cat([f"{name}/a.txt", f"{name}/none"], on_error="omit")) == [f"{name}/a.txt"]


def test_cat_ranges(seeded: Bucket, make: Make):
    fs, name = make(seeded), seeded.name
    one, two = FILES["train/n01/1.jpg"], FILES["train/n01/2.jpg"]
    paths = [f"{name}/train/n01/1.jpg", f"{name}/none", f"{name}/train/n01/2.jpg", f"{name}/train/n01/1.jpg"]
    for _ in range(2):
        found = fs.cat_ranges(paths, [0, 0, 5, -7], [10, 5, 9, None])
        assert found[0] == one[:10]
        assert isinstance(found[1], FileNotFoundError)
        assert found[2:] == [two[5:9], one[-7:]]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 5, on_error="raise")
    with pytest.raises(ValueError, match="starts and ends"):
        fs.cat_ranges(paths, [0], [1])


def test_open_is_a_buffered_seekable_reader(seeded: Bucket, make: Make):
    fs, path, data = make(seeded), f"{seeded.name}/train/n01/1.jpg", FILES["train/n01/1.jpg"]
    for _ in range(2):
        with fs.open(path) as file:
            assert isinstance(file, io.BufferedReader)
            assert file.seekable()
            assert not file.writable()
            assert file.read(4) == data[:4]
            assert file.seek(-6, os.SEEK_END) == len(data) - 6
            assert file.read() == data[-6:]
            file.seek(1000)
            assert file.peek(1)[:1] == data[1000:1001]
            assert file.tell() == 1000
            assert Path(file.name).read_bytes() == data
    assert fs.open(f"{seeded.name}/empty").read() == b""
    assert fs.head(path, 10) == data[:10]
    assert fs.tail(path, 10) == data[-10:]
    assert fs.read_block(path, 10, 10) == data[10:20]


def test_errors_of_open(seeded: Bucket, make: Make):
    fs = make(seeded)
    for cold in (True, False):
        with pytest.raises(FileNotFoundError, match="none"):
            fs.open(f"{seeded.name}/none")
        with pytest.raises((IsADirectoryError, FileNotFoundError)):
            fs.open(f"{seeded.name}/train")
        if cold:
            fs.cat_file(f"{seeded.name}/a.txt")


def test_get_file(seeded: Bucket, make: Make, tmp_path: Path):
    fs, name = make(seeded), seeded.name
    for number in range(2):
        fs.get_file(f"{name}/train/n01/1.jpg", tmp_path / f"new/{number}")
        assert (tmp_path / f"new/{number}").read_bytes() == FILES["train/n01/1.jpg"]
    target = io.BytesIO()
    fs.get_file(f"{name}/a.txt", outfile=target)
    assert target.getvalue() == FILES["a.txt"]
    fs.get_file(f"{name}/train", tmp_path / "made")
    assert (tmp_path / "made").is_dir()
    callback = fsspec.callbacks.Callback()
    fs.get(f"{name}/train/n01/", str(tmp_path / "tree"), recursive=True, callback=callback)
    assert sorted(p.name for p in (tmp_path / "tree").iterdir()) == ["1.jpg", "2.jpg"]
    assert (callback.size, callback.value) == (3, 3)  # the directory and its two files
    # A copy is a copy: to change it changes nothing in the cache.
    (tmp_path / "new/1").write_bytes(b"changed")
    assert fs.cat_file(f"{name}/train/n01/1.jpg") == FILES["train/n01/1.jpg"]


# --- large objects ---------------------------------------------------------------------------------------------


LARGE = 5 * BLOCK_SIZE + 12_345


@pytest.fixture(scope="module")
def large() -> bytes:
    return random.Random(7).randbytes(LARGE)


def test_a_read_in_a_large_object_brings_its_block_only(throttled: ThrottledBucket, make: Make, large: bytes):
    path = throttled.put("large", large)
    fs = make(throttled)
    offset = 3 * BLOCK_SIZE + 777
    with fs.open(path) as file:
        assert file.name is None
        file.seek(offset)
        assert file.read(4096) == large[offset : offset + 4096]
        # What the server had sent of the whole object before its size was seen is bounded by buffers of sockets.
        assert throttled.throttle.reset().bytes_down < 2 * BLOCK_SIZE
        file.seek(3 * BLOCK_SIZE)
        assert file.read(500_000) == large[3 * BLOCK_SIZE : 3 * BLOCK_SIZE + 500_000]
        assert throttled.throttle.traffic().total == 0
    assert fs.cat_file(path, offset, offset + 100_000) == large[offset : offset + 100_000]


def test_a_large_object_becomes_a_local_file(throttled: ThrottledBucket, make: Make, large: bytes):
    path = throttled.put("large", large)
    fs = make(throttled)
    with fs.open(path) as file:
        pieces = iter(lambda: file.read(1_000_003), b"")
        assert b"".join(pieces) == large
    ranged = throttled.reads["large"]
    # One to learn its size and six blocks; obstore may repeat one whose pooled connection was just closed.
    assert ranged <= 1 + 6 + 1
    with fs.open(path) as file:
        assert os.stat(file.name).st_size == LARGE
    assert make(throttled).cat_file(path) == large
    assert asyncio.run(make(throttled)._cat_file(path, -5, None)) == large[-5:]
    assert throttled.reads["large"] == ranged


def test_a_large_object_whole(bucket: Bucket, make: Make, large: bytes, tmp_path: Path):
    path = bucket.put("large", large)
    assert asyncio.run(make(bucket)._cat_file(path)) == large
    other = bucket.put("other", large[::-1])
    make(bucket).get(other, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == large[::-1]
    third = bucket.put("third", large[1:])
    local = make(bucket).open_local([third])[0]
    assert Path(local).read_bytes() == large[1:]


def test_a_large_object_replaced_while_it_is_read(bucket: Bucket, make: Make, large: bytes):
    path = bucket.put("large", large)
    fs = make(bucket)
    with fs.open(path) as file:
        assert file.read(10) == large[:10]
        bucket.put("large", large[::-1])
        with pytest.raises(StaleObject, match="large"):
            file.read()


def test_what_does_not_fit_streams_through(bucket: Bucket, make: Make, large: bytes):
    large = large[: 2 * BLOCK_SIZE + 1]
    small = bucket.put("small", b"small" * 1000)
    path = bucket.put("large", large)
    fs = make(bucket, cache_size=0)
    for _ in range(2):
        with fs.open(small) as one, fs.open(small) as other:
            assert one.name is None
            assert one.read(5) == b"small"
            assert other.read() == b"small" * 1000  # not where the first reader stands
            assert one.read() == b"small" * 999
    assert fs.cat_file(path, BLOCK_SIZE - 5, BLOCK_SIZE + 5) == large[BLOCK_SIZE - 5 : BLOCK_SIZE + 5]
    assert fs.cat_file(path) == large
    assert asyncio.run(fs._cat_file(path)) == large


# --- one snapshot ----------------------------------------------------------------------------------------------


@pytest.fixture
def catalogued(throttled: ThrottledBucket, cache_dir: Path) -> Callable[..., None]:
    """Makes (or, with refresh, makes anew) the catalog of a dataset in the bucket."""

    def catalogue(root: str, *, refresh: bool = False) -> None:
        spec = OriginSpec.capture("s3", throttled.options)
        session = Session(spec.protocol, spec.options, spec.environ, root=f"{throttled.name}/{root}")
        connection = Connection(CacheConfig.make(cache_dir), session)
        connection.make_catalog(refresh=refresh)
        connection.close()

    return catalogue


def test_a_dataset_with_a_catalog(throttled: ThrottledBucket, make: Make, catalogued: Callable[..., None]):
    for key, data in FILES.items():
        throttled.put(key, data)
    name = throttled.name
    plain = make(throttled)
    catalogued("train")
    fs = make(throttled)
    throttled.throttle.reset()
    for path in (f"{name}/train", f"{name}/train/n02", f"{name}/train/n01/1.jpg"):
        assert fs.ls(path, detail=False) == [str(each) for each in plain.ls(path, detail=False)]
    throttled.throttle.reset()
    assert fs.find(f"{name}/train") == [f"{name}/{key}" for key in sorted(FILES) if key.startswith("train/")]
    assert fs.find(f"{name}/train", maxdepth=1, withdirs=True) == [f"{name}/train{x}" for x in ("", "/n01", "/n02")]
    assert fs.glob(f"{name}/train/*/*.jpg")
    assert fs.info(f"{name}/train/n01/1.jpg")["size"] == 110_000
    throttled.put("train/n01/later.jpg", b"later")
    with pytest.raises(ObjectNotFound, match="snapshot"):
        fs.open(f"{name}/train/n01/later.jpg")
    with pytest.raises(IsADirectory):
        fs.cat_file(f"{name}/train/n01")
    assert asyncio.run(fs._ls(f"{name}/train/n01", detail=False)) == fs.ls(f"{name}/train/n01", detail=False)
    assert throttled.throttle.traffic().total == 0
    assert fs.cat_file(f"{name}/train/n01/1.jpg") == FILES["train/n01/1.jpg"]
    assert fs.cat_file(f"{name}/a.txt") == FILES["a.txt"]  # beside the dataset


def test_a_refresh_is_taken_when_asked_for(throttled: ThrottledBucket, make: Make, catalogued: Callable[..., None]):
    one, two = throttled.put("d/one", b"one"), throttled.put("d/two", b"two")
    catalogued("d")
    fs = make(throttled)
    assert fs.cat_file(one) == b"one"
    throttled.put("d/one", b"ONE")
    throttled.put("d/two", b"TWO")
    assert fs.cat_file(one) == b"one"  # cached: the old bytes
    with pytest.raises(StaleObject, match=r"d/two.*refresh"):
        fs.cat_file(two)
    catalogued("d", refresh=True)
    assert fs.cat_file(one) == b"one"
    fs.invalidate_cache()
    assert fs.cat_file(one) == b"ONE"
    assert fs.cat_file(two) == b"TWO"


def test_without_a_catalog_the_version_first_read_stays(bucket: Bucket, make: Make):
    path = bucket.put("x", b"old")
    fs = make(bucket)
    assert fs.cat_file(path) == b"old"
    bucket.put("x", b"new!")
    assert fs.cat_file(path) == b"old"
    assert fs.size(path) == 3
    assert make(bucket).cat_file(path) == b"old"


# --- nothing is ever written -----------------------------------------------------------------------------------

# The public methods of fsspec that change nothing. Whatever is not here must refuse: a new one fails the test.
READING = """
    cat cat_file cat_ranges checksum clear_instance_cache created current disk_usage download du end_transaction
    exists expand_path find from_dict from_json get get_file get_mapper glob head info invalidate_cache isdir isfile
    lexists listdir ls modified open open_async read_block read_bytes read_text sign size sizes
    start_transaction stat tail to_dict to_json tree ukey unstrip_protocol walk
    _cat _cat_file _cat_ranges _du _exists _expand_path _find _get _get_file _get_kwargs_from_urls
    _get_pyarrow_filesystem _glob _info _isdir _isfile _isfilestore _ls _ls_from_cache _open _parent _process_limits
    _size _sizes _strip_protocol _walk
"""


def mutating_methods() -> list[str]:
    names = {
        name
        for cls in (AbstractFileSystem, AsyncFileSystem)
        for name in dir(cls)
        if inspect.isroutine(getattr(cls, name)) and not name.startswith("__")
    }
    return sorted(names - set(READING.split()))


def test_the_list_of_mutating_methods_is_complete():
    methods = mutating_methods()
    assert {"rm", "pipe_file", "touch", "mv", "_rm_file", "_put", "upload", "rename", "makedirs"} <= set(methods)
    assert all(hasattr(CacheFileSystem, name) for name in READING.split())


@pytest.mark.parametrize("name", mutating_methods())
def test_every_mutating_method_refuses(name: str, local: CacheFileSystem, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"untouched")
    path = str(tmp_path / "file")
    arguments = {"lpath": path, "rpath": path, "path1": path, "path2": path, "path": path, "value": b"x"}
    method = getattr(local, name)
    wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]

    def call() -> None:
        result = method(**{argument: arguments[argument] for argument in wanted if argument in arguments})
        if asyncio.iscoroutine(result):
            asyncio.run(result)

    with pytest.raises(ReadOnlyError, match="file") as caught:
        call()
    assert caught.value.errno == 30  # EROFS
    assert path in str(caught.value)
    assert Path(path).read_bytes() == b"untouched"


@pytest.mark.parametrize("mode", ["wb", "w", "ab", "xb", "r+b", "rb+", "wt"])
def test_open_for_writing_refuses(mode: str, local: CacheFileSystem, tmp_path: Path):
    path = str(tmp_path / "new")
    with pytest.raises(ReadOnlyError, match="new"):
        local.open(path, mode)
    with pytest.raises(ReadOnlyError):
        asyncio.run(local.open_async(path, mode))
    with pytest.raises(OSError, match="read-only"), fsspec.open(f"cachefs::file://{path}", mode):
        pass
    assert not Path(path).exists()


def test_a_mapper_reads_and_refuses(local: CacheFileSystem, tmp_path: Path):
    (tmp_path / "key").write_bytes(b"value")
    mapper = local.get_mapper(str(tmp_path))
    assert mapper["key"] == b"value"
    assert mapper.getitems(["key"]) == {"key": b"value"}
    assert "none" not in mapper
    with pytest.raises(ReadOnlyError):
        mapper["key"] = b"other"
    with pytest.raises(KeyError) as caught:  # what fsspec's mapper makes of any error here
        del mapper["key"]
    assert isinstance(caught.value.__cause__, ReadOnlyError)


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
    make(seeded).cat_file(f"{seeded.name}/a.txt")
    try:
        fs = make(seeded, fetcher="inprocess")
        assert fs.open(f"{seeded.name}/train/n01/1.jpg").read() == FILES["train/n01/1.jpg"]
        assert make(seeded).open(f"{seeded.name}/train/n01/1.jpg").name is not None
        inner = CacheFileSystem(target_protocol="memory", cache_dir=cache_dir)
        for _ in range(2):
            with inner.open("/d/x") as file:
                assert file.name is None
                assert file.read() == b"in memory"
    finally:
        stop_embedded(cache_dir)


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


# --- async -----------------------------------------------------------------------------------------------------


async def test_async(seeded: Bucket, make: Make):
    fs, name = make(seeded, asynchronous=True), seeded.name
    assert await fs._ls(name, detail=False) == [f"{name}/{each}" for each in ("a.txt", "empty", "train", "unicode")]
    assert (await fs._info(f"{name}/a.txt"))["size"] == 13
    assert await fs._find(f"{name}/train", maxdepth=2) == [
        f"{name}/train/{each}" for each in ("n01/1.jpg", "n01/2.jpg", "n02/3.jpg")
    ]
    assert await fs._exists(f"{name}/a.txt")
    assert not await fs._exists(f"{name}/none")
    assert await fs._glob(f"{name}/train/*/3.jpg") == [f"{name}/train/n02/3.jpg"]
    for _ in range(2):
        assert await fs._cat(name, recursive=True, on_error="omit") == {f"{name}/{k}": v for k, v in FILES.items()}
    assert await fs._du(name) == sum(map(len, FILES.values()))
    # Sync calls work inside a coroutine, as notebooks make them.
    assert fs.cat([f"{name}/a.txt", f"{name}/empty"]) == {f"{name}/a.txt": FILES["a.txt"], f"{name}/empty": b""}
    assert len(fs.find(name)) == len(FILES)


async def test_open_async(seeded: Bucket, make: Make):
    fs, path = make(seeded), f"{seeded.name}/train/n01/1.jpg"
    for _ in range(2):
        async with await fs.open_async(path) as file:
            assert await file.read(10) == FILES["train/n01/1.jpg"][:10]
            await file.seek(100)
            assert await file.read() == FILES["train/n01/1.jpg"][100:]
    with pytest.raises(FileNotFoundError):
        await fs.open_async(f"{seeded.name}/none")
    with pytest.raises(ValueError, match="binary"):
        await fs.open_async(path, "r")


def test_cold_objects_come_concurrently(throttled: ThrottledBucket, make: Make):
    """300 objects, 50 ms away each: one after the other they would take 15 s."""
    paths = [throttled.put(f"{number:03d}", b"%d" % number) for number in range(300)]
    fs = make(throttled)
    assert not fs.exists(f"{throttled.name}/none")  # and the fetcher has started
    throttled.throttle.set(latency=0.05)
    started = time.monotonic()
    half = fs.cat(paths[:150])
    other = asyncio.run(fs._cat(paths[150:]))
    taken = time.monotonic() - started
    assert half | other == {path: b"%d" % number for number, path in enumerate(paths)}
    assert taken < 5
    assert sum(throttled.reads.values()) == 300


async def test_one_instance_on_two_loops(seeded: Bucket, make: Make):
    fs = make(seeded)

    async def read() -> bytes:
        return await fs._cat_file(f"{seeded.name}/a.txt")

    assert await read() == FILES["a.txt"]
    assert await asyncio.to_thread(asyncio.run, fs._info(f"{seeded.name}/empty"))
    assert await read() == FILES["a.txt"]
    assert (await fs._info(f"{seeded.name}/train/n01/1.jpg"))["size"] == 110_000

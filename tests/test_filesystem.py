"""The fsspec face: names and bytes of small objects."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
from pathlib import Path

import fsspec
import pytest

from cachefs import CacheFileSystem
from cachefs.errors import (
    ObjectNotFound,
)
from tests.filesystems import FILES, Make, inprocess_home, local, make, seeded
from tests.machine import Bucket, ThrottledBucket

__all__ = ["inprocess_home", "local", "make", "seeded"]

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

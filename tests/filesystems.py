"""File systems for tests of the fsspec face, and objects for them to read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cachefs import CacheFileSystem
from cachefs.fetcher.embedded import stop_embedded
from tests.machine import Bucket

Make = Callable[..., CacheFileSystem]

FILES = {
    "a.txt": b"first\nsecond\n",
    "empty": b"",
    "train/n01/1.jpg": random.Random(1).randbytes(110_000),
    "train/n01/2.jpg": random.Random(2).randbytes(90_000),
    "train/n02/3.jpg": random.Random(3).randbytes(60_000),
    "train/n02/deep/er/4.jpg": b"deep",
    "unicode/é\U0001f5bc.bin": b"unicode",
}


def make_file_system(bucket: Bucket, home: Path, **options: Any) -> CacheFileSystem:
    """A new instance over the bucket."""
    fs = fsspec.filesystem(
        "cachefs",
        target_protocol="s3",
        target_options=bucket.options,
        cache_dir=str(home),
        skip_instance_cache=True,
        **options,
    )
    assert isinstance(fs, CacheFileSystem)
    return fs


@pytest.fixture
def seeded(bucket: Bucket) -> Bucket:
    for key, data in FILES.items():
        bucket.put(key, data)
    return bucket


@pytest.fixture
def make(cache_dir: Path) -> Make:
    """Makes instances on the test's cache."""
    return lambda bucket, **options: make_file_system(bucket, cache_dir, **options)


@pytest.fixture(scope="module")
def inprocess_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
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

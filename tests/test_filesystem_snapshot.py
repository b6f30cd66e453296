"""One instance serves one snapshot, until it is told to take another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.errors import (
    IsADirectory,
    ObjectNotFound,
    StaleObject,
)
from cachefs.origin import OriginSpec
from tests.filesystems import FILES, Make, inprocess_home, local, make, seeded
from tests.machine import Bucket, ThrottledBucket

__all__ = ["inprocess_home", "local", "make", "seeded"]


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


def test_a_warm_dataset_needs_no_origin(
    throttled: ThrottledBucket, make: Make, catalogued: Callable[..., None], cache_dir: Path
):
    for key, data in FILES.items():
        throttled.put(key, data)
    catalogued("train")
    spec = OriginSpec.capture("s3", throttled.options)
    connection = Connection(
        CacheConfig.make(cache_dir), Session(spec.protocol, spec.options, spec.environ, root=f"{throttled.name}/train")
    )
    assert connection.warm().failed_total == 0
    connection.close()
    throttled.throttle.refuse()
    fs = make(throttled)
    expected = {f"{throttled.name}/{key}": data for key, data in FILES.items() if key.startswith("train/")}
    assert fs.cat(fs.find(f"{throttled.name}/train")) == expected
    for path, data in expected.items():
        with fs.open(path) as file:
            assert file.read() == data

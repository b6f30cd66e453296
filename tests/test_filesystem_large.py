"""Objects larger than a block, and those that do not fit: read where they are read, and no more."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from cachefs.digest import BLOCK_SIZE
from cachefs.errors import (
    StaleObject,
)
from tests.filesystems import Make, inprocess_home, local, make, seeded
from tests.machine import Bucket, ThrottledBucket

__all__ = ["inprocess_home", "local", "make", "seeded"]

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
        assert throttled.throttle.reset().bytes_down < 3 * BLOCK_SIZE
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

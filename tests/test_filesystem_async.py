"""The coroutines of the fsspec face."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.filesystems import FILES, Make, inprocess_home, local, make, seeded
from tests.machine import Bucket, ThrottledBucket

__all__ = ["inprocess_home", "local", "make", "seeded"]


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
    """300 objects, 0.3 s away each: one after the other they would take 90 s."""
    paths = [throttled.put(f"{number:03d}", b"%d" % number) for number in range(300)]
    fs = make(throttled)
    assert not fs.exists(f"{throttled.name}/none")  # and the fetcher has started
    throttled.throttle.set(latency=0.3)
    started = time.monotonic()
    half = fs.cat(paths[:150])
    other = asyncio.run(fs._cat(paths[150:]))
    taken = time.monotonic() - started
    assert half | other == {path: b"%d" % number for number, path in enumerate(paths)}
    assert taken < 45
    assert sum(throttled.reads.values()) == 300


async def test_one_instance_on_two_loops(seeded: Bucket, make: Make):
    fs = make(seeded)

    async def read() -> bytes:
        return await fs._cat_file(f"{seeded.name}/a.txt")

    assert await read() == FILES["a.txt"]
    assert await asyncio.to_thread(asyncio.run, fs._info(f"{seeded.name}/empty"))
    assert await read() == FILES["a.txt"]
    assert (await fs._info(f"{seeded.name}/train/n01/1.jpg"))["size"] == 110_000

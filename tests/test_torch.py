"""A PyTorch DataLoader over the URL, with the workers that PyTorch starts: forked, spawned, from a fork server."""

from __future__ import annotations

import io
import os
import random
import zlib
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cachefs import CacheFileSystem
from tests.machine import Bucket, ThrottledBucket

COUNT = 64
FILES = {f"{number:03d}.jpg": random.Random(number).randbytes(5_000 + number) for number in range(COUNT)}
CHECKSUMS = [zlib.crc32(data) for data in FILES.values()]


class Images(Dataset[tuple[int, int]]):
    """(number, CRC-32 of the bytes) of each object. The file system is made once, in the process that trains."""

    def __init__(self, fs: CacheFileSystem, paths: list[str]) -> None:
        self.fs = fs
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, int]:
        with self.fs.open(self.paths[number]) as file:
            return number, zlib.crc32(file.read())


class Urls(Images):
    """The same by URL, as a script without a file system object in sight would do it."""

    def __init__(self, urls: list[str], options: dict[str, object]) -> None:
        self.paths = urls
        self.options = options

    def __getitem__(self, number: int) -> tuple[int, int]:
        with fsspec.open(self.paths[number], **self.options) as file:
            return number, zlib.crc32(file.read())


def epoch(loader: DataLoader[tuple[int, int]]) -> list[int]:
    """Checksums by number."""
    seen: dict[int, int] = {}
    for numbers, checksums in loader:
        seen.update(zip(numbers.tolist(), checksums.tolist(), strict=True))
    return [seen[number] for number in range(COUNT)]


@pytest.fixture
def images(throttled: ThrottledBucket, cache_dir: Path) -> Images:
    paths = [throttled.put(key, data) for key, data in FILES.items()]
    fs = fsspec.filesystem("cachefs", target_protocol="s3", target_options=throttled.options, cache_dir=str(cache_dir))
    return Images(fs, paths)


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 2), ("forkserver", 2)])
def test_epochs(method: str, workers: int, images: Images, throttled: ThrottledBucket):
    """Every byte right in every epoch; the first reads each object once, the others read none."""
    assert images.fs.exists(images.paths[0])  # the parent has used its file system, as training code does
    loader = DataLoader(
        images,
        batch_size=8,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=method,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert epoch(loader) == CHECKSUMS
    assert throttled.reads == dict.fromkeys(FILES, 1)
    before = throttled.throttle.traffic().total
    assert epoch(loader) == CHECKSUMS
    assert epoch(loader) == CHECKSUMS
    assert throttled.throttle.traffic().total == before
    del loader._iterator


def test_by_url(bucket: Bucket, cache_dir: Path):
    urls = [f"cachefs::s3://{bucket.put(key, data)}" for key, data in FILES.items()]
    dataset = Urls(urls, {"s3": bucket.options, "cachefs": {"cache_dir": str(cache_dir)}})
    loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork")
    assert epoch(loader) == epoch(loader) == CHECKSUMS


def test_without_workers(images: Images):
    assert epoch(DataLoader(images, batch_size=8)) == CHECKSUMS


def test_a_tensor_is_loaded(bucket: Bucket, cache_dir: Path):
    sink = io.BytesIO()
    torch.save({"weight": torch.arange(1000)}, sink)
    path = bucket.put("model.pt", sink.getvalue())
    fs = CacheFileSystem(target_protocol="s3", target_options=bucket.options, cache_dir=cache_dir)
    for _ in range(2):
        with fs.open(path) as file:
            assert torch.equal(torch.load(file, weights_only=True)["weight"], torch.arange(1000))
    mapped = torch.load(os.fspath(fs.open_local(path)), mmap=True, weights_only=True)
    assert torch.equal(mapped["weight"], torch.arange(1000))

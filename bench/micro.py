"""The hot paths one by one, each beside the cheapest thing that a local file costs: open, fstat, close.

    python -m pytest bench/micro.py --benchmark-only      the table of pytest-benchmark
    python -m bench.compare                               against bench/micro.json, exit 1 for what became slower

A round times a batch of the reference and then a batch of the operation, so what the machine does meanwhile hits both;
`ratio` is the median over the rounds of operation / reference. Ratios still differ between processors: the baseline
says on which it was made.
"""

from __future__ import annotations

import os
import random
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs import CacheFileSystem
from cachefs.catalog import ROOT, Builder, Catalog
from cachefs.config import CacheConfig
from cachefs.digest import digest, snapshot_ref, version_ref
from cachefs.fetcher.embedded import stop_embedded
from cachefs.fetcher.index import Index, Known
from cachefs.messages import Entry, Need, Ready, decode_reply, decode_request, encode
from cachefs.store import Reader, Store
from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.abi import S_IFREG
from cachefs_sidecar.fuse.listing import Listing
from cachefs_sidecar.fuse.tree import Tree

# Bytes of a training image.
IMAGE = 110_000

# A batch takes about a millisecond: long beside the clock's own cost, short beside what else the machine does.
BATCH_SECONDS = 0.001
ROUNDS = 80

DATASET, REF = "d" * 32, "a" * 32

Operation = Callable[[], object]


def batched(operation: Operation, count: int) -> Operation:
    def batch() -> None:
        for _ in range(count):
            operation()

    return batch


def seconds(work: Operation) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def batch_of(operation: Operation) -> int:
    """How many of it fill a batch. What it does the first time only is done now."""
    best = min(seconds(operation) for _ in range(50))
    return max(1, round(BATCH_SECONDS / best))


class Pair:
    """An operation and the reference, in turns."""

    def __init__(self, operation: Operation, reference: Operation) -> None:
        self.counts = batch_of(operation), batch_of(reference)
        self._batches = batched(operation, self.counts[0]), batched(reference, self.counts[1])

    def round(self) -> float:
        """operation / reference, once."""
        reference = seconds(self._batches[1]) / self.counts[1]
        return seconds(self._batches[0]) / self.counts[0] / reference

    def ratio(self) -> float:
        return statistics.median(self.round() for _ in range(ROUNDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("micro")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Operation:
    file = folder / "reference"
    file.write_bytes(bytes(IMAGE))
    return opening(str(file))


def opening(name: str) -> Operation:
    def reference() -> None:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        os.fstat(fd)
        os.close(fd)

    return reference


@pytest.fixture
def paired(benchmark: Any, reference: Operation) -> Callable[[Operation], None]:
    """Measures an operation beside the reference, and tells pytest-benchmark what it took."""

    def measure(operation: Operation) -> None:
        operation()
        if benchmark.disabled:
            benchmark.pedantic(operation)
            return
        pair = Pair(operation, reference)
        benchmark.extra_info["ratio"] = pair.ratio()
        benchmark.pedantic(operation, rounds=ROUNDS, iterations=pair.counts[0])

    return measure


# --- the store ----------------------------------------------------------------------------------------------------


def test_store_reader_open(paired: Callable[[Operation], None], folder: Path) -> None:
    config = CacheConfig.make(folder / "store", min_free=0)
    Store.open(config).put(bytes(IMAGE), links=[(DATASET, REF)])
    reader = Reader(config.dirs)

    def hit() -> None:
        found = reader.open(DATASET, REF)
        assert found is not None
        os.close(found[0])

    paired(hit)


def test_digest_of_an_image(paired: Callable[[Operation], None]) -> None:
    data = random.Random(1).randbytes(IMAGE)
    paired(lambda: digest(data))


def test_names_of_refs(paired: Callable[[Operation], None]) -> None:
    path, version = "bucket/train/n01440764/n01440764_10026.JPEG", "9e107d9d372bb6826bd81d3542a419d6"
    paired(lambda: (snapshot_ref(path, version), version_ref(path, version)))


# --- the catalog --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalog(folder: Path) -> Iterator[Catalog]:
    builder = Builder(folder / "catalog.sqlite", identity="i", root="b/r")
    for n in range(20_000):
        builder.add(Entry(f"b/r/{n % 20:02d}/{n:08d}.jpg", IMAGE, n, f"{n:032x}"))
    with builder.seal() as catalog:
        yield catalog


def test_catalog_lookup(paired: Callable[[Operation], None], catalog: Catalog) -> None:
    directory = catalog.lookup(ROOT, b"07")
    assert directory is not None
    paired(lambda: catalog.lookup(directory.id, b"00012347.jpg"))


def test_catalog_get(paired: Callable[[Operation], None], catalog: Catalog) -> None:
    row = catalog.find("b/r/07/00012347.jpg")
    assert row is not None
    paired(lambda: catalog.get(row.id))


def test_catalog_children(paired: Callable[[Operation], None], catalog: Catalog) -> None:
    directory = catalog.lookup(ROOT, b"07")
    assert directory is not None
    paired(lambda: catalog.children(directory.id, 0, 20))


# --- the mount's wire ---------------------------------------------------------------------------------------------

LOOKUP, READ, READDIRPLUS = 1, 15, 44


def packet(opcode: int, body: bytes) -> bytearray:
    head = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, 7, 12345, 1000, 1000, 4242, 0, 0)
    return bytearray(head + body)


def test_wire_read(paired: Callable[[Operation], None]) -> None:
    request = packet(READ, struct.pack("=QQIIQII", 0, 4096, 131072, 0, 0, 0, 0))
    reply = bytearray(4096)

    def answer() -> None:
        wire.first_look(request)
        wire.whole_read(request)
        wire.out_header_into(reply, 4000, 7)

    paired(answer)


def test_wire_lookup(paired: Callable[[Operation], None]) -> None:
    packed = memoryview(packet(LOOKUP, b"00012347.jpg\0"))
    attributes = wire.Attributes(12345, S_IFREG | 0o444, 1, 0, 0, IMAGE, 1_700_000_000_000_000_000)

    def answer() -> None:
        request = wire.decode(packed)
        wire.name_in(request.body)
        reply = wire.entry_out(attributes, 1000)
        wire.out_header(len(reply), 0, request.unique)

    paired(answer)


def test_listing_page(paired: Callable[[Operation], None], catalog: Catalog) -> None:
    """Twenty entries."""
    tree = Tree([catalog.file], Catalog.open, uid=0, gid=0)
    directory = tree.lookup(ROOT, b"07")
    assert directory is not None
    listing = Listing(tree, bytearray(65536), 1000)
    packed = memoryview(packet(READDIRPLUS, struct.pack("=QQIIQII", 0, 2, 20 * 168, 0, 0, 0, 0)))

    def answer() -> None:
        request = wire.decode(packed)
        listing.page(directory.id, *wire.read_in(request.body), plus=True)

    paired(answer)
    tree.close()


# --- between processes --------------------------------------------------------------------------------------------


def test_messages_of_a_miss(paired: Callable[[Operation], None]) -> None:
    need = Need(id=9, attachment=0, path="bucket/train/n01440764/n01440764_10026.JPEG")
    file = f"/var/cache/cachefs/blobs/ab/{'ab' * 16}"
    ready = Ready(id=9, file=file, size=IMAGE, version="v" * 32, start=0, stop=IMAGE, complete=True)

    def both_ways() -> None:
        decode_request(encode(need))
        decode_reply(encode(ready))

    paired(both_ways)


def test_index_known(paired: Callable[[Operation], None], folder: Path) -> None:
    index = Index(folder / "index")
    for n in range(2000):
        index.learn("s3", Known(bytes(16), n, n, f"{n:032x}", f"bucket/{n}.jpg", DATASET))
    index.flush()
    paired(lambda: index.known("s3", "bucket/1234.jpg", f"{1234:032x}"))
    index.close()


# --- the fsspec face ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hit(folder: Path) -> tuple[CacheFileSystem, str]:
    """A file system and an object that its cache has."""
    image = folder / "image.jpg"
    image.write_bytes(random.Random(1).randbytes(IMAGE))
    home = folder / "cache"
    fs = CacheFileSystem(
        target_protocol="file", cache_dir=str(home), min_free=0, fetcher="inprocess", skip_instance_cache=True
    )
    fs.cat_file(str(image))
    stop_embedded(home)
    return fs, str(image)


def test_fsspec_open_read_close(paired: Callable[[Operation], None], hit: tuple[CacheFileSystem, str]) -> None:
    fs, path = hit

    def read() -> None:
        with fs.open(path, "rb") as file:
            assert len(file.read()) == IMAGE

    paired(read)


def test_fsspec_cat_file(paired: Callable[[Operation], None], hit: tuple[CacheFileSystem, str]) -> None:
    fs, path = hit
    paired(lambda: fs.cat_file(path))

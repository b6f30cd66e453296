"""Synthetic catalogs for tests and benchmarks: ImageNet-like names, 1,000 files per directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cachefs.catalog import Builder, Catalog
from cachefs.messages import Entry

ROOT_PATH = "bucket/imagenet"
FILES_PER_DIRECTORY = 1000


def entries(count: int, root: str = ROOT_PATH, *, per_directory: int = FILES_PER_DIRECTORY) -> Iterator[Entry]:
    """`count` files in listing order: `root/train/n00000012/n00000012_345.JPEG`, 60 to 160 KB, ETag-like versions."""
    for number in range(count):
        folder, index = divmod(number, per_directory)
        yield Entry(
            path=f"{root}/train/n{folder:08d}/n{folder:08d}_{index}.JPEG",
            size=60_000 + number * 7919 % 100_000,
            mtime_ns=1_700_000_000_000_000_000 + number,
            version=f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}",
        )


def make_catalog(
    file: Path,
    count: int,
    *,
    root: str = ROOT_PATH,
    identity: str = "s3",
    previous: Catalog | None = None,
    per_directory: int = FILES_PER_DIRECTORY,
) -> Catalog:
    """A sealed catalog of `count` synthetic files at `file`. One million take some 15 seconds."""
    builder = Builder(file, identity=identity, root=root, previous=previous, resume=False)
    builder.add_all(entries(count, root, per_directory=per_directory))
    return builder.seal()

"""What a cache directory looks like, known to its writer and its readers alike.

    cachefs.json              {"format": 1, "id": <32 hex>, "home": <id of the home>}
    blobs/ab/<key>            content; <key> = 32 hex digits, ab = its first two; a tenant's has its tag after it
    blobs/ab/<key>.blocks     16-byte digests of its blocks, in order; only beside content larger than one block
    refs/<dataset>/ab/<ref>   hard link to a blob of the same directory
    parts/<ref>, <ref>.map    an incomplete large object (sparse) and which blocks of it are there (blockmap.py)
    tmp/                      what is being written; emptied when a fetcher starts

The seal: a blob's mtime is set to a value that only this boot of this machine and this FORMAT have. A reader
compares it with one integer and so knows that the blob was published whole, or checked, since the machine
started, that nothing wrote to it through the file system since, and that it is in a format it understands.
After a crash of the machine every blob is unsealed, so losing power between a write and its writeback costs a
digest check and never correctness; that is why nothing here calls fsync on a blob.

Imports nothing heavy: readers live in DataLoader workers and in mount workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from cachefs.errors import CacheError

# Raised when an older cachefs would misread the directory. It is part of the seal.
FORMAT = 1

MARKER = "cachefs.json"
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# Seals lie between March 1973 and September 2001, before any file of a machine with a working clock, so the
# mtime that a write leaves is never a seal; within 31 bits, which ext4 with small inodes and XFS without bigtime
# need; and in whole seconds, which every file system with hard links keeps. Two boots share one once in 900 million.
_SEAL_FIRST = 100_000_000
_SEAL_COUNT = 900_000_000

# No file has this mtime: what is compared with on a machine without a boot id.
NO_SEAL = -1

Link = tuple[str, str]
_NAME = re.compile(r"[0-9a-f]{32}")
_BLOB = re.compile(r"[0-9a-f]{32}([0-9a-f]{32})?")


def seal_ns() -> int:
    """mtime, in ns since the epoch, of a blob that may be served; NO_SEAL where the kernel tells no boot id."""
    try:
        with open(BOOT_ID, "rb") as file:
            boot = file.read().strip()
    except OSError:
        return NO_SEAL
    number = int.from_bytes(blake2b(b"%d %s" % (FORMAT, boot), digest_size=8).digest(), "big")
    return (_SEAL_FIRST + number % _SEAL_COUNT) * 1_000_000_000


def is_name(text: object) -> bool:
    """Whether `text` is 32 lower-case hex digits: the only names that this room takes to the disk."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_blob_name(text: str) -> bool:
    """Whether `text` is a content key, or a content key and a tenant's tag (digest.py), in hex."""
    return _BLOB.fullmatch(text) is not None


def checked_links(links: Iterable[Link]) -> list[Link]:
    """(dataset, ref) pairs, all of them names, as digest.py makes them. CacheError for others: a caller's mistake."""
    links = list(links)
    for link in links:
        for name in link:
            if not is_name(name):
                raise CacheError(f"{name!r} is not a name of a store: 32 hex digits, see cachefs.digest")
    return links


class Places:
    """The paths of one cache directory, as strings: making a Path costs more than the system call it is for."""

    __slots__ = ("blobs", "marker", "parts", "refs", "root", "tmp")

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        base = os.path.join(os.fspath(root), "")
        self.marker = base + MARKER
        self.blobs = base + "blobs/"
        self.refs = base + "refs/"
        self.parts = base + "parts/"
        self.tmp = base + "tmp/"

    def blob(self, name: str) -> str:
        return f"{self.blobs}{name[:2]}/{name}"

    def blocks(self, name: str) -> str:
        return f"{self.blobs}{name[:2]}/{name}.blocks"

    def ref(self, dataset: str, ref: str) -> str:
        return f"{self.refs}{dataset}/{ref[:2]}/{ref}"

    def part(self, ref: str) -> str:
        return self.parts + ref

    def map(self, ref: str) -> str:
        return f"{self.parts}{ref}.map"

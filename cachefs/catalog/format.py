"""What a catalog file looks like: shared by the one that writes it and those that read it.

A catalog is a plain SQLite database that no one changes once it has its name. Directories and files are rows of
`entries`; an entry's row id is its inode number. Two indexes serve the two questions a mount asks: `by_name`
(parent, name) for lookups and `by_parent` (parent, row id) for reading a directory in the order of inode numbers,
so that a directory's read position is an inode number and needs no memory. A parent's id is always smaller than
its children's.

    entries(id, parent, name, directory, size, mtime_ns, version)
    skipped(name, reason)            what the origin has and no file system can show, see names.py
    summary(...)                     one row; a file without it was never finished
    keys(id, key)                    content keys (cachefs/digest.py) of the files whose content is known

Format 1 is all but the last; a catalog with content keys has format 2, and everything else in it is as in format 1. So
one that has none can be read by versions of cachefs that know none.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import struct
from pathlib import Path
from typing import NamedTuple

from cachefs.errors import CacheError, CacheFull, CatalogError

# The inode number of the root of a FUSE mount (FUSE_ROOT_ID in linux/fuse.h).
ROOT = 1

# Kept in the database header, so that a foreign or future file is recognised before SQLite reads it.
APPLICATION_ID = int.from_bytes(b"cfsC", "big")
FORMAT = 1
WITH_KEYS = 2

SCHEMA = """
CREATE TABLE entries(
    id INTEGER PRIMARY KEY, parent INTEGER NOT NULL, name BLOB NOT NULL, directory INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, version TEXT NOT NULL);
CREATE UNIQUE INDEX by_name ON entries(parent, name);
CREATE INDEX by_parent ON entries(parent);
CREATE TABLE skipped(name BLOB PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE summary(
    identity TEXT NOT NULL, root TEXT NOT NULL, snapshot TEXT NOT NULL, files INTEGER NOT NULL,
    directories INTEGER NOT NULL, bytes INTEGER NOT NULL, skipped INTEGER NOT NULL, last_id INTEGER NOT NULL,
    created REAL NOT NULL, median_size INTEGER NOT NULL);
"""

KEYS_SCHEMA = "CREATE TABLE IF NOT EXISTS keys(id INTEGER PRIMARY KEY, key BLOB NOT NULL)"

# SQLite's database header (https://www.sqlite.org/fileformat.html#the_database_header): magic, page size,
# page count, user version, application id.
_HEADER = struct.Struct(">16s H 10x I 28x I 4x I 28x")
_MAGIC = b"SQLite format 3\0"


class Row(NamedTuple):
    """One entry. size: bytes, 0 for a directory. mtime_ns: nanoseconds since the epoch, 0 = unknown."""

    id: int
    parent: int
    name: bytes
    directory: bool
    size: int
    mtime_ns: int
    version: str


# (id, name, 1 for a directory, size, mtime_ns) of an entry in a listing: no class, because millions are made at a time.
Listed = tuple[int, bytes, int, int, int]


class Summary(NamedTuple):
    """A whole catalog. directories: without the root. skipped: names that are not served. created: Unix time.

    snapshot: 32 hex characters, the same for the same names, sizes and versions. bytes: of all files together.
    last_id: no id above it was ever given away in this dataset. median_size: the size in bytes of a file in the
    middle (to within 1%).
    """

    identity: str
    root: str
    snapshot: str
    files: int
    directories: int
    bytes: int
    skipped: int
    last_id: int
    created: float
    median_size: int


def prefix_of(root: str) -> str:
    """What stands before every name of a dataset in its object paths: `bucket/imagenet/`, or nothing."""
    return root if not root or root.endswith("/") else root + "/"


def check_header(file: Path) -> int:
    """The format of a catalog. Raises CatalogError unless it is a known one with all its pages; reads 100 bytes."""
    try:
        with open(file, "rb") as stream:
            header = stream.read(_HEADER.size)
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise CatalogError(f"catalog {file}: {os.strerror(error.errno or errno.EIO)}", path=str(file)) from error
    if len(header) < _HEADER.size:
        raise CatalogError(f"catalog {file}: only {length} bytes long; list the dataset again", path=str(file))
    magic, page_size, pages, version, application = _HEADER.unpack(header)
    if magic != _MAGIC or application != APPLICATION_ID:
        raise CatalogError(f"catalog {file}: not a catalog; list the dataset again", path=str(file))
    if version not in (FORMAT, WITH_KEYS):
        raise CatalogError(
            f"catalog {file}: has format {version}, this version of cachefs reads formats {FORMAT} to {WITH_KEYS}; "
            "upgrade cachefs, or list the dataset again",
            path=str(file),
        )
    if length != pages * (page_size if page_size > 1 else 65536):  # 1 stands for 65536, which needs 17 bits
        raise CatalogError(
            f"catalog {file}: {length} bytes instead of {pages} pages of {page_size}; list the dataset again",
            path=str(file),
        )
    return int(version)


# SQLite's names for a disk that fails or refuses (https://www.sqlite.org/rescode.html).
_DISK = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


# What Python's sqlite3 raises for a damaged file. (It decodes error messages, which may quote damaged bytes.)
DAMAGE = (sqlite3.Error, UnicodeDecodeError)


def translated(error: Exception, file: Path, doing: str) -> CacheError:
    """CacheFull when there was no room, CacheError when the disk failed or refused, else CatalogError: damaged."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return CacheFull(f"catalog {file}: no space left while {doing}", path=str(file))
    kind = CacheError if code in _DISK else CatalogError
    return kind(f"catalog {file}: {error} while {doing}", path=str(file))

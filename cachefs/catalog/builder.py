"""Making a catalog: entries in any order become one immutable file, complete or not at all.

Entries wait in FILE.building (staging.py), from which an interrupted listing goes on. `seal` reads them in one
ordered pass, gives out inode numbers, and writes a fresh file FILE.sealing with nothing to journal; only after its
bytes are on the disk does it take the name FILE. Memory is that of SQLite's page caches, whatever the count.

Inode numbers: an entry that is unchanged since the previous catalog (same path, version and size; a directory: same
path) keeps its number; anything else gets one that was never used in this dataset, so a number never means two
things, and the kernel never shows pages of one object for another. In a first catalog siblings are neighbours.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.catalog import names
from cachefs.catalog.catalog import Catalog
from cachefs.catalog.format import APPLICATION_ID, DAMAGE, FORMAT, ROOT, SCHEMA, Row, Summary
from cachefs.catalog.keys import put_keys, sync
from cachefs.catalog.staging import CACHE_KIB, Staging
from cachefs.errors import CacheError, CacheFSError, CatalogError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachefs.messages import Entry

_log = logging.getLogger(__name__)

Numbered = tuple[int, int, bytes, int, int, int, str]


class Cancelled(CacheFSError):
    """`Builder.cancel` was called while `seal` ran."""


class Builder:
    """Collects the entries of one dataset and makes its catalog `file`. For one thread at a time.

    Leave it through `seal` or `close`: after `close` the next Builder of the same file, identity and root goes on
    where this one stopped (within an hour, unless resume=False).
    """

    def __init__(
        self,
        file: Path,
        *,
        identity: str,
        root: str,
        previous: Catalog | None = None,
        last_id: int = 0,
        resume: bool = True,
        created: float | None = None,
    ) -> None:
        """last_id: the largest inode number that may be in use, for when `previous` cannot say it. created: None = now.

        Raises CatalogError (another process at work on the same file), CacheFull, CacheError.
        """
        self._file = file
        self._sealing = file.with_name(file.name + ".sealing")
        self._identity = identity
        self._root = root
        # A connection of our own: `seal` runs in a thread while others use the previous catalog.
        self._previous = None if previous is None else previous.file
        self._last_id = max(ROOT, last_id, 0 if previous is None else previous.summary.last_id)
        self._created = created
        self._cancelled = False
        self._staging = Staging(file.with_name(file.name + ".building"), identity=identity, root=root, resume=resume)

    def add(self, entry: Entry) -> None:
        """Take one entry, in any order; the same path again replaces the earlier one. Raises CacheFull."""
        self._staging.add(entry)

    def add_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._staging.add(entry)

    def skip(self, path: str, reason: str) -> None:
        """Note what is not served, and why, where that is known already. Raises CacheFull."""
        self._staging.note_skipped(path, reason)

    def checkpoint(self, token: str, objects: int = 0, size: int = 0) -> None:
        """Everything that `token` stands for was added (objects, size: how many, how many bytes of it)."""
        self._staging.finish(token, objects, size)

    def finished(self, token: str) -> tuple[int, int] | None:
        """(objects, bytes) that `checkpoint` was told for `token`, by this run or one that this one continues."""
        return self._staging.finished(token)

    def cancel(self) -> None:
        """Make a `seal` that runs in another thread stop soon with Cancelled. What was added stays."""
        self._cancelled = True

    def close(self) -> None:
        """Stop here; the next Builder continues. Harmless after `seal`."""
        self._staging.close(keep=True)

    def discard(self) -> None:
        """Stop here and forget what was added."""
        self._staging.close(keep=False)

    def seal(self) -> Catalog:
        """Write the catalog and open it. Raises CacheFull, CacheError; then nothing has taken the name `file`."""
        self._staging.commit()  # what was listed outlives a failure from here on
        try:
            self._write(self._previous)
        except CatalogError as error:
            if self._previous is None or error.path != str(self._previous):
                raise
            _log.warning("%s; all inode numbers of its successor are new", error)
            self._write(None)
        self._staging.close(keep=False)
        return Catalog.open(self._file)

    def _write(self, previous_file: Path | None) -> None:
        previous = None if previous_file is None else Catalog.open(previous_file)
        try:
            self._sealing.unlink(missing_ok=True)
            self._fill(previous)
            sync(self._sealing)
            os.replace(self._sealing, self._file)
            sync(self._file.parent)
        except BaseException as error:
            self._sealing.unlink(missing_ok=True)
            self._staging.rollback()
            if isinstance(error, DAMAGE):
                raise self._staging.failed(error, "finishing it") from error
            if isinstance(error, OSError) and not isinstance(error, CacheError):
                text = os.strerror(error.errno or errno.EIO)
                raise CacheError(f"catalog {self._file}: {text} while finishing it", path=str(self._file)) from error
            raise
        finally:
            if previous is not None:
                previous.close()

    def _fill(self, previous: Catalog | None) -> None:
        target = sqlite3.connect(self._sealing, isolation_level=None, check_same_thread=False)
        try:
            # Nothing to roll back to and nothing to keep on a crash: the file has no name yet.
            target.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;"
                f"PRAGMA cache_size = -{CACHE_KIB}; PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {FORMAT};" + SCHEMA
            )
            target.execute("BEGIN")
            numbering = _Numbering(self._staging, previous, self._last_id)
            with closing(numbering.rows()) as rows:
                target.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", self._until_cancelled(rows))
            target.executemany("INSERT INTO skipped VALUES (?, ?)", self._staging.skipped())
            (skipped,) = target.execute("SELECT count(*) FROM skipped").fetchone()
            summary = numbering.summary(self._identity, self._root, skipped, self._created)
            target.execute(f"INSERT INTO summary VALUES ({', '.join('?' * len(summary))})", summary)  # noqa: S608
            if previous is not None and previous.has_keys:
                # An entry that keeps its number is the same version, so it keeps its content key.
                put_keys(target, previous.keys())
            target.execute("COMMIT")
        finally:
            target.close()

    def _until_cancelled(self, rows: Iterator[Numbered]) -> Iterator[Numbered]:
        for row in rows:
            if self._cancelled:
                raise Cancelled(f"catalog {self._file}: cancelled")
            yield row


class _Numbering:
    """One pass over the staged entries that gives each its id and counts what passes."""

    def __init__(self, staging: Staging, previous: Catalog | None, last_id: int) -> None:
        self._staging = staging
        self._previous = previous
        self._last_id = last_id
        self._files = 0
        self._directories = -1  # the root does not count
        self._bytes = 0
        self._sizes = _Median()
        self._digest = blake2b(digest_size=16)

    def rows(self) -> Generator[Numbered, None, None]:
        """Rows of the catalog's table `entries`."""
        at: tuple[int, bytes] | None = None
        parent = 0
        directory_name: bytes | None = None
        former: _Former | None = None
        hash_ = self._digest.update
        with closing(self._staging.rows()) as staged:  # an open cursor would keep the file locked after an error
            for depth, folder, name, file, size, mtime_ns, version in staged:
                if (depth, folder) != at:
                    at = (depth, folder)
                    directory_name = None
                    parent, former = self._enter(depth, folder)
                if file:
                    if name == directory_name:
                        self._staging.skip(folder, name, names.BESIDE_DIRECTORY)
                        continue
                    id = former.file(name, version, size) if former else 0
                    if not id:
                        id = self._last_id = self._last_id + 1
                    self._files += 1
                    self._bytes += size
                    self._sizes.add(size)
                    content = version.encode()
                    hash_(b"f%b\0%d %d\0%b" % (name, size, len(content), content))
                else:
                    directory_name = name
                    self._directories += 1
                    id = self._directory(depth, folder, name, former)
                    hash_(b"d%b\0" % name)
                yield id, parent, name, 1 - file, size, mtime_ns, version

    def _enter(self, depth: int, folder: bytes) -> tuple[int, _Former | None]:
        """The id of the directory whose entries come next, and its entries of the previous catalog."""
        self._digest.update(b"@%d\0%b\0\0" % (depth, folder))
        if depth == 0:
            return 0, None
        id, old = self._staging.folder(folder)
        return id, _Former(self._previous.named(old)) if self._previous and old else None

    def _directory(self, depth: int, folder: bytes, name: bytes, former: _Former | None) -> int:
        if depth == 0:
            self._staging.number_folder(b"", ROOT, ROOT)
            return ROOT
        old = former.directory(name) if former else 0
        id = old
        if not id:
            id = self._last_id = self._last_id + 1
        self._staging.number_folder(folder + b"\0" + name if folder else name, id, old)
        return id

    def summary(self, identity: str, root: str, skipped: int, created: float | None) -> Summary:
        return Summary(
            identity=identity,
            root=root,
            snapshot=self._digest.hexdigest(),
            files=self._files,
            directories=self._directories,
            bytes=self._bytes,
            skipped=skipped,
            last_id=self._last_id,
            created=time.time() if created is None else created,
            median_size=self._sizes.median(),
        )


class _Former:
    """The previous entries of one directory, asked for in name order: both sides are sorted, so it is one merge."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def _at(self, name: bytes) -> Row | None:
        row = self._next
        while row is not None and row.name < name:
            row = self._next = next(self._rows, None)
        return row if row is not None and row.name == name else None

    def file(self, name: bytes, version: str, size: int) -> int:
        row = self._at(name)
        unchanged = row is not None and not row.directory and row.version == version and row.size == size
        return row.id if row is not None and unchanged else 0

    def directory(self, name: bytes) -> int:
        row = self._at(name)
        return row.id if row is not None and row.directory else 0


class _Median:
    """The median of many sizes to within 1%, from at most some thousand counters."""

    # 64 to 127 steps per power of two: neighbours differ by at most 1/64, and the example is inside one step.
    _BITS = 7

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._examples: dict[int, int] = {}

    def add(self, size: int) -> None:
        shift = size.bit_length() - self._BITS
        step = size if shift <= 0 else size >> shift << shift
        if step in self._counts:
            self._counts[step] += 1
        else:
            self._counts[step] = 1
            self._examples[step] = size  # a size that occurs: exact where all are equal

    def median(self) -> int:
        left = sum(self._counts.values()) // 2
        for step in sorted(self._counts):
            left -= self._counts[step]
            if left < 0:
                return self._examples[step]
        return 0

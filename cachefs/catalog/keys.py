"""Content keys of a catalog's files: gathered for as long as it takes to read them all, then part of the catalog.

They wait in a database beside the catalogs of their dataset, committed every second or so, because reading a dataset
takes hours and whoever does it may be killed. A key is kept with what it is the key of (`digest.version_ref`), so what
was gathered for an older catalog serves a newer one where an entry has stayed the same, and nothing else does.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from cachefs.catalog.catalog import Catalog
from cachefs.catalog.format import DAMAGE, KEYS_SCHEMA, WITH_KEYS, translated
from cachefs.digest import version_ref
from cachefs.errors import CacheError, CatalogError

# Of the database of what was gathered. Another format is begun again.
FORMAT = 1

_COMMIT_SECONDS = 1.0

_SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE keys(id INTEGER PRIMARY KEY, ref BLOB NOT NULL, key BLOB NOT NULL);
"""


class GatheredKeys:
    """What is known so far. For one process at a time, and one thread."""

    def __init__(self, file: Path) -> None:
        """Go on with `file` if it is whole. Raises CatalogError (another process is at it), CacheFull, CacheError."""
        self.file = file
        self._database = self._open()
        self._committed = time.monotonic()

    def _open(self) -> sqlite3.Connection:
        for last in (False, True):
            database = None
            try:
                database = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False, timeout=0)
                database.execute("PRAGMA locking_mode = EXCLUSIVE")
                database.execute("BEGIN IMMEDIATE")
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if version == FORMAT and database.execute("PRAGMA quick_check").fetchone() == ("ok",):
                    return database
                if version == 0 and database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    database.execute("COMMIT")
                    database.executescript(_SCHEMA)
                    database.execute("BEGIN IMMEDIATE")
                    return database
            except DAMAGE as error:
                if database is not None:
                    database.close()
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    raise CatalogError(
                        f"{self.file}: another process is sealing this dataset; wait for it", path=str(self.file)
                    ) from error
                if last:
                    raise translated(error, self.file, "gathering content keys") from error
            else:
                database.close()
            self._remove()  # damaged, or of another version: begin again
        raise CacheError(f"{self.file}: cannot be begun", path=str(self.file))

    def has(self, id: int, ref: str) -> bool:
        try:
            found = self._database.execute("SELECT ref FROM keys WHERE id = ?", (id,)).fetchone()
        except DAMAGE as error:
            raise translated(error, self.file, "gathering content keys") from error
        return found is not None and bool(found[0] == bytes.fromhex(ref))

    def add(self, keys: Iterable[tuple[int, str, bytes]]) -> None:
        """(id of the entry, its version_ref, content key) each."""
        try:
            rows = ((id, bytes.fromhex(ref), key) for id, ref, key in keys)
            self._database.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", rows)
            if time.monotonic() - self._committed >= _COMMIT_SECONDS:
                self._commit()
        except DAMAGE as error:
            raise translated(error, self.file, "gathering content keys") from error

    def _commit(self) -> None:
        self._database.execute("COMMIT")
        self._database.execute("BEGIN IMMEDIATE")
        self._committed = time.monotonic()

    def of(self, catalog: Catalog) -> Iterator[tuple[int, bytes]]:
        """(id, key) of what is an entry of `catalog`, in id order."""
        for id, ref, key in self._database.execute("SELECT id, ref, key FROM keys ORDER BY id"):
            row = catalog.get(id)
            if row is None or row.directory:
                continue
            if bytes.fromhex(version_ref(catalog.object_path(id), row.version)) == ref:
                yield id, key

    def close(self, *, keep: bool = True) -> None:
        """keep: the next one goes on from here."""
        try:
            if keep and self._database.in_transaction:
                self._database.execute("COMMIT")
        finally:
            self._database.close()
            if not keep:
                self._remove()

    def _remove(self) -> None:
        for name in (self.file.name, self.file.name + "-journal"):
            self.file.with_name(name).unlink(missing_ok=True)


def add_keys(catalog: Catalog, keys: Iterable[tuple[int, bytes]], target: Path) -> None:
    """Write what `catalog` has, and these keys, as `target`. Raises CacheFull, CacheError, CatalogError."""
    try:
        shutil.copyfile(catalog.file, target)
        with closing(sqlite3.connect(target, isolation_level=None)) as database:
            # As in builder.py: nobody knows the file yet, so a crash has nothing to roll back.
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            database.execute("BEGIN")
            put_keys(database, keys)
            database.execute("COMMIT")
        sync(target)
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, DAMAGE):
            raise translated(error, target, "putting content keys into it") from error
        if isinstance(error, OSError) and not isinstance(error, CacheError):
            text = os.strerror(error.errno or errno.EIO)
            raise CacheError(
                f"catalog {target}: {text} while putting content keys into it", path=str(target)
            ) from error
        raise


def put_keys(database: sqlite3.Connection, keys: Iterable[tuple[int, bytes]]) -> None:
    """Into a catalog that is being written, within its transaction; those of entries that it has not are left out."""
    database.execute(KEYS_SCHEMA)
    database.executemany(
        "INSERT OR REPLACE INTO keys SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM entries WHERE id = ?1)", keys
    )
    database.execute(f"PRAGMA user_version = {WITH_KEYS}")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

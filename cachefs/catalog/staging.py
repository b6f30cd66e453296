"""Where a catalog's entries wait, sorted, until all are known: FILE.building.

It is an ordinary SQLite database with a rollback journal, so that a listing of hours survives a kill -9 or a power
failure up to its last commit. Sorting is the table's own order (depth, folder, name): no sort step, no temporary
files elsewhere, and memory stays that of SQLite's page cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.catalog import names
from cachefs.catalog.format import DAMAGE, translated
from cachefs.errors import CacheError, CatalogError

if TYPE_CHECKING:
    from cachefs.messages import Entry

log = logging.getLogger("cachefs.fetcher")

# Of the staging file. Another format is not resumed but started again.
FORMAT = 1

# A commit waits for the disk, some ms to 100 ms; once a second costs little and loses at most a second's listing.
_COMMIT_SECONDS = 1.0

# Rows handed to SQLite at once; one page of an S3 listing.
_BATCH = 1000

# Listings arrive in a few sorted streams, which touch few pages; this also holds the upper levels of a large tree.
CACHE_KIB = 16 * 1024

# A listing that stopped longer ago is not continued: its names would be older than a user expects of a new mount.
_RESUME_SECONDS = 3600.0

_SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE header(identity TEXT NOT NULL, root TEXT NOT NULL, committed REAL NOT NULL);
CREATE TABLE finished(token TEXT PRIMARY KEY, objects INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entries(
    depth INTEGER NOT NULL, folder BLOB NOT NULL, name BLOB NOT NULL, file INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, version TEXT NOT NULL,
    PRIMARY KEY(depth, folder, name, file)) WITHOUT ROWID;
CREATE TABLE skipped(name BLOB PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE folders(path BLOB PRIMARY KEY, id INTEGER NOT NULL, old INTEGER NOT NULL) WITHOUT ROWID;
"""

_MAX_INT = 2**63 - 1

Staged = tuple[int, bytes, bytes, int, int, int, str]


def remove_abandoned(catalogs: Path) -> None:
    """Remove what interrupted listings, and catalogs that did not arrive, left below the folder `catalogs`."""
    for file in (*catalogs.glob("*/*.building*"), *catalogs.glob("*/*.arriv*")):
        with contextlib.suppress(OSError):  # somebody begins that listing anew just now, or it is no file
            if time.time() - file.stat().st_mtime > _RESUME_SECONDS:
                file.unlink()
                log.info("%s: what was interrupted over an hour ago, removed", file)


class Staging:
    """The entries seen so far of one listing. Not for several threads at once."""

    def __init__(self, file: Path, *, identity: str, root: str, resume: bool) -> None:
        """Continue `file` if it is of the same identity and root, recent and whole; else begin it anew.

        Raises CatalogError when another process is at it, CacheFull when there is no room.
        """
        self.file = file
        self._root = root
        self._judge = names.Judge(root)
        self._files: list[Staged] = []
        self._folders: list[Staged] = []
        self._skipped: list[tuple[bytes, str]] = []
        self._folders_known: set[tuple[int, bytes]] = set()
        self._damaged = False
        self._lost = False  # SQLite took back what came after the last commit
        self._closed = False
        self._database = self._open(identity, resume)
        self._committed = time.monotonic()

    def _open(self, identity: str, resume: bool) -> sqlite3.Connection:
        try:
            if self.file.exists():
                if database := self._continue(identity, resume):
                    return database
                self._remove_files()
            database = self._connect()
            self._prepare(database)
            database.executescript(_SCHEMA)
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT INTO header VALUES (?, ?, ?)", (identity, self._root, time.time()))
            database.execute("INSERT INTO entries VALUES (0, x'', x'', 0, 0, 0, '')")  # the root
            return database
        except DAMAGE as error:
            raise translated(error, self.file, "beginning a listing") from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, isolation_level=None, check_same_thread=False, timeout=0)

    @staticmethod
    def _prepare(database: sqlite3.Connection) -> None:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    def _continue(self, identity: str, resume: bool) -> sqlite3.Connection | None:
        """The open database of an earlier run, when it can be used."""
        database = self._connect()
        try:
            self._prepare(database)  # fails here if it is no database, or if another process has it
            database.execute("BEGIN IMMEDIATE")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if resume and version == FORMAT:
                found = database.execute("SELECT identity, root, committed FROM header").fetchone()
                age = time.time() - found[2]
                if found[:2] == (identity, self._root) and 0 <= age < _RESUME_SECONDS:
                    return database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                database.close()
                raise CatalogError(
                    f"catalog {self.file}: another process is listing this dataset; wait for it", path=str(self.file)
                ) from error
            # Anything else is a file of another kind or a damaged one: begin again.
        except (*DAMAGE, TypeError):
            pass  # not a database, or no header row: begin again
        database.close()
        return None

    def add(self, entry: Entry) -> None:
        """Take one entry, in any order. The same name again replaces what was there."""
        place = self._judge.place(entry.path, directory=entry.directory, size=entry.size)
        if isinstance(place, str):
            self.note_skipped(entry.path, place)
            return
        depth, folder, name, directory = place
        if directory:
            self._folders.append((depth, folder, name, 0, 0, _clamped(entry.mtime_ns), ""))
        elif not 0 <= entry.size <= _MAX_INT:
            self.note_skipped(entry.path, names.SIZE)
            return
        elif not _is_utf8(entry.version):
            self.note_skipped(entry.path, names.VERSION)
            return
        else:
            mtime_ns = _clamped(entry.mtime_ns)
            self._files.append((depth, folder, name, 1, entry.size, mtime_ns, entry.version))
        if folder and (depth, folder) not in self._folders_known:
            self._add_folders_above(depth, folder)
        if len(self._files) >= _BATCH or len(self._folders) >= _BATCH:
            self.flush()

    def note_skipped(self, path: str, reason: str) -> None:
        """path: the origin's name of it, with surrogates where it is not UTF-8."""
        self._skipped.append((path.encode("utf-8", "surrogatepass"), reason))
        if len(self._skipped) >= _BATCH:
            self.flush()

    def _add_folders_above(self, depth: int, folder: bytes) -> None:
        """Make the directories above an entry, which object stores do not list."""
        if len(self._folders_known) >= _BATCH:
            self._folders_known.clear()
        while folder and (depth, folder) not in self._folders_known:
            self._folders_known.add((depth, folder))
            depth -= 1
            folder, _, name = folder.rpartition(b"\0")
            self._folders.append((depth, folder, name, 0, 0, 0, ""))

    def flush(self) -> None:
        self._write("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", self._files)
        # The same directory comes as a marker, from a listing and as part of a name: who knows its time wins.
        self._write(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET mtime_ns = max(mtime_ns, excluded.mtime_ns)",
            self._folders,
        )
        self._write("INSERT OR REPLACE INTO skipped VALUES (?, ?)", self._skipped)
        self._files.clear()
        self._folders.clear()
        self._skipped.clear()

    def finish(self, token: str, objects: int, size: int) -> None:
        """Remember that everything of `token` was added, and commit if the last commit was a while ago."""
        self.flush()
        self._write("INSERT OR REPLACE INTO finished VALUES (?, ?, ?)", [(token, objects, size)])
        if time.monotonic() - self._committed >= _COMMIT_SECONDS:
            self.commit()

    def finished(self, token: str) -> tuple[int, int] | None:
        """(objects, bytes) of `token` if it was finished, in this run or the one that this one continues."""
        try:
            found: tuple[int, int] | None = self._database.execute(
                "SELECT objects, bytes FROM finished WHERE token = ?", (token,)
            ).fetchone()
        except DAMAGE as error:
            raise self.failed(error, "listing") from error
        return found

    def commit(self) -> None:
        """Make what was added so far outlive this process and the machine."""
        self.flush()
        try:
            self._database.execute("UPDATE header SET committed = ?", (time.time(),))
            self._database.execute("COMMIT")
            self._database.execute("BEGIN IMMEDIATE")
        except DAMAGE as error:
            self._lost = True
            raise self.failed(error, "listing") from error
        self._committed = time.monotonic()

    def rollback(self) -> None:
        """Forget what a `seal` that failed wrote here."""
        try:
            if self._database.in_transaction:  # SQLite ends one by itself when the disk is full
                self._database.execute("ROLLBACK")
            self._database.execute("BEGIN IMMEDIATE")
        except DAMAGE as error:
            raise self.failed(error, "listing") from error

    def failed(self, error: Exception, doing: str) -> CacheError:
        """The error to raise for one of SQLite's. After damage this file is not kept: resuming would fail again."""
        problem = translated(error, self.file, doing)
        self._damaged = self._damaged or isinstance(problem, CatalogError)
        return problem

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if not rows:
            return
        try:
            self._database.executemany(statement, rows)
        except DAMAGE as error:
            self._lost = True
            raise self.failed(error, "listing") from error

    # --- what seal() asks, after the last add ---

    def rows(self) -> sqlite3.Cursor:
        """All entries (`Staged`) by depth, folder and name: parents before children, siblings together, and of two
        entries with the same name the directory first. The caller closes it."""
        return self._database.execute("SELECT * FROM entries ORDER BY depth, folder, name, file")

    def skip(self, folder: bytes, name: bytes, reason: str) -> None:
        path = names.path_of(self._root, folder, name)
        self._database.execute("INSERT OR REPLACE INTO skipped VALUES (?, ?)", (path, reason))

    def skipped(self) -> Iterator[tuple[bytes, str]]:
        return self._database.execute("SELECT name, reason FROM skipped ORDER BY name")

    def number_folder(self, path: bytes, id: int, old: int) -> None:
        self._database.execute("INSERT OR REPLACE INTO folders VALUES (?, ?, ?)", (path, id, old))

    def folder(self, path: bytes) -> tuple[int, int]:
        """(id, id in the previous catalog or 0) of a directory that `number_folder` was told."""
        found: tuple[int, int] | None = self._database.execute(
            "SELECT id, old FROM folders WHERE path = ?", (path,)
        ).fetchone()
        if found is None:
            raise CatalogError(f"catalog {self.file}: damaged; it is begun again", path=str(self.file))
        return found

    # --- the end of it ---

    def close(self, *, keep: bool) -> None:
        """Commit what was added for the next run to continue, or remove the file. Again: nothing happens.

        After a failure the next run continues from the last commit.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if keep and not self._damaged and not self._lost:
                self.commit()
        finally:
            self._database.close()
            if not keep or self._damaged:
                self._remove_files()

    def _remove_files(self) -> None:
        for name in (self.file.name, self.file.name + "-journal"):
            try:
                os.unlink(self.file.with_name(name))
            except FileNotFoundError:
                continue


def _clamped(mtime_ns: int) -> int:
    """A time that SQLite can hold: years 1677 to 2262."""
    return max(-_MAX_INT, min(mtime_ns, _MAX_INT))


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

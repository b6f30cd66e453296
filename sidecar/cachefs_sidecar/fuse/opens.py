"""Which files of a mount are open, and through which backing file: a table that all its workers share.

In passthrough mode the kernel insists that all opens of a file use one backing id, and that a file is not open in
passthrough and through its page cache at once; who breaks the rule gives a reader EIO. So whoever answers an OPEN must
know every other one, whichever worker answered it, and must go on knowing it when workers are killed. SQLite does
exactly this: a change happens as a whole or not at all, whoever dies when. (An OPEN and its RELEASE cost 25 us here, 50
with the first and last of a file. The table is in the runtime directory, never synced.)

The kernel's `unique` of an OPEN becomes the handle of what was opened (`fh`), and RELEASE names it. So nothing is
counted: opens are a set, and to add or to take away a handle twice, because a request was delivered again, changes
nothing. What deliveries can do to each other is said beside each statement.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The table, what SQLite puts beside it, and a file to lock: see `change`.
_FILES = ("", "-wal", "-shm", "-lock")

# backings: what is registered with the kernel. node 0: nobody uses it any more, it is still to be closed.
# opens: tries: how often the OPEN was answered. again: it was delivered more than once. released: see `release`.
_SCHEMA = """
CREATE TABLE backings (id INTEGER PRIMARY KEY, node INTEGER NOT NULL, file BLOB NOT NULL);
CREATE INDEX backing_of ON backings (node);
CREATE TABLE opens (
    fh INTEGER PRIMARY KEY, node INTEGER NOT NULL, tries INTEGER NOT NULL, again INTEGER NOT NULL,
    released INTEGER NOT NULL
);
CREATE INDEX opens_of ON opens (node);
CREATE TABLE state (last_id INTEGER NOT NULL, refused TEXT NOT NULL);
"""


class Backing(NamedTuple):
    """A file that the kernel reads by itself. id: the kernel's number of it. file: which one it is (files.identity)."""

    id: int
    file: bytes


class Opens:
    """Every method belongs into a `change`, but for those that only look. For one thread at a time."""

    def __init__(self, file: Path) -> None:
        """Open the table in a worker: SQLite does not survive a fork. Raises sqlite3.Error, OSError."""
        self._lock = os.open(f"{file}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._do = self._db.execute
        self._do("PRAGMA synchronous = OFF")  # it need not outlive the machine

    @staticmethod
    def create(file: Path, last_id: int) -> None:
        """last_id: the last backing id that the kernel has given away. Raises sqlite3.Error, OSError."""
        Opens.remove(file)
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
            db.execute("INSERT INTO state VALUES (?, '')", (last_id,))

    @staticmethod
    def remove(file: Path) -> None:
        for suffix in _FILES:
            Path(f"{file}{suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """What happens within happens as a whole, and nothing else meanwhile. Raises sqlite3.Error."""
        # SQLite would sleep for milliseconds and try again. The kernel wakes who waits, and lets go for who is killed.
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._do("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._do("ROLLBACK")
                raise
            self._do("COMMIT")
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    # --- opens ---

    def is_open(self, node: int) -> bool:
        return self._do("SELECT 1 FROM opens WHERE node = ? AND released = 0 LIMIT 1", (node,)).fetchone() is not None

    def count(self) -> int:
        """How many handles are open."""
        return int(self._do("SELECT COUNT(*) FROM opens WHERE released = 0").fetchone()[0])

    def add(self, fh: int, node: int, *, again: bool) -> int:
        """A handle is about to be given away; how often it was by now. again: the OPEN says it was delivered before.

        0, and nothing is added, for a delivery that comes late: another one was answered, and the file closed again.
        """
        tries, released = self._do(
            "INSERT INTO opens VALUES (?, ?, 1, ?, 0) "
            "ON CONFLICT (fh) DO UPDATE SET tries = tries + 1, again = again | excluded.again "
            "RETURNING tries, released",
            (fh, node, again),
        ).fetchone()
        return 0 if released else int(tries)

    def release(self, fh: int) -> list[int]:
        """A handle is closed. The ids of backing files that nobody uses any more: to be closed after the change."""
        row = self._do("SELECT node, again FROM opens WHERE fh = ? AND released = 0", (fh,)).fetchone()
        if row is None:
            return []  # delivered twice
        node, again = row
        if again:
            # The first delivery may still lie with a worker that was too slow: when it gets here, it must find out.
            self._do("UPDATE opens SET released = 1 WHERE fh = ?", (fh,))
        else:
            self._do("DELETE FROM opens WHERE fh = ?", (fh,))
        return self._retire(node)

    def withdraw(self, fh: int, tries: int) -> list[int]:
        """The kernel did not take the answer number `tries`: as `release`, unless a later one was, or will be, given.

        It did not because the OPEN went to another worker, or because whoever opened was killed meanwhile. Who gets it
        next adds it again before it answers, so what is not the last answer's business is left alone.
        """
        row = self._do("SELECT node FROM opens WHERE fh = ? AND tries = ? AND released = 0", (fh, tries)).fetchone()
        if row is None:
            return []
        self._do("DELETE FROM opens WHERE fh = ?", (fh,))
        return self._retire(row[0])

    def _retire(self, node: int) -> list[int]:
        if self.is_open(node):
            return []
        # Marked before it is closed: nobody opens a file by an id that is closed, and who is killed in between leaves
        # one that `forget_unused` finds.
        retired = self._do("UPDATE backings SET node = 0 WHERE node = ? RETURNING id", (node,))
        return [row[0] for row in retired.fetchall()]

    # --- backing files ---

    def backing(self, node: int) -> Backing | None:
        row = self._do("SELECT id, file FROM backings WHERE node = ?", (node,)).fetchone()
        return None if row is None else Backing(*row)

    def register(self, node: int, backing: Backing) -> range:
        """The kernel has given away an id for the file of a node. Those that it gave to workers that were killed before
        they could write them down: ids come in order, and no other worker asks for one meanwhile."""
        (last,) = self._do("SELECT last_id FROM state").fetchone()
        self._do("UPDATE state SET last_id = ?", (backing.id,))
        self._do("INSERT INTO backings VALUES (?, ?, ?)", (backing.id, node, backing.file))
        return range(last + 1, backing.id)

    def forget_unused(self) -> list[int]:
        """Ids that nobody uses any more. They may be closed already: whoever retired them was to do it, and may have
        been killed before. So they are closed once more, within this change."""
        return [row[0] for row in self._do("DELETE FROM backings WHERE node = 0 RETURNING id").fetchall()]

    # --- the whole mount ---

    @property
    def refused(self) -> str:
        """Why nothing is registered any more; "" = it is."""
        return str(self._do("SELECT refused FROM state").fetchone()[0])

    def refuse(self, why: str) -> bool:
        """False when it was known already."""
        return self._do("UPDATE state SET refused = ? WHERE refused = ''", (why,)).rowcount == 1

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

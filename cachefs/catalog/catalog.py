"""Reading a catalog: the names of a dataset, answered from an index without holding them in memory.

Opening reads the header and one row, whatever the number of entries. SQLite is told that the file never changes
(immutable=1), so it takes no locks, and its page cache is small: the kernel keeps the file's pages. The file is not
mapped into memory, because an SSD that fails would then kill the reader (SIGBUS) instead of giving an error.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from cachefs.catalog.format import DAMAGE, ROOT, WITH_KEYS, Listed, Row, Summary, check_header, prefix_of
from cachefs.digest import KEY_BYTES
from cachefs.errors import CatalogError, ObjectNotFound

# Measured with a million entries: lookups in directories in use take 3 us with 4 MiB and more, 5 us with 2 MiB.
_CACHE_KIB = 4096

# Paths of directories that were asked for lately, some 150 bytes each; dropped all at once when they are so many.
_REMEMBERED = 8192

# Rows read at a time where a caller takes them one by one.
_PAGE = 1000

_COLUMNS = "id, parent, name, directory, size, mtime_ns, version"
_GET = f"SELECT {_COLUMNS} FROM entries WHERE id = ?"  # noqa: S608 - constants
_LOOKUP = f"SELECT {_COLUMNS} FROM entries INDEXED BY by_name WHERE parent = ? AND name = ?"  # noqa: S608
# Children have larger ids than their parents. Insisting on it keeps a damaged file from leading us in circles.
_NAMED = f"SELECT {_COLUMNS} FROM entries INDEXED BY by_name WHERE parent = ?1 AND id > ?1 ORDER BY name"  # noqa: S608
_CHILDREN = (
    f"SELECT {_COLUMNS} FROM entries INDEXED BY by_parent "  # noqa: S608
    "WHERE parent = ? AND id > ? ORDER BY id LIMIT ?"
)

# What a listing shows; the version, half of a row's bytes, is left out.
_LISTED = (
    "SELECT id, name, directory, size, mtime_ns FROM entries INDEXED BY by_parent "
    "WHERE parent = ? AND id > ? ORDER BY id LIMIT ?"
)

RawRow = tuple[int, int, bytes, int, int, int, str]

_SUMMARY_TYPES = (str, str, str, int, int, int, int, int, float, int)

_new_tuple = tuple.__new__


def _row(raw: RawRow) -> Row:
    id, parent, name, directory, size, mtime_ns, version = raw
    return _new_tuple(Row, (id, parent, name, directory == 1, size, mtime_ns, version))


class Catalog:
    """One catalog file, open for reading. Every method raises CatalogError where the file turns out damaged.

    Belongs to one process: open it after a fork. Threads may share it if they take turns; a thread of its own for
    each is faster.
    """

    def __init__(self, file: Path, connection: sqlite3.Connection, summary: Summary, has_keys: bool) -> None:
        """Use `Catalog.open`."""
        self.file = file
        self.summary = summary
        self.has_keys = has_keys
        self._connection = connection
        self._select = connection.cursor().execute  # one cursor for all answers of a single row
        self._prefix = prefix_of(summary.root)
        self._folders: dict[int, str] = {}

    @classmethod
    def open(cls, file: Path) -> Catalog:
        """Open `file`. CatalogError when it is missing, cut short, unfinished, of another format or no catalog."""
        version = check_header(file)
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(file))}?immutable=1&mode=ro",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
        except DAMAGE as error:
            raise CatalogError(f"catalog {file}: {error}", path=str(file)) from error
        try:
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            # A catalog may come from another machine: nothing in it is run, and its pages are not believed.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            rows = connection.execute(f"SELECT {', '.join(Summary._fields)} FROM summary").fetchall()  # noqa: S608
            if len(rows) != 1:
                raise CatalogError(f"catalog {file}: was never finished; list the dataset again", path=str(file))
            if tuple(map(type, rows[0])) != _SUMMARY_TYPES:
                raise CatalogError(f"catalog {file}: damaged; list the dataset again", path=str(file))
            return cls(file, connection, Summary._make(rows[0]), version == WITH_KEYS)
        except DAMAGE as error:
            connection.close()
            raise CatalogError(f"catalog {file}: {error}; list the dataset again", path=str(file)) from error
        except BaseException:
            connection.close()
            raise

    def lookup(self, parent: int, name: bytes) -> Row | None:
        """The entry `name` of directory `parent`."""
        try:
            raw = self._select(_LOOKUP, (parent, name)).fetchone()
        except DAMAGE as error:
            raise self._failed(error) from error
        except OverflowError:  # a number that no entry has: SQLite's are 63 bits
            return None
        if raw is None:
            return None
        id, parent, name, directory, size, mtime_ns, version = raw
        return _new_tuple(Row, (id, parent, name, directory == 1, size, mtime_ns, version))

    def get(self, id: int) -> Row | None:
        """The entry with this inode number."""
        try:
            raw = self._select(_GET, (id,)).fetchone()
        except DAMAGE as error:
            raise self._failed(error) from error
        except OverflowError:
            return None
        if raw is None:
            return None
        id, parent, name, directory, size, mtime_ns, version = raw
        return _new_tuple(Row, (id, parent, name, directory == 1, size, mtime_ns, version))

    def children(self, parent: int, after: int = 0, limit: int = 1000) -> list[Row]:
        """At most `limit` entries of directory `parent` with ids above `after`, in id order."""
        try:
            return [_row(raw) for raw in self._connection.execute(_CHILDREN, (parent, max(after, parent), limit))]
        except DAMAGE as error:
            raise self._failed(error) from error
        except OverflowError:
            return []

    def listed(self, parent: int, after: int, limit: int) -> list[Listed]:
        """The same entries with no more than a listing shows of them, in half the time: see `format.Listed`.

        What a damaged file has in place of a name or a number is passed on as it is.
        """
        try:
            return self._connection.execute(_LISTED, (parent, max(after, parent), limit)).fetchall()
        except DAMAGE as error:
            raise self._failed(error) from error
        except OverflowError:
            return []

    def named(self, parent: int) -> Iterator[Row]:
        """All entries of directory `parent` in the byte order of their names, streaming."""
        try:
            for raw in self._connection.execute(_NAMED, (parent,)):
                if type(raw[2]) is not bytes:
                    raise self._failed("a name is not text")
                yield _row(raw)
        except DAMAGE as error:
            raise self._failed(error) from error

    def object_path(self, id: int) -> str:
        """The full object path of an entry. ObjectNotFound when there is none with this id."""
        row = self.get(id)
        if row is None:
            raise ObjectNotFound(f"inode {id} is not in the catalog of {self.summary.root or 'this origin'}")
        if id == ROOT:
            return self.summary.root
        return self._below(row.parent) + self._text(row.name)

    def _below(self, directory: int) -> str:
        """What stands before the names in `directory`: its path and a slash. Asks for each directory once."""
        missing: list[tuple[int, str]] = []
        known = self._folders.get(directory)
        while known is None:
            if directory == ROOT:
                known = self._prefix
                break
            row = self.get(directory)
            # Parents have smaller ids: without this check a damaged file could send us round in circles.
            if row is None or not row.directory or not ROOT <= row.parent < directory:
                raise self._failed(f"entry {directory} has no path to the root")
            missing.append((directory, self._text(row.name)))
            directory = row.parent
            known = self._folders.get(directory)
        if len(self._folders) + len(missing) > _REMEMBERED:
            self._folders.clear()
        for directory, name in reversed(missing):
            known = f"{known}{name}/"
            self._folders[directory] = known
        return known

    def find(self, path: str) -> Row | None:
        """The entry at a full object path; one slash at the end is ignored."""
        if path in (self.summary.root, self._prefix):
            return self.get(ROOT)
        if not path.startswith(self._prefix):
            return None
        try:
            names = path[len(self._prefix) :].removesuffix("/").encode("utf-8").split(b"/")
        except UnicodeEncodeError:
            return None
        row = None
        parent = ROOT
        for name in names:
            row = self.lookup(parent, name)
            if row is None:
                return None
            parent = row.id
        return row

    def files(self, below: str = "") -> Iterator[tuple[str, Row]]:
        """(full object path, entry) of every file below the object path `below`; "" = of the whole dataset.

        Directory by directory, each in id order, streaming. `below` may be a file: then it is the only one.
        Raises ObjectNotFound when there is no such entry.
        """
        top = self.get(ROOT) if not below else self.find(below)
        if top is None:
            raise ObjectNotFound(f"{below}: not in the catalog of {self.summary.root}", path=below)
        if not top.directory:
            yield self.object_path(top.id), top
            return
        start = self._prefix if top.id == ROOT else self.object_path(top.id) + "/"
        open_folders = [(start, self._each_child(top.id))]
        while open_folders:
            folder, entries = open_folders[-1]
            for row in entries:
                if row.directory:
                    open_folders.append((f"{folder}{self._text(row.name)}/", self._each_child(row.id)))
                    break
                yield folder + self._text(row.name), row
            else:
                open_folders.pop()

    def _each_child(self, parent: int) -> Iterator[Row]:
        after = parent
        while page := self.children(parent, after, _PAGE):
            yield from page
            after = page[-1].id

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(the origin's name of it, reason) of everything at the origin that is not served, streaming.

        A name that is not UTF-8 comes as Python reads such names: with surrogates.
        """
        try:
            for name, reason in self._connection.execute("SELECT name, reason FROM skipped ORDER BY name"):
                yield name.decode("utf-8", "surrogatepass"), reason
        except (*DAMAGE, AttributeError) as error:
            raise self._failed(error) from error

    def rows_of(self, question: str) -> list[tuple[Any, ...]]:
        """What SQLite answers: for who looks at the file as a whole (`check`)."""
        try:
            return self._connection.execute(question).fetchall()
        except DAMAGE as error:
            raise self._failed(error) from error

    def key(self, id: int) -> bytes | None:
        """The content key of a file, where it is known."""
        if not self.has_keys:
            return None
        try:
            found = self._select("SELECT key FROM keys WHERE id = ?", (id,)).fetchone()
        except DAMAGE as error:
            raise self._failed(error) from error
        except OverflowError:
            return None
        return None if found is None else self._checked(found[0])

    def keys(self) -> Iterator[tuple[int, bytes]]:
        """(id, content key) of every file whose content is known, in id order, streaming."""
        if not self.has_keys:
            return
        try:
            for id, key in self._connection.execute("SELECT id, key FROM keys ORDER BY id"):
                yield id, self._checked(key)
        except DAMAGE as error:
            raise self._failed(error) from error

    def count_keys(self) -> int:
        """How many files' content is known; walks a table of some 25 bytes each."""
        if not self.has_keys:
            return 0
        try:
            (count,) = self._select("SELECT count(*) FROM keys").fetchone()
        except DAMAGE as error:
            raise self._failed(error) from error
        return int(count)

    def _checked(self, key: object) -> bytes:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise self._failed("a content key is none")
        return key

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Catalog({str(self.file)!r}, files={self.summary.files})"

    def _text(self, name: bytes) -> str:
        try:
            return name.decode()
        except (UnicodeDecodeError, AttributeError) as error:
            raise self._failed("a name is not UTF-8") from error

    def _failed(self, problem: Exception | str) -> CatalogError:
        if isinstance(problem, sqlite3.ProgrammingError):
            return CatalogError(f"catalog {self.file}: is closed", path=str(self.file))
        return CatalogError(f"catalog {self.file}: damaged ({problem}); list the dataset again", path=str(self.file))

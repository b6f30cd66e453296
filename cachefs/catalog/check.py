"""Whether a catalog that came from another machine is what it says: every row is read before any is served.

Its snapshot is the digest of its names, sizes and versions, so it is taken again from the rows, in the order in which
`builder` takes it. Whatever the file says beside that (another table, a name that leads out of its directory, an entry
that no directory leads to) would be damage in a catalog of our own, and is refused. Content keys are no part of the
snapshot: that they are keys, of files that there are, is all that can be seen of them.

Inode numbers are each cache's own affair. Those of another may mean something else here, and a kernel would show pages
of one object for another; `fits` says whether they do not, and `renumber` gives them anew where they do.
"""

from __future__ import annotations

import os
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from cachefs.catalog.builder import Builder
from cachefs.catalog.catalog import Catalog
from cachefs.catalog.compare import changes
from cachefs.catalog.format import KEYS_SCHEMA, ROOT, SCHEMA, Row, prefix_of
from cachefs.catalog.keys import add_keys
from cachefs.catalog.names import refusal
from cachefs.errors import CatalogError
from cachefs.messages import Entry

_MOST = 2**63 - 1

_TABLES = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"

# Called now and then while rows are read; what it raises ends the work.
Pause = Callable[[], None]

# Rows between two calls of it.
STEP = 1000


class Place(NamedTuple):
    """A directory that has something in it. path: its full object path."""

    depth: int
    path: str


def entries(catalog: Catalog, pause: Pause) -> Iterator[tuple[Place, Row]]:
    """Every entry but the root with its directory: by depth, within it by the directory's components, then by name.

    Eight bytes of memory for a directory of one depth. Raises CatalogError.
    """
    level, depth, count = array("q", [ROOT]), 1, 0
    while level:
        below = array("q")
        for id in level:
            place = None
            for row in catalog.named(id):
                place = place or Place(depth, catalog.object_path(id))
                _checked(row, catalog)
                if row.directory:
                    below.append(row.id)
                yield place, row
                count += 1
                if count % STEP == 0:
                    pause()
        level, depth = below, depth + 1
        pause()


def verify(catalog: Catalog, pause: Pause = lambda: None) -> None:
    """Raises CatalogError unless every row is fit to be served and together they are what the summary says."""
    summary = catalog.summary
    _check_tables(catalog)
    root = catalog.get(ROOT)
    if root is None or not root.directory or root.parent or root.name:
        raise _not_so(catalog, "its root is no directory")
    digest = blake2b(b"@0\0\0\0d\0", digest_size=16)
    prefix = prefix_of(summary.root)
    files = directories = total = 0
    at = None
    for place, row in entries(catalog, pause):
        if place is not at:
            at = place
            inner = place.path[len(prefix) :].encode().replace(b"/", b"\0") if place.depth > 1 else b""
            digest.update(b"@%d\0%b\0\0" % (place.depth, inner))
        if row.directory:
            directories += 1
            digest.update(b"d%b\0" % row.name)
        else:
            files += 1
            total += row.size
            version = row.version.encode()
            digest.update(b"f%b\0%d %d\0%b" % (row.name, row.size, len(version), version))
    if digest.hexdigest() != summary.snapshot:
        raise _not_so(catalog, "its names are not those of its snapshot")
    if (files, directories, total) != (summary.files, summary.directories, summary.bytes):
        raise _not_so(catalog, "it counts other than it has")
    there, greatest, skipped = _counted(catalog)
    if there != files + directories + 1 or greatest > summary.last_id or skipped != summary.skipped:
        raise _not_so(catalog, "it has entries that it does not count")
    _check_keys(catalog, pause)


def _checked(row: Row, catalog: Catalog) -> None:
    if type(row.size) is not int or type(row.mtime_ns) is not int or type(row.version) is not str:
        raise _not_so(catalog, "an entry is no entry")
    if not 0 <= row.size <= _MOST or refusal(row.name) or b"/" in row.name:
        raise _not_so(catalog, f"it has an entry that cannot be served ({row.name[:100]!r})")
    try:
        row.name.decode()
    except UnicodeDecodeError:
        raise _not_so(catalog, "a name is not UTF-8") from None


def _check_tables(catalog: Catalog) -> None:
    """No table, index, view or trigger but those of the format."""
    with closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(SCHEMA + KEYS_SCHEMA if catalog.has_keys else SCHEMA)
        wanted = ours.execute(_TABLES).fetchall()
    if catalog.rows_of(_TABLES) != wanted:
        raise _not_so(catalog, "it has other tables than a catalog has")
    # Of an index that is not that of its table, a listing and a lookup would show different names.
    if catalog.rows_of("PRAGMA integrity_check(1)") != [("ok",)]:
        raise _not_so(catalog, "it is damaged")


def _check_keys(catalog: Catalog, pause: Pause) -> None:
    for count, (id, _) in enumerate(catalog.keys()):
        row = catalog.get(id)
        if row is None or row.directory:
            raise _not_so(catalog, "it has a content key of no file")
        if count % STEP == 0:
            pause()


def _counted(catalog: Catalog) -> tuple[int, int, int]:
    """(rows as listings of directories find them, greatest id, skipped names)"""
    ((rows,),) = catalog.rows_of("SELECT count(*) FROM entries INDEXED BY by_parent WHERE parent >= 0")
    ((greatest,),) = catalog.rows_of("SELECT max(id) FROM entries")
    ((skipped,),) = catalog.rows_of("SELECT count(*) FROM skipped")
    return rows, greatest, skipped


def fits(catalog: Catalog, previous: Catalog | None, last_id: int, pause: Pause = lambda: None) -> bool:
    """Whether no number of `catalog` means another thing than in `previous`, and in those before it.

    last_id: the largest number that was ever given away here.
    """
    if previous is None:
        return last_id == 0
    for count, change in enumerate(changes(previous, catalog)):
        if count % STEP == 0:
            pause()
        if change.new is not None and change.new.id <= last_id and not _same(change.old, change.new):
            return False
    return True


def _same(old: Row | None, new: Row) -> bool:
    """Whether `new` may have the number of `old`: a directory, or a file of the same content."""
    if old is None or old.id != new.id or old.directory != new.directory:
        return False
    return new.directory or (old.version, old.size) == (new.version, new.size)


def renumber(
    catalog: Catalog, file: Path, previous: Catalog | None, last_id: int, pause: Pause = lambda: None
) -> Catalog:
    """The same names, with the same content keys, in a catalog `file` whose numbers follow those of `previous`.

    What `previous` has keys of keeps them, too. Costs what writing a new one costs. Raises CacheFull, CacheError,
    CatalogError.
    """
    summary = catalog.summary
    builder = Builder(
        file,
        identity=summary.identity,
        root=summary.root,
        previous=previous,
        last_id=last_id,
        resume=False,
        created=summary.created,
    )
    try:
        prefix = prefix_of(summary.root)
        root = catalog.get(ROOT)
        assert root is not None
        builder.add(Entry(prefix, 0, root.mtime_ns, "", True))
        for place, row in entries(catalog, pause):
            above = place.path + "/" if place.depth > 1 else prefix
            builder.add(Entry(above + row.name.decode(), row.size, row.mtime_ns, row.version, row.directory))
        for name, reason in catalog.skipped():
            builder.skip(name, reason)
        made = builder.seal()
    finally:
        builder.discard()
    if made.summary.snapshot != summary.snapshot:
        made.close()
        raise _not_so(catalog, "its names are not served as it says")
    if not catalog.has_keys:
        return made
    keyed = file.with_name(file.name + ".keyed")
    try:
        with made:
            add_keys(made, _keys_under_numbers_of(made, catalog, pause), keyed)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    os.replace(keyed, file)
    return Catalog.open(file)


def _keys_under_numbers_of(made: Catalog, catalog: Catalog, pause: Pause) -> Iterator[tuple[int, bytes]]:
    """The content keys of `catalog`. Both have the same names, so they come in the same order."""
    for (_, new), (_, old) in zip(entries(made, pause), entries(catalog, pause), strict=True):
        key = catalog.key(old.id)
        if key is not None:
            yield new.id, key


def _not_so(catalog: Catalog, why: str) -> CatalogError:
    return CatalogError(f"catalog {catalog.file}: {why}", path=str(catalog.file))

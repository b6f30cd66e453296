"""Names as fsspec describes them: dicts of name, size, type, and what tells one version from another.

A dataset with a catalog answers from it, here. Otherwise the fetcher lists the origin, and what it lists is kept
per directory (fsspec's dircache) until `invalidate_cache`. This module knows what is known; who asks the fetcher,
blocking or not, is core.py and aio.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cachefs.errors import CatalogError, IsADirectory, ObjectNotFound
from cachefs.filesystem.paths import parent_of
from cachefs.messages import Entry

if TYPE_CHECKING:
    from cachefs.catalog import Catalog, Row
    from cachefs.filesystem.views import View

Info = dict[str, Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def info_of(entry: Entry) -> Info:
    """fsspec's description of an entry. ETag: the version. mtime: aware datetime, left out where unknown."""
    if entry.directory:
        return {"name": entry.path, "size": 0, "type": "directory"}
    info: Info = {"name": entry.path, "size": entry.size, "type": "file", "ETag": entry.version}
    if entry.mtime_ns:
        info["mtime"] = _EPOCH + timedelta(microseconds=entry.mtime_ns // 1000)
    return info


class Listing(list[Info]):
    """What one directory holds, by name too: a look-up in a directory of a million must not read them all."""

    def __init__(self, infos: Iterable[Info]) -> None:
        super().__init__(infos)
        self.by_name = {info["name"]: info for info in self}


class Names:
    """What is known without asking. dircache: fsspec's."""

    def __init__(self, dircache: Any, *, flat: bool) -> None:
        """flat: directories exist only through the objects in them, so a flat listing tells all of them."""
        self._dircache = dircache
        self._flat = flat

    # --- one name ---

    def info(self, view: View, path: str) -> Info | None:
        """None = not known here. Raises ObjectNotFound when the snapshot has no such name."""
        catalog = view.catalog()
        if catalog is not None:
            return info_of(_entry(path, _found(catalog, path)))
        listing = self._kept(parent_of(path))
        return dict(listing.by_name[path]) if listing is not None and path in listing.by_name else None

    def require_file(self, view: View, path: str) -> None:
        """Raises ObjectNotFound or IsADirectory where the catalog says so: nothing else belongs to the snapshot."""
        catalog = view.catalog()
        if catalog is not None and _found(catalog, path).directory:
            raise IsADirectory(f"{path}: is a directory", path=path)

    # --- one directory ---

    def listed(self, view: View, path: str) -> list[Info] | None:
        """The entries of a directory, or the file itself; None = not known here."""
        catalog = view.catalog()
        if catalog is None:
            listing = self._kept(path)
            return None if listing is None else list(listing)
        row = _found(catalog, path)
        if not row.directory:
            return [info_of(_entry(path, row))]
        return [info_of(entry) for entry in _children(catalog, row, path)]

    def keep(self, path: str, infos: Iterable[Info]) -> list[Info]:
        """Remember what a directory holds; returns it, sorted by name."""
        listing = Listing(sorted(infos, key=lambda info: info["name"]))
        self._dircache[path] = listing
        return list(listing)

    def forget(self, path: str | None) -> None:
        """Forget listings of and around `path`; all of them for None."""
        if path is None:
            self._dircache.clear()
            return
        while path:
            self._dircache.pop(path, None)
            path = parent_of(path) if path != "/" else ""
        self._dircache.pop("", None)

    def _kept(self, path: str) -> Listing | None:
        try:
            listing = self._dircache[path]
        except KeyError:
            return None
        return listing if isinstance(listing, Listing) else None

    # --- everything below ---

    def found(self, view: View, path: str, maxdepth: int | None, withdirs: bool) -> dict[str, Info] | None:
        """What `find` answers, from the catalog; None = the origin is to be listed."""
        catalog = view.catalog()
        if catalog is None:
            return None
        row = catalog.find(path)
        if row is None:
            return {}
        if not row.directory:
            return {path: info_of(_entry(path, row))}
        out = {path: info_of(_entry(path, row))} if withdirs and path else {}
        for entry in _below(catalog, row, path, maxdepth):
            if withdirs or not entry.directory:
                out[entry.path] = info_of(entry)
        return dict(sorted(out.items()))

    def gathered(self, path: str, entries: Iterable[Entry], withdirs: bool) -> dict[str, Info]:
        """What `find` answers, from a flat listing of everything below `path`; {} when there is nothing."""
        out: dict[str, Info] = {}
        for entry in entries:
            out[entry.path] = info_of(entry)
            folder = parent_of(entry.path)
            while len(folder) > len(path) and folder not in out:
                out[folder] = info_of(Entry(folder, 0, 0, "", directory=True))
                folder = parent_of(folder)
        if out and self._flat:
            self._keep_tree(path, out)
        if out and path:
            out[path] = info_of(Entry(path, 0, 0, "", directory=True))
        return {name: info for name, info in sorted(out.items()) if withdirs or info["type"] == "file"}

    def _keep_tree(self, path: str, infos: dict[str, Info]) -> None:
        folders: dict[str, list[Info]] = {path: []}
        for name, info in infos.items():
            folders.setdefault(parent_of(name), []).append(info)
            if info["type"] == "directory":
                folders.setdefault(name, [])
        for folder, members in folders.items():
            self.keep(folder, members)


def _found(catalog: Catalog, path: str) -> Row:
    row = catalog.find(path)
    if row is None:
        raise ObjectNotFound(f"{path}: no such file in this snapshot of {catalog.summary.root}", path=path)
    return row


def _entry(path: str, row: Row) -> Entry:
    return Entry(path, row.size, row.mtime_ns, row.version, row.directory)


def _children(catalog: Catalog, row: Row, path: str) -> Iterator[Entry]:
    below = "" if not path else path.rstrip("/") + "/"
    for child in catalog.named(row.id):
        try:
            yield _entry(below + child.name.decode(), child)
        except UnicodeDecodeError as error:
            raise CatalogError(f"catalog {catalog.file}: a name is not UTF-8; list the dataset again") from error


def _below(catalog: Catalog, row: Row, path: str, maxdepth: int | None) -> Iterator[Entry]:
    folders = [(row, path, 1)]
    while folders:
        folder, name, depth = folders.pop()
        for entry in _children(catalog, folder, name):
            yield entry
            if entry.directory and (maxdepth is None or depth < maxdepth):
                child = catalog.find(entry.path)
                if child is not None:
                    folders.append((child, entry.path, depth + 1))

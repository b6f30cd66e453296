"""What is in the mount: nodes and names, as the catalogs say.

A node id is the catalog's row id, so the tree keeps no table of its own and FORGET has nothing to forget. A
refresh puts a newer catalog in front; ids that only an older one knows stay answerable, so that a file that is
open, or a directory someone stands in, goes on. Ids are never used for anything else again, which is what makes
this safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cachefs.errors import CacheFSError, StaleObject
from cachefs_sidecar.fuse.abi import BLOCK, ROOT, S_IFDIR, S_IFREG
from cachefs_sidecar.fuse.wire import Attributes

if TYPE_CHECKING:
    from cachefs.catalog import Listed, Row, Summary

# How many catalogs stay open: the newest and those before it. Each costs a descriptor and SQLite's page cache
# (4 MB at most), and a file that was open through three refreshes is rare.
GENERATIONS = 4

# Paths of directories that are remembered, some 150 bytes each.
FOLDERS = 4096


class Names(Protocol):
    """The part of cachefs.catalog.Catalog that a mount asks."""

    @property
    def summary(self) -> Summary: ...
    def lookup(self, parent: int, name: bytes) -> Row | None: ...
    def get(self, id: int) -> Row | None: ...
    def listed(self, parent: int, after: int, limit: int) -> list[Listed]: ...
    def object_path(self, id: int) -> str: ...
    def close(self) -> None: ...


class Tree:
    """Catalogs, newest first. Not for several threads at once: the session's lock is around every call."""

    def __init__(self, files: Sequence[Path], open_catalog: Callable[[Path], Names], *, uid: int, gid: int) -> None:
        self._open = open_catalog
        # Mode, links, uid, gid.
        self.file_mode_and_owner = (S_IFREG | 0o444, 1, uid, gid)
        self.directory_mode_and_owner = (S_IFDIR | 0o555, 1, uid, gid)
        self._catalogs: dict[Path, Names] = {}
        self.switch(files)

    def switch(self, files: Sequence[Path]) -> None:
        """Answer from `files`, newest first. The newest must open (CatalogError); an older one may be gone."""
        kept: dict[Path, Names] = {}
        for file in files[:GENERATIONS]:
            try:
                kept[file] = self._catalogs[file] if file in self._catalogs else self._open(file)
            except (CacheFSError, OSError):
                # Only the names of files that were open before the last refresh are lost with an old catalog:
                # they answer ESTALE. Without the newest there is nothing to serve.
                if not kept:
                    raise
        for file, catalog in self._catalogs.items():
            if file not in kept:
                catalog.close()
        self._catalogs = kept
        self._order = tuple(kept.values())
        self._newest = self._order[0]
        self.time_ns = int(self._newest.summary.created * 1e9)
        self._folders: dict[int, str] = {}

    @property
    def summary(self) -> Summary:
        return self._newest.summary

    def lookup(self, parent: int, name: bytes) -> Row | None:
        """What `name` is in the directory `parent`; None = there is no such name. Raises StaleObject."""
        row = self._newest.lookup(parent, name)
        if row is not None:
            return row
        catalog, _ = self._find(parent)
        return None if catalog is self._newest else catalog.lookup(parent, name)

    def get(self, node: int) -> Row:
        """Raises StaleObject when no catalog knows the node any more."""
        return self._find(node)[1]

    def object(self, node: int) -> tuple[str, Row]:
        """(object path, row) of a node. Raises StaleObject."""
        row = self._newest.get(node)
        if row is None:
            catalog, row = self._find(node)
            return catalog.object_path(node), row
        # Saves two queries of three for each file that is read: a dataset has few directories.
        folder = self._folders.get(row.parent)
        if folder is not None:
            return folder + row.name.decode(), row
        catalog = self._newest
        path = catalog.object_path(node)
        if node != ROOT:
            if len(self._folders) >= FOLDERS:
                self._folders.clear()
            self._folders[row.parent] = path[: len(path) - len(row.name.decode())]
        return path, row

    def listed(self, directory: int, after: int, limit: int) -> list[Listed]:
        """At most `limit` entries with ids above `after`, in id order. Raises StaleObject."""
        return self._find(directory)[0].listed(directory, after, limit)

    def attributes(self, row: Row) -> Attributes:
        """Files are 0444, directories 0555, all of the mount's owner.

        What has no time at the origin (directories rarely do) has that of the catalog. Directories have one link,
        by which local file systems say that the number of sub-directories cannot be told from it (btrfs does the
        same): fts(3) would skip the sub-directories of a directory with two.
        """
        mtime_ns = row.mtime_ns or self.time_ns
        if row.directory:
            return Attributes(row.id, *self.directory_mode_and_owner, BLOCK, mtime_ns)
        return Attributes(row.id, *self.file_mode_and_owner, row.size, mtime_ns)

    def close(self) -> None:
        for catalog in self._catalogs.values():
            catalog.close()
        self._catalogs = {}

    def _find(self, node: int) -> tuple[Names, Row]:
        for catalog in self._order:
            row = catalog.get(node)
            if row is not None:
                return catalog, row
        raise StaleObject(f"node {node} is of a snapshot that this mount no longer has; open the file again")

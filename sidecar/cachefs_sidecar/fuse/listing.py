"""Directories: a page of entries, packed from the catalog's rows straight into the reply.

A cookie says where a page begins and is an entry's inode number, so nothing is kept between pages, any worker can
answer any of them, and a directory of millions costs no more memory than one page.

Per entry this is the most frequent code of the mount: `find` over a million names runs it a million times. Measured
with 185 entries to a page: 1.0 us per entry, of which SQLite takes 0.6; a row object, an attributes object and a
record object for each took 2.6.
"""

from __future__ import annotations

import errno
import struct

from cachefs.errors import CatalogError
from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.abi import BLOCK, ROOT
from cachefs_sidecar.fuse.tree import Tree

# Cookies: 0 is the start, 1 is behind ".", 2 behind "..", and id + 2 behind the entry `id`.
_BEHIND_DOT, _BEHIND_DOTDOT = 1, 2

_NS = 1_000_000_000


class Listing:
    """buffer: where pages are built, behind room for the header of a reply; one page at a time. valid: seconds that
    the kernel may remember what it is told."""

    def __init__(self, tree: Tree, buffer: bytearray | memoryview, valid: int) -> None:
        self._tree = tree
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._entry_rest = wire.entry_rest(valid)
        self._file_rest = wire.attr_rest(*tree.file_mode_and_owner)
        self._directory_rest = wire.attr_rest(*tree.directory_mode_and_owner)

    def page(self, directory: int, cookie: int, room: int, *, plus: bool) -> memoryview | int:
        """As many whole entries behind `cookie` as fit into `room` bytes; empty at the end of the directory.

        -EINVAL where not even one fits: an empty page would say that there are no more. A cookie whose entry is no
        longer there still has a place. plus: with attributes. Raises StaleObject, CatalogError.
        """
        start = at = wire.OUT_HEADER_BYTES
        stop = min(start + room, len(self._buffer))
        more = False
        if cookie < _BEHIND_DOTDOT:
            at, more = self._dots(directory, cookie, at, stop, plus)
        if not more:
            after = max(0, cookie - _BEHIND_DOTDOT)
            at, more = (self._plus if plus else self._plain)(directory, after, at, stop)
        return -errno.EINVAL if at == start and more else self._view[start:at]

    # Each of these packs entries from `at` on, not beyond `stop`: (where they end, whether one did not fit).

    def _dots(self, directory: int, cookie: int, at: int, stop: int, plus: bool) -> tuple[int, bool]:
        above = self._tree.get(directory).parent or ROOT
        for name, node, behind in ((b".", directory, _BEHIND_DOT), (b"..", above, _BEHIND_DOTDOT)):
            if cookie < behind:
                record = wire.dirent_plus_dot(node, behind, name) if plus else wire.dirent(node, behind, name, True)
                if at + len(record) > stop:
                    return at, True
                self._buffer[at : at + len(record)] = record
                at += len(record)
        return at, False

    def _plain(self, directory: int, after: int, at: int, stop: int) -> tuple[int, bool]:
        for id, name, is_directory, _, _ in self._tree.listed(
            directory, after, (stop - at) // wire.SMALLEST_DIRENT + 1
        ):
            record = wire.dirent(id, id + _BEHIND_DOTDOT, name, is_directory == 1)
            if at + len(record) > stop:
                return at, True
            self._buffer[at : at + len(record)] = record
            at += len(record)
        return at, False

    def _plus(self, directory: int, after: int, at: int, stop: int) -> tuple[int, bool]:
        buffer, records, bytes_before_name = self._buffer, wire.PLUS_RECORDS, wire.PLUS_BYTES
        entry_rest, file_rest, directory_rest = self._entry_rest, self._file_rest, self._directory_rest
        time_of_catalog = self._tree.time_ns
        rows = self._tree.listed(directory, after, (stop - at) // wire.SMALLEST_DIRENT_PLUS + 1)
        try:
            for id, name, is_directory, size, mtime_ns in rows:
                length = len(name)
                padded = length + 7 & -8
                end = at + bytes_before_name + padded
                if end > stop:
                    return at, True
                rest, kind = file_rest, 8
                if is_directory:
                    rest, kind, size = directory_rest, 4, BLOCK
                seconds, nanos = divmod(mtime_ns or time_of_catalog, _NS)
                # fmt: off
                records[padded](
                    buffer, at, id, entry_rest, id, size, size + 4095 >> 12 << 3,
                    seconds, seconds, seconds, nanos, nanos, nanos, rest,
                    id, id + _BEHIND_DOTDOT, length, kind, name,
                )
                # fmt: on
                at = end
        except (KeyError, TypeError, struct.error) as error:
            raise CatalogError(f"directory {directory}: its catalog is damaged ({error!r})") from error
        return at, False

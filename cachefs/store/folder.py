"""One cache directory and what can be done in it: write, publish, link, unlink, seal.

Raises OSError as the disk does; which directory to use, which lock to hold and what a failure means is decided in
writer.py. Whatever is called "under the key's lock" there may assume that nobody else publishes, links, unlinks
or drops that key meanwhile.

A blob comes to be in this order, and the order is what makes it whole: bytes into tmp/, key and seal set on that
file, rename to blobs/, then a link per ref. Killed before the rename, there is a file in tmp/, removed at the next
start. Killed before a link, there is a blob without refs: nobody is served it, and `sweep` drops it. A sealed file
can be reached by readers only after its last byte was written, since it is the rename that gives it a name there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator

from cachefs.config import Floor
from cachefs.digest import BLOCK_SIZE, KEY_BYTES, digest, key_of_blocks
from cachefs.store.layout import Places, is_blob_name, is_name

Data = bytes | bytearray | memoryview

# Blobs are read-only files in directories of mode 0700. The directories keep other users out; the missing write
# permission stops programs of the same user that were handed a path from changing what others will read. Readable
# for all, so that who widens the directories for a group of readers need not change each blob.
BLOB_MODE = 0o444

# What is not a blob yet is written to, after a restart too, and is nobody else's to see.
WORKING_MODE = 0o600

KEY_XATTR = "user.cachefs.key"

# du(1), stat(2): st_blocks counts units of 512 bytes, whatever the file system's block size.
BLOCKS_UNIT = 512

# What says that a file system keeps no extended attributes, and what says that this one did not fit.
_NO_XATTRS = (errno.ENOTSUP, errno.EPERM)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.E2BIG)


def allocated(info: os.stat_result) -> int:
    """Bytes that a file takes on its disk."""
    return info.st_blocks * BLOCKS_UNIT


def allocated_entry(entry: os.DirEntry[str]) -> int:
    """The same of a file met in a scan, which may be gone by now."""
    try:
        return entry.stat(follow_symlinks=False).st_blocks * BLOCKS_UNIT
    except FileNotFoundError:
        return 0


def write_all(fd: int, data: Data, offset: int = 0) -> None:
    """All of `data` at `offset`; one write() stops at 2 GiB, at a signal, or short of a full disk."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def digests_of(fd: int, size: int) -> list[bytes]:
    """Block digests of an open file of `size` bytes; shorter than they should be when the file is cut."""
    found = []
    for start in range(0, size, BLOCK_SIZE):
        block = os.pread(fd, min(BLOCK_SIZE, size - start), start)
        found.append(digest(block))
    return found


def key_of(digests: list[bytes], size: int) -> bytes:
    """Content key of an object of `size` bytes with these block digests."""
    if size > BLOCK_SIZE:
        return key_of_blocks(digests)
    return digests[0] if digests else digest(b"")


class Folder:
    """One directory of a cache. id: from its marker file. seal: see layout.py."""

    def __init__(self, places: Places, id: str, seal: int) -> None:
        self.places = places
        self.id = id
        self.seal = seal
        self._tmp_names = itertools.count()  # next() of it is one step for all threads
        self._xattrs = True

    def __repr__(self) -> str:
        return f"Folder({str(self.places.root)!r})"

    def is_there(self) -> bool:
        """Whether the marker is: a disk unmounted, or a directory removed, under a running fetcher has none."""
        return os.path.exists(self.places.marker)

    def free(self, floor: Floor) -> int:
        """Bytes that may still be written, above the free-space floor."""
        info = os.statvfs(self.places.root)
        return info.f_bavail * info.f_frsize - floor.of(info.f_blocks * info.f_frsize)

    # --- into tmp/ ---

    def tmp_name(self) -> str:
        return f"{self.places.tmp}{next(self._tmp_names)}"

    def write_tmp(self, name: str, data: Data) -> str:
        """A sealed file of `data` in tmp/; its path."""
        path = self.tmp_name()
        fd = self.create(path)
        try:
            write_all(fd, data)
            self.finish(fd, name)
        except BaseException:
            discard(path)
            raise
        finally:
            os.close(fd)
        return path

    def finish(self, fd: int, name: str) -> None:
        """What a file needs to become the blob `name`. Nothing may be written to it afterwards."""
        if self._xattrs:
            try:
                os.setxattr(fd, KEY_XATTR, name.encode())
            except OSError as error:
                if error.errno not in (*_NO_XATTRS, *_NO_ROOM):
                    raise
                self._xattrs = error.errno not in _NO_XATTRS  # key_at() reads the content instead
        os.fchmod(fd, BLOB_MODE)  # not sooner: attributes are set only of a file that may be written, but by root
        self.set_seal(fd)

    def set_seal(self, file: int | str) -> None:
        # atime is now: one before mtime would make every first read of a blob write its inode (relatime).
        os.utime(file, ns=(time.time_ns(), self.seal))

    def create(self, path: str) -> int:
        """A descriptor of a new file in tmp/ or parts/."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, WORKING_MODE)
        except FileNotFoundError:
            if not self.is_there():
                raise
            _make_folder(os.path.dirname(path))  # somebody tidied up
            return os.open(path, flags, WORKING_MODE)

    # --- blobs: under the key's lock ---

    def publish(self, source: str, name: str, digests: list[bytes]) -> None:
        """Give the sealed file `source` its name in blobs/. digests: of its blocks, when it has several."""
        blob = self.places.blob(name)
        if len(digests) > 1:
            self.write_blocks(name, digests)
        try:
            os.rename(source, blob)
        except FileNotFoundError:
            _make_folder(os.path.dirname(blob))
            os.rename(source, blob)

    def write_blocks(self, name: str, digests: list[bytes]) -> None:
        path = self.places.blocks(name)
        source = self.write_tmp(name, b"".join(digests))
        try:
            os.rename(source, path)
        except FileNotFoundError:
            _make_folder(os.path.dirname(path))
            os.rename(source, path)

    def read_blocks(self, name: str) -> list[bytes]:
        """The digests beside a large blob; [] when they are missing. They prove themselves: see key_of_blocks."""
        try:
            with open(self.places.blocks(name), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return []
        return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]

    def stat_blob(self, name: str) -> os.stat_result | None:
        return _stat(self.places.blob(name))

    def remove_blob(self, name: str, info: os.stat_result) -> int:
        """Unlink a blob; bytes freed, which is nothing as long as refs hold its content."""
        blob = self.places.blob(name)
        if info.st_nlink > 1:
            # Refs are names of the same inode: without its seal, none of them is served any more.
            os.utime(blob)
        os.unlink(blob)
        freed = allocated(info) if info.st_nlink == 1 else 0
        if info.st_size > BLOCK_SIZE:
            freed += remove(self.places.blocks(name))
        return freed

    def remove_unheld(self, name: str) -> int:
        """Drop the blob when no ref holds it any more; bytes freed."""
        info = self.stat_blob(name)
        return self.remove_blob(name, info) if info is not None and info.st_nlink == 1 else 0

    # --- refs: under the key's lock ---

    def attach(self, name: str, dataset: str, ref: str) -> str | None:
        """Make a ref name the blob. Returns the key (hex) of the blob that it named before, if another.

        Raises FileNotFoundError when the blob is gone.
        """
        blob, path = self.places.blob(name), self.places.ref(dataset, ref)
        try:
            self._link(blob, name, path)
        except FileExistsError:
            old = _stat(path)
            info = os.stat(blob)
            if old is not None and old.st_ino == info.st_ino:
                return None
            before = self.key_at(path, old) if old is not None else None
            # Atomic: a reader finds the old blob or the new one. Another thread that replaces the same ref
            # meanwhile loses or wins as a whole; the loser's blob may be left unheld, for `sweep`.
            new = self.tmp_name()
            self._link(blob, name, new)
            try:
                os.rename(new, path)
            except BaseException:
                discard(new)
                raise
            return before if before != name else None
        return None

    def _link(self, blob: str, name: str, path: str) -> None:
        for _ in range(2):  # each obstacle can be met once
            try:
                return os.link(blob, path)
            except FileNotFoundError:
                os.stat(blob)  # gone: say so, before making folders for nothing
                _make_folder(os.path.dirname(os.path.dirname(path)))
                _make_folder(os.path.dirname(path))
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                # 65,000 on ext4: some data sets hold more equal objects (empty ones) than that. The full inode
                # keeps its refs; a copy takes its place in blobs/ for those to come.
                self._renew(blob, name)
        return os.link(blob, path)

    def _renew(self, blob: str, name: str) -> None:
        with open(blob, "rb") as file:
            info = os.fstat(file.fileno())
            copy = self.tmp_name()
            fd = self.create(copy)
            try:
                offset = 0
                while data := file.read(BLOCK_SIZE):
                    write_all(fd, data, offset)
                    offset += len(data)
                self.finish(fd, name)
                if info.st_mtime_ns != self.seal:
                    os.utime(fd)  # not checked since the boot, so its copy is not either
                os.rename(copy, blob)
            except BaseException:
                discard(copy)
                raise
            finally:
                os.close(fd)

    def recorded_name(self, path: str) -> str | None:
        """The key (hex) that the file at `path` says it has, where extended attributes are kept."""
        try:
            name = os.getxattr(path, KEY_XATTR).decode("ascii", "replace")
        except OSError:
            return None
        return name if is_blob_name(name) else None

    def key_at(self, path: str, info: os.stat_result) -> str | None:
        """The key (hex) of the blob that the ref at `path` (whose stat is `info`) is a link to, if it still is."""
        recorded = self.recorded_name(path)
        for name in [recorded] if recorded else self._names_of(_content_name(path)):
            blob = self.stat_blob(name)
            if blob is not None and blob.st_ino == info.st_ino:
                return name
        return None

    def _names_of(self, content: str) -> list[str]:
        """Blobs, of whichever tenant, that have this content key."""
        there = _scan(self.places.blobs + content[:2]) if content else ()
        return [entry.name for entry in there if entry.name.startswith(content) and is_blob_name(entry.name)]

    # --- what there is ---

    def blob_entries(self) -> Iterator[os.DirEntry[str]]:
        """Blobs and the .blocks files beside them, streaming."""
        for folder in _scan(self.places.blobs):
            if len(folder.name) == 2:
                yield from _scan(folder.path)

    def ref_entries(self, dataset: str) -> Iterator[os.DirEntry[str]]:
        for folder in _scan(self.places.refs + dataset):
            for entry in _scan(folder.path):
                if is_name(entry.name):
                    yield entry

    def ref_folder(self, dataset: str, number: int) -> Iterator[os.DirEntry[str]]:
        """Refs of a dataset whose names begin with this byte."""
        for entry in _scan(f"{self.places.refs}{dataset}/{number:02x}"):
            if is_name(entry.name):
                yield entry

    def datasets(self) -> Iterator[str]:
        """Datasets that have a ref here."""
        for entry in _scan(self.places.refs):
            if is_name(entry.name) and next(self.ref_entries(entry.name), None) is not None:
                yield entry.name

    def stored_entries(self) -> Iterator[os.DirEntry[str]]:
        """Everything that takes room: blobs, .blocks files, parts and their maps."""
        yield from self.blob_entries()
        yield from self.part_entries()

    def part_entries(self) -> Iterator[os.DirEntry[str]]:
        yield from _scan(self.places.parts)


def _scan(path: str) -> Iterator[os.DirEntry[str]]:
    """os.scandir that is closed, and for which a directory that is gone, or a stray file, is empty."""
    try:
        entries = os.scandir(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        yield from entries


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def remove(path: str) -> int:
    """Unlink a file. Bytes freed; 0 when there is no such file."""
    try:
        info = os.stat(path)
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return allocated(info) if info.st_nlink == 1 else 0


def discard(path: str) -> None:
    """Clean up after a failure. That one is told, not that this failed too: the next start clears tmp/."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _make_folder(path: str) -> None:
    """One level only: should blobs/ or refs/ itself be gone, the directory is, and must not be made anew."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def _content_name(path: str) -> str:
    """The key of a file by its content, for file systems that keep no extended attributes; "" if unreadable."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return key_of(digests_of(file.fileno(), size), size).hex()
    except OSError:
        return ""

"""OPEN and RELEASE where the kernel reads blobs by itself: passthrough.

The reply to OPEN names a backing file, registered with the kernel before, and the kernel reads and maps that one: no
second copy of the pages, no request, and no way for us to see the bytes. So what is to be known of a blob is known at
OPEN: that it is whole and sealed (store/layout.py).

A file is opened one way at a time. Whoever opens one that is not whole yet gets the way of open-free, the kernel's
page cache filled by our READs, and so does everybody else until all have closed it; the next one after that gets
passthrough. Direct I/O for the incomplete ones would let others have passthrough sooner, but nobody could map the file
safely: a shared mapping needs the page cache and makes passthrough fail with EIO for everybody else, and once somebody
else has passthrough, a mapping fails with ENODEV (fs/fuse/iomode.c, and fuse_file_mmap in file.c).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cachefs.digest import version_ref
from cachefs.errors import DamagedBlob, IsADirectory
from cachefs.store.layout import seal_ns
from cachefs_sidecar.fuse import files, wire
from cachefs_sidecar.fuse.abi import UNIQUE_RESEND, Open
from cachefs_sidecar.fuse.opens import Backing, Opens
from cachefs_sidecar.fuse.reading import Store
from cachefs_sidecar.fuse.tree import Tree

log = logging.getLogger("cachefs.mount")

# _IOW(229, 1, struct fuse_backing_map) and _IOW(229, 2, uint32_t).
_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502
_BACKING_MAP = struct.Struct("=iIQ")  # fd, flags, padding

# NOFLUSH: close(2) need not look for what was written.
_CACHED = Open.KEEP_CACHE | Open.NOFLUSH
_PASSED = Open.PASSTHROUGH | Open.NOFLUSH


class Passthrough:
    """Not for several threads at once: the session's lock is around every call. directories: those of the cache."""

    def __init__(
        self, device: int, opens: Opens, tree: Tree, store: Store, dataset: str, directories: Sequence[Path]
    ) -> None:
        self._device = device
        self._opens = opens
        self._tree = tree
        self._store = store
        self._dataset = dataset
        self._directories = tuple(directories)
        self._seal = seal_ns()
        self._last = (0, 0)  # handle and number of the last answer
        self.passed = 0  # how often a file was opened so
        with opens.change():
            self._close(opens.forget_unused())

    @property
    def refused(self) -> str:
        """Why the kernel would not have a file of ours; "" = it has had all."""
        return self._opens.refused

    @property
    def open_files(self) -> int:
        """How often files of this mount are open, by whichever worker."""
        return self._opens.count()

    def open(self, unique: int, node: int) -> bytes | int:
        """The reply to an OPEN. Raises IsADirectory, StaleObject, DamagedBlob, CatalogError, sqlite3.Error."""
        path, row = self._tree.object(node)
        if row.directory:
            raise IsADirectory(f"{path or '/'}: is a directory", path=path)
        fh, again = unique & ~UNIQUE_RESEND, bool(unique & UNIQUE_RESEND)
        with self._blob(path, row.version, row.size) as blob, self._opens.change():
            refused = self._opens.refused
            if refused and not self._opens.count():
                # From now on the kernel asks nobody, as in open-free mode. Not sooner: it would tell nobody of the
                # RELEASEs either, nor let the files be mapped that are open through a backing file.
                return -errno.ENOSYS
            others = self._opens.is_open(node)
            tries = self._opens.add(fh, node, again=again)
            if tries == 0:
                return -errno.EINTR  # answered and closed long ago: nobody waits for this
            if others:
                backing = self._opens.backing(node)
                if backing is not None:
                    self._require_good(path, backing, blob)
            else:
                backing = None if blob is None or refused else self._register(node, blob)
        self._last = (fh, tries)
        if backing is None:
            return wire.open_out(_CACHED, fh)
        self.passed += 1
        return wire.open_out(_PASSED, fh, backing.id)

    def not_taken(self, unique: int) -> None:
        """The kernel did not take the reply to an OPEN, the last one."""
        fh, tries = self._last
        if fh == unique & ~UNIQUE_RESEND:
            with self._opens.change():
                ids = self._opens.withdraw(fh, tries)
            self._close(ids)

    def release(self, fh: int) -> None:
        with self._opens.change():
            ids = self._opens.release(fh)
        self._close(ids)

    @contextlib.contextmanager
    def _blob(self, path: str, version: str, size: int) -> Iterator[tuple[int, bytes] | None]:
        """(descriptor, identity) of the whole, sealed object."""
        found = self._store.open(self._dataset, version_ref(path, version))
        if found is None:
            yield None
            return
        fd, info = found
        try:
            yield (fd, files.identity(fd, info)) if info.st_size == size else None
        finally:
            os.close(fd)

    def _register(self, node: int, blob: tuple[int, bytes]) -> Backing | None:
        try:
            id = register(self._device, blob[0])
        except OSError as error:
            if self._opens.refuse(why := why_refused(error)):
                log.warning("passthrough is off from now on: %s", why)
            return None
        backing = Backing(id, blob[1])
        try:
            self._close(self._opens.register(node, backing))
            self._close(self._opens.forget_unused())
        except BaseException:
            unregister(self._device, id)
            raise
        return backing

    def _require_good(self, path: str, backing: Backing, blob: tuple[int, bytes] | None) -> None:
        """Raises DamagedBlob when others have the file open through a blob that is not what it was."""
        if blob is not None and blob[1] == backing.file:
            return
        info = files.look_again(backing.file, self._directories)
        if info is None or info.st_mtime_ns != self._seal:
            raise DamagedBlob(
                f"{path}: is open through a blob that turned out damaged; the file can be opened again when all who "
                "have it open have closed it",
                path=path,
            )

    def _close(self, ids: Iterable[int]) -> None:
        for id in ids:
            unregister(self._device, id)


def register(device: int, fd: int) -> int:
    """The kernel's id of an open file. Raises OSError: see `why_refused`."""
    # A bytearray, because only then is the result that of the call and not the argument.
    return int(fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0))))


def unregister(device: int, id: int) -> None:
    """Whoever has a file open by this id keeps it."""
    try:
        fcntl.ioctl(device, _BACKING_CLOSE, struct.pack("=I", id))
    except OSError as error:
        # ENOENT: another worker did it. The others: the mount is gone, and all ids with it.
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.EPERM):
            raise


def why_refused(error: OSError) -> str:
    match error.errno:
        case errno.EPERM:
            return "the kernel lets only CAP_SYS_ADMIN do this"
        case errno.ELOOP:
            return "the cache directory's file system is stacked on another too deeply"
        case errno.EOPNOTSUPP | errno.ENOTTY:
            return "this kernel was built without it"
    return f"the kernel refuses ({error.strerror})"

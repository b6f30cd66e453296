"""file://: a mounted file system (NFS, CephFS, Lustre, a disk), read with the system's own calls.

Not through obstore: its local store fails a whole listing for one name with a newline in it, hides names with
other bytes, and reads 110 KB files at a quarter of the speed of plain reads in threads (measured with 0.12). The
version is mtime and size, and a read compares them on the open descriptor before and after, so that a file
replaced or rewritten meanwhile never gives mixed bytes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from cachefs.errors import ConfigError, IsADirectory, OriginAccessDenied, OriginError, UnsupportedOrigin
from cachefs.messages import Entry
from cachefs.origin.contract import require_version, stale
from cachefs.origin.failures import Place, os_error
from cachefs.origin.objects import PAGE
from cachefs.origin.patience import Patience
from cachefs.origin.spec import OriginSpec

T = TypeVar("T")

# Options of fsspec's local file system that change nothing for reads.
_IGNORED = frozenset({"auto_mkdir", "skip_instance_cache", "use_listings_cache"})

# Reads at once: network file systems have round trips to hide; a disk is kept busy by fewer.
_THREADS = 32

# A read that hits one of these may succeed at once: the server of a network file system was replaced or is slow.
_PASSING = frozenset({errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR})
_ATTEMPTS = 3

# A link that leads nowhere or to itself, or a file removed since its directory was read.
_NO_ENTRY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class LocalOrigin:
    """Symbolic links are followed, as every reader of the path would; a link that leads nowhere, back above itself,
    or to a fifo, socket or device is no entry."""

    def __init__(self, spec: OriginSpec) -> None:
        left = {name: value for name, value in spec.options.items() if name not in _IGNORED}
        Patience.take(left)  # accepted for symmetry: the kernel decides how long its file systems wait
        if left:
            raise ConfigError(f"file: unknown option {sorted(left)[0]!r}")
        self.identity = spec.identity
        self._place = Place("file", "this machine")
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="cachefs-local")

    async def head(self, path: str) -> Entry:
        return await self._run(path, lambda: _head(path))

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        return await self._run(path, lambda: _get(path, version, limit))

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        if stop <= start:
            return b""
        return await self._run(path, lambda: _get_range(path, start, stop, version))

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        entries = await self._run(path, lambda: _scan(path))
        for at in range(0, len(entries), PAGE):
            yield entries[at : at + PAGE]

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        files = _walk(path)
        # One attempt: a generator that failed is at its end, and a second attempt would take that for the listing's.
        while page := await self._run(path, lambda: list(islice(files, PAGE)), attempts=1):
            yield [entry for entry in page if entry.path > after] if after else page

    def in_key_order(self, path: str) -> bool:
        return False

    async def check(self, path: str = "") -> None:
        if path:
            await self.head(path)

    async def aclose(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, path: str, work: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
        loop = asyncio.get_running_loop()
        for attempt in range(1, attempts + 1):
            try:
                return await loop.run_in_executor(self._pool, work)
            except OriginError:
                raise
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                if attempt == attempts or getattr(error, "errno", None) not in _PASSING:
                    # A directory deep in a listing, not its root, may be what failed.
                    raise _translate(error, self._place, getattr(error, "filename", None) or path) from error
        raise AssertionError("unreachable")


def _translate(error: Exception, place: Place, path: str) -> Exception:
    if isinstance(error, IsADirectoryError):
        return IsADirectory(f"{path}: is a directory", path=path)
    if isinstance(error, OSError) and error.errno == errno.ESTALE:
        return stale(path)
    if isinstance(error, PermissionError):
        return OriginAccessDenied(f"{path}: this user (uid {os.geteuid()}) may not read it", path=path)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return UnsupportedOrigin(f"{path!r}: {error.strerror}", path=path)
    failure = os_error(error, place, path)
    if isinstance(error, OSError) and type(failure) is OriginError:
        return OriginError(f"{path}: {error.strerror} at the origin", path=path)
    return failure


def _entry(path: str, info: os.stat_result) -> Entry:
    if stat.S_ISDIR(info.st_mode):
        return Entry(path, 0, info.st_mtime_ns, "", directory=True)
    return Entry(path, info.st_size, info.st_mtime_ns, f"{info.st_mtime_ns}-{info.st_size}")


def _served(info: os.stat_result) -> bool:
    return stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)


def _head(path: str) -> Entry:
    info = os.stat(path)
    if not _served(info):
        raise UnsupportedOrigin(f"{path}: neither a file nor a directory", path=path)
    return _entry(path, info)


def _open(path: str) -> tuple[int, Entry]:
    # O_NONBLOCK: a fifo put in a file's place would otherwise hold this thread for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode):
        return fd, _entry(path, info)
    os.close(fd)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectory(f"{path}: is a directory", path=path)
    raise UnsupportedOrigin(f"{path}: neither a file nor a directory", path=path)


def _get(path: str, version: str, limit: int) -> tuple[Entry, bytes | None]:
    fd, entry = _open(path)
    try:
        require_version(entry, version)
        if entry.size > limit:
            return entry, None
        return entry, _read(fd, entry, 0, entry.size)
    finally:
        os.close(fd)


def _get_range(path: str, start: int, stop: int, version: str) -> bytes:
    fd, entry = _open(path)
    try:
        require_version(entry, version)
        return _read(fd, entry, start, stop)
    finally:
        os.close(fd)


def _read(fd: int, entry: Entry, start: int, stop: int) -> bytes:
    parts: list[bytes] = []
    at = start
    while at < stop and (part := os.pread(fd, stop - at, at)):
        parts.append(part)
        at += len(part)
    # Written to while we read: the bytes may be of two versions.
    if at != stop or _entry(entry.path, os.fstat(fd)) != entry:
        raise stale(entry.path)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _scan(path: str) -> list[Entry]:
    """One level. A directory sorts as if its name ended in "/", so that walking gives object paths in key order."""
    prefix = path.rstrip("/") + "/"
    found: list[tuple[str, Entry]] = []
    for name in os.listdir(path):
        try:
            info = os.stat(prefix + name)
        except OSError as error:
            if error.errno in _NO_ENTRY:
                continue
            raise
        if _served(info):
            entry = _entry(prefix + name, info)
            found.append((name + "/" if entry.directory else name, entry))
    return [entry for _, entry in sorted(found)]


def _walk(path: str) -> Iterator[Entry]:
    """Every file below, depth first. A directory that a link leads back into is not entered twice on one way down."""
    info = os.stat(path)
    levels = [(iter(_scan(path)), (info.st_dev, info.st_ino))]
    while levels:
        entry = next(levels[-1][0], None)
        if entry is None:
            levels.pop()
        elif not entry.directory:
            yield entry
        else:
            try:
                info = os.stat(entry.path)
                here = (info.st_dev, info.st_ino)
                if all(here != above for _, above in levels):
                    levels.append((iter(_scan(entry.path)), here))
            except OSError as error:
                # Removed since its parent was read: the listing goes on, its root is not what vanished.
                if error.errno not in _NO_ENTRY:
                    raise

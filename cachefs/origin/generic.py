"""Every other protocol: through its fsspec file system (memory, sftp, hdfs, zip and tar in something, ...).

Such file systems state no version that can be asked for, so size and version (or mtime) are compared before and
after each read. Calls run in threads; one at a time where the file system is not known to bear more, because many
share one connection or one open archive (concurrent reads through fsspec's tar would mix bytes).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cachefs.errors import CacheFSError, IsADirectory, OriginTimeout, OriginUnreachable
from cachefs.messages import Entry
from cachefs.origin.contract import require_version, stale
from cachefs.origin.failures import Place, os_error
from cachefs.origin.generic_info import entry_of
from cachefs.origin.objects import PAGE
from cachefs.origin.patience import Patience, Transient
from cachefs.origin.spec import ALIASES, OriginSpec, filesystem_class

T = TypeVar("T")

# Calls at once of a file system that bears it: those made for asyncio, and these.
_PARALLEL_CALLS = 16
_BEARS_THREADS = frozenset({"memory", "hdfs", "arrow_hdfs", "webhdfs"})


class FsspecOrigin:
    def __init__(self, spec: OriginSpec) -> None:
        options = dict(spec.options)
        self.identity = spec.identity
        self._place = Place(spec.protocol, _where(spec))
        self._patience = Patience.take(options)
        self._kind = filesystem_class(spec.protocol)
        self._options = _with_environment(options, spec.environ)
        parallel = _PARALLEL_CALLS if self._kind.async_impl or spec.protocol in _BEARS_THREADS else 1
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix=f"cachefs-{spec.protocol}")
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._container: tuple[Any, str] | None = None
        self._container_seen: Entry | None = None

    async def head(self, path: str) -> Entry:
        return await self._run(path, lambda fs: self._info(fs, path))

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        def work(fs: Any) -> tuple[Entry, bytes | None]:
            before = self._file(fs, path, version)
            if before.size > limit:
                return before, None
            return before, self._read(fs, before, 0, before.size)

        return await self._run(path, work)

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        if stop <= start:
            return b""
        return await self._run(path, lambda fs: self._read(fs, self._file(fs, path, version), start, stop))

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        def work(fs: Any) -> list[Entry]:
            if not self._info(fs, path).directory:
                raise NotADirectoryError(path)
            found = [entry_of(info) for info in fs.ls(path, detail=True)]
            return [entry for entry in found if entry.path.strip("/") != path.strip("/")]

        entries = await self._run(path, work)
        for at in range(0, len(entries), PAGE):
            yield entries[at : at + PAGE]

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        def work(fs: Any) -> list[Entry]:
            if not self._info(fs, path).directory:
                raise NotADirectoryError(path)
            found = fs.find(path, detail=True)
            return [entry_of(found[name]) for name in sorted(found) if name > after]

        entries = await self._run(path, work)
        for at in range(0, len(entries), PAGE):
            yield entries[at : at + PAGE]

    def in_key_order(self, path: str) -> bool:
        return False

    async def check(self, path: str = "") -> None:
        await self._run(path, lambda fs: self._info(fs, path), self._patience.brief())

    async def aclose(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._filesystem = None

    # --- in a thread ---

    async def _run(self, path: str, work: Callable[[Any], T], patience: Patience | None = None) -> T:
        def guarded() -> T:
            try:
                fs = self._open()
                before = self._container_entry()
                result = work(fs)
                if self._container_entry() != before:  # an archive replaced while we read a member of it
                    raise stale(path)
                return result
            except CacheFSError:
                raise
            except Exception as error:
                failure = os_error(error, self._place, path)
                if isinstance(failure, OriginUnreachable | OriginTimeout):
                    self._filesystem = None  # its connection may be what broke
                    raise Transient(failure) from error
                raise failure from error

        loop = asyncio.get_running_loop()
        return await (patience or self._patience).persevere(lambda: loop.run_in_executor(self._pool, guarded))

    def _open(self) -> Any:
        """The file system; made anew after a lost connection or when the archive it reads was replaced."""
        with self._lock:
            if self._filesystem is None or self._container_entry() != self._container_seen:
                # Not shared with the rest of the process, whose listings it would serve from memory.
                self._filesystem = self._kind(**self._options, skip_instance_cache=True)
                if self._container is None:
                    self._container = _container(self._options)
                self._container_seen = self._container_entry()
                listings = getattr(self._filesystem, "dircache", None)
                if listings is not None and hasattr(listings, "use_listings_cache"):
                    listings.use_listings_cache = False
            return self._filesystem

    def _container_entry(self) -> Entry | None:
        if self._container is None:
            return None
        filesystem, file = self._container
        return entry_of(filesystem.info(file))

    def _info(self, fs: Any, path: str) -> Entry:
        entry = entry_of(fs.info(path))
        return Entry(path, entry.size, entry.mtime_ns, entry.version, entry.directory)

    def _file(self, fs: Any, path: str, version: str) -> Entry:
        entry = self._info(fs, path)
        if entry.directory:
            raise IsADirectory(f"{self._place.url(path)}: is a directory", path=path)
        require_version(entry, version)
        return entry

    def _read(self, fs: Any, before: Entry, start: int, stop: int) -> bytes:
        data = bytes(fs.cat_file(before.path, start=start, end=stop)) if stop > start else b""
        if len(data) != stop - start or self._info(fs, before.path) != before:
            raise stale(before.path)
        return data


def _where(spec: OriginSpec) -> str:
    host = spec.options.get("host")
    return f"{spec.protocol}://{host}" if host else f"{spec.protocol}://"


def _container(options: Mapping[str, Any]) -> tuple[Any, str] | None:
    """(file system, path) of the archive that a chained file system reads."""
    file = options.get("fo")
    if not isinstance(file, str):
        return None
    import fsspec

    target = options.get("target_protocol")
    inner = dict(options.get("target_options") or {})
    # The archive is asked for again and again: listings kept in memory would hide that it was replaced.
    inner |= {"use_listings_cache": False, "skip_instance_cache": True}
    if target:
        return fsspec.filesystem(target, **inner), file
    filesystem, path = fsspec.url_to_fs(file, **inner)
    return filesystem, path


def _with_environment(options: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The S3 credentials of the user put into words, wherever the chain ends in S3: this process's environment is
    somebody else's."""
    nested = options.get("target_options")
    target = options.get("target_protocol")
    if isinstance(nested, Mapping):
        options = options | {"target_options": _with_environment(dict(nested), environ)}
    if not isinstance(target, str) or ALIASES.get(target, target) != "s3":
        return options
    from cachefs.origin.s3_settings import S3Settings

    inner = dict(options.get("target_options") or {})
    settings = S3Settings.make(inner, environ)
    Patience.take(inner)
    if settings.keys is not None and not inner.get("profile"):
        inner |= {"key": settings.keys.key, "secret": settings.keys.secret, "token": settings.keys.token or None}
    if settings.endpoint:
        inner["endpoint_url"] = settings.endpoint
    if settings.region:
        inner["client_kwargs"] = {"region_name": settings.region, **(inner.get("client_kwargs") or {})}
    return options | {"target_options": inner}

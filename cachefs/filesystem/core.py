"""`CacheFileSystem`: what users of fsspec hold. Its reading is in sync_names.py, sync_bytes.py and aio.py.

Sync methods are written out rather than mirrored from the coroutines: fsspec's mirror hands every call to a loop in
another thread (131 us measured, a hit takes 20), and that loop does not survive a fork.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.utils import stringify_path

from cachefs.config import CacheConfig
from cachefs.digest import dataset_id
from cachefs.errors import ConfigError
from cachefs.filesystem import own_loop
from cachefs.filesystem.aio import AsyncSide, Lines
from cachefs.filesystem.names import Names
from cachefs.filesystem.options import read_target
from cachefs.filesystem.paths import parent_of, unstrip_for, without_cachefs
from cachefs.filesystem.readonly import ReadOnly
from cachefs.filesystem.sync_bytes import SyncBytes
from cachefs.filesystem.sync_names import SyncNames
from cachefs.filesystem.travel import handle_of, revive, spawning, travelling_options
from cachefs.filesystem.views import Views

if TYPE_CHECKING:
    from cachefs.client.session import Session

T = TypeVar("T")

# Misses of one bulk call in flight at once: more than the fetcher has lanes to the origin, so that it never waits.
BATCH = 128

# Object stores have no directories, so a flat listing of them names all there are.
_FLAT = frozenset({"s3", "gs", "az"})

_OF_FSSPEC = frozenset({"use_listings_cache", "listings_expiry_time", "max_paths"})


class CacheFileSystem(ReadOnly, SyncNames, SyncBytes, AsyncSide, ChainedFileSystem, AsyncFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Read another file system through a cache on local disks. One instance serves one snapshot.

    target_protocol, target_options: the origin, as for fsspec.filesystem(target_protocol, **target_options); or
    fs: an instance of it. cache_dir: one directory or several (one per SSD), the first is the cache's home.
    cache_size, min_free: as in CacheConfig ("200G", "20%"). fetcher: "auto" starts one on demand, "require" uses a
    running one only, "inprocess" fetches in this process. deadline: seconds a read may wait for the origin.
    tenant: whose the datasets are that are first read by this ($CACHEFS_TENANT).
    redacted: the secrets of target_options were left out (set in pickles).

    Whether an object changed at the origin is not checked again (there is no check_files or expiry_time): a snapshot
    does not change. `invalidate_cache()` takes the snapshot that the cache has by then, `cachefs refresh` makes one.

    Raises ConfigError for options that cannot be used, UnsupportedOrigin for a protocol nobody knows.
    """

    protocol = "cachefs"
    root_marker = ""
    local_file = True  # fsspec.open_local takes the name of what `open` returns
    mirror_sync_methods = False
    _strip_tokenize_options = ("fo",)

    def __init__(
        self,
        *,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fs: Any = None,
        fo: str | None = None,
        cache_dir: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
        cache_size: str | int | None = None,
        min_free: str | int | None = None,
        fetcher: str | None = None,
        deadline: float | None = None,
        tenant: str | None = None,
        redacted: bool = False,
        asynchronous: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
        batch_size: int | None = None,
        **storage_options: Any,
    ) -> None:
        if self._cached:
            return
        _refuse_unknown(storage_options)
        # Not AsyncFileSystem.__init__: it starts a thread with a loop, which most processes never need.
        super(AsyncFileSystem, self).__init__(**storage_options)
        self.asynchronous = asynchronous
        self.batch_size = batch_size or BATCH
        self._loop = loop
        self._pid = os.getpid()
        self._target = read_target(target_protocol, target_options, fs)
        self.target_protocol = self._target.spec.protocol
        if self._target.local:
            if fetcher not in (None, "inprocess"):
                raise ConfigError(
                    f"{self.target_protocol}: lives in this process only: fetcher must be 'inprocess', not {fetcher!r}"
                )
            fetcher = "inprocess"
        self.config = CacheConfig.make(
            cache_dir, size=cache_size, min_free=min_free, fetcher=fetcher, deadline=deadline, tenant=tenant
        )
        self._views = Views(self.config, self._target.spec, redacted=redacted, local=self._target.local)
        self._names = Names(self.dircache, flat=self.target_protocol in _FLAT)
        self._lines = Lines()
        self._handle = handle_of(self)
        self._strip = self._target.strip
        self._strip_protocol = self._stripped  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"CacheFileSystem({self._target.spec.identity!r}, cache_dir={str(self.config.home)!r})"

    # --- names of things ---

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """What fsspec asks the class, which does not know the origin; an instance knows better."""
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        text = without_cachefs(stringify_path(path))
        return text.rstrip("/") or text[:1]

    def _stripped(self, path: Any) -> Any:
        if isinstance(path, list):
            return [self._stripped(each) for each in path]
        return self._strip(without_cachefs(stringify_path(path)))

    def _parent(self, path: Any) -> str:
        return parent_of(self._stripped(path))

    def unstrip_protocol(self, name: str) -> str:
        return unstrip_for(self._target.protocol or self.target_protocol, self._stripped(name))

    @property
    def fsid(self) -> str:
        return f"cachefs-{dataset_id(self._views.identity, '')}"

    def dataset_of(self, path: Any) -> tuple[str, Session]:
        """(object path, session) by which the fetcher knows a path: for who tells it what will be read."""
        stripped = self._stripped(path)
        return stripped, self._views.of(stripped).session

    @property
    def loop(self) -> Any:
        """fsspec's loop, for those who ask for it; no method here uses it."""
        if self.asynchronous:
            return self._loop
        return self._loop if self._loop is not None and self._pid == os.getpid() else get_loop()

    # --- calls that bring many objects ---

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it to its end, on a loop and a connection of its own."""

        async def closing() -> T:
            try:
                return await work
            finally:
                await self._lines.close()

        return own_loop.run(closing())

    # --- into another process ---

    def __reduce__(self) -> tuple[Any, ...]:
        options = travelling_options(self.storage_options, self._target, with_secrets=spawning())
        return revive, (self._handle, type(self), options)

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:
        """As fsspec's, without secrets whatever `include_password` says."""
        from fsspec.json import FilesystemJSONEncoder

        options = travelling_options(self.storage_options, self._target, with_secrets=False)
        cls = type(self)
        return {
            "cls": f"{cls.__module__}:{cls.__name__}",
            "protocol": self.protocol,
            "args": [],
            **FilesystemJSONEncoder().make_serializable(options),
        }


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - _OF_FSSPEC)
    if unknown:
        raise ConfigError(
            f"cachefs has no option {', '.join(unknown)}; options of the storage behind it go into target_options, or "
            "beside a chained URL under its protocol, such as s3={...}"
        )

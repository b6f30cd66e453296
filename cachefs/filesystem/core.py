"""`CacheFileSystem`: what users of fsspec hold. The sync half; the async one is aio.py.

Sync methods are written out rather than mirrored from the coroutines: fsspec's mirror hands every call to a loop in
another thread (131 us measured, a hit takes 30), and that loop does not survive a fork. Calls that bring many
objects run their coroutines on a loop of their own, in the calling thread.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Coroutine, Iterable, Mapping
from hashlib import sha256
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.spec import AbstractFileSystem
from fsspec.utils import stringify_path

from cachefs.config import CacheConfig
from cachefs.digest import dataset_id
from cachefs.errors import ConfigError, IsADirectory, ObjectNotFound
from cachefs.filesystem.aio import AsyncSide, Lines, per_path
from cachefs.filesystem.copying import copy_object
from cachefs.filesystem.files import LocatedFile, Need, first_need, local_file, opened, read_at, span
from cachefs.filesystem.names import Info, Names, info_of
from cachefs.filesystem.options import read_target
from cachefs.filesystem.paths import parent_of, unstrip_for, without_cachefs
from cachefs.filesystem.readonly import ReadOnly, read_only
from cachefs.filesystem.travel import handle_of, revive, spawning, travelling_options
from cachefs.filesystem.views import View, Views
from cachefs.messages import Entry

T = TypeVar("T")

# Misses of one bulk call in flight at once: more than the fetcher has lanes to the origin, so that it never waits.
BATCH = 128

# Object stores have no directories, so a flat listing of them names all there are.
_FLAT = frozenset({"s3", "gs", "az"})

_OF_FSSPEC = frozenset({"use_listings_cache", "listings_expiry_time", "max_paths"})


class CacheFileSystem(ReadOnly, AsyncSide, ChainedFileSystem, AsyncFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Read another file system through a cache on local disks. One instance serves one snapshot.

    target_protocol, target_options: the origin, as for fsspec.filesystem(target_protocol, **target_options); or
    fs: an instance of it. cache_dir: one directory or several (one per SSD), the first is the cache's home.
    cache_size, min_free: as in CacheConfig ("200G", "20%"). fetcher: "auto" starts one on demand, "require" uses a
    running one only, "inprocess" fetches in this process. deadline: seconds a read may wait for the origin.
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
            cache_dir, size=cache_size, min_free=min_free, fetcher=fetcher, deadline=deadline
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

    @property
    def loop(self) -> Any:
        """fsspec's loop, for those who ask for it; no method here uses it."""
        if self.asynchronous:
            return self._loop
        return self._loop if self._loop is not None and self._pid == os.getpid() else get_loop()

    # --- opening ---

    def open(
        self,
        path: Any,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: Any = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A file, read-only. On a hit it is the real local file; an object larger than a block comes as it is read.

        block_size and cache_options are taken and not used: the cache is on disk. Raises ReadOnlyError for modes
        that write.
        """
        if mode != "rb" or compression is not None:
            if set(mode) & set("wax+"):
                raise read_only("open for writing", path)
            return AbstractFileSystem.open(self, path, mode, compression=compression, **kwargs)
        path = self._stripped(path)
        hit = self._views.hit(path)
        if hit is not None:
            return local_file(hit[0], hit[2])
        return self._open_cold(path)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self.open(path, mode)

    def _open_cold(self, path: str) -> io.BufferedReader:
        view = self._views.of(path)
        self._names.require_file(view, path)
        need = _asking(view)
        return opened(path, need(path, 0, 0), need)

    def open_local(self, path: Any) -> Any:
        """The path of a local file with the object's bytes, for programs that take only paths; a list for a list.

        Read it soon: a file that is not open may be evicted. Raises CacheFull when it does not fit the cache.
        """
        paths = path if isinstance(path, list) else [path]
        stripped = [self._stripped(each) for each in paths]
        self._bring(stripped)
        files = [self._local_path(each) for each in stripped]
        return files if isinstance(path, list) else files[0]

    def open_many(self, open_files: Any, **kwargs: Any) -> list[Any]:
        """What `with fsspec.open_files(...)` and `fsspec.open_local` call: brings all of them whole, at once."""
        self._bring([self._stripped(each.path) for each in open_files])
        return [each.__enter__() for each in open_files]

    def _local_path(self, path: str) -> str:
        with self.open(path, "rb") as file:
            if file.name is None:
                from cachefs.errors import CacheFull

                raise CacheFull(f"{path}: no room to keep it as a local file; give the cache more room", path=path)
            return str(file.name)

    def _bring(self, paths: list[str]) -> None:
        """Have the cache store these objects whole. What it has no room for is left to whoever reads it."""
        missing = [path for path in paths if self._views.file(path) is None]
        if missing:
            self._run(self._bring_all(missing))

    async def _bring_all(self, paths: list[str]) -> None:
        from fsspec.asyn import _run_coros_in_chunks

        async def bring(path: str) -> None:
            view = self._views.of(path)
            self._names.require_file(view, path)
            os.close((await (await self._lines.of(view)).need(path)).fd)

        await _run_coros_in_chunks([bring(path) for path in paths], batch_size=self.batch_size)

    # --- names ---

    def info(self, path: Any, **kwargs: Any) -> Info:
        """name, size, type; for files ETag (the version) and mtime. Raises FileNotFoundError."""
        path = self._stripped(path)
        view = self._views.of(path)
        return self._names.info(view, path) or info_of(view.connection.info(path))

    def ls(self, path: Any, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        path = self._stripped(path)
        view = self._views.of(path)
        infos = None if refresh else self._names.listed(view, path)
        if infos is None:
            entries = _entries(view, path)
            if entries:
                infos = self._names.keep(path, map(info_of, entries))
            else:
                info = self.info(path)
                infos = [info] if info["type"] == "file" else []
        return infos if detail else [info["name"] for info in infos]

    def find(
        self, path: Any, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All files below `path`; with `withdirs` the directories too, `path` among them."""
        return self._run(self._find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail))

    def du(
        self, path: Any, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **kwargs: Any
    ) -> Any:
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True)
        sizes = {name: info["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    def exists(self, path: Any, **kwargs: Any) -> bool:
        path = self._stripped(path)
        if self._views.file(path) is not None:
            return True
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: Any) -> bool:
        path = self._stripped(path)
        return self._views.file(path) is not None or self._type(path) == "file"

    def isdir(self, path: Any) -> bool:
        path = self._stripped(path)
        return self._views.file(path) is None and self._type(path) == "directory"

    def _type(self, path: str) -> str:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return ""

    def size(self, path: Any) -> int:
        path = self._stripped(path)
        file = self._views.file(path)
        return os.stat(file).st_size if file is not None else int(self.info(path)["size"])

    def modified(self, path: Any) -> Any:
        info = self.info(path)
        if "mtime" not in info:
            raise FileNotFoundError(f"{info['name']}: the origin tells no time of modification")
        return info["mtime"]

    def ukey(self, path: Any) -> str:
        """Differs when the content does: of name, version and size, not of times that origins write differently."""
        info = self.info(path)
        content = f"{info['name']}\0{info.get('ETag', '')}\0{info['size']}"
        return sha256(content.encode("utf-8", "surrogateescape")).hexdigest()

    def checksum(self, path: Any) -> int:
        return int(self.ukey(path), 16)

    def invalidate_cache(self, path: Any = None) -> None:
        """Forget listings (below `path`, or all), and for None serve the snapshot that the cache has now."""
        self._names.forget(None if path is None else self._stripped(path))
        if path is None:
            self._views.reload()

    # --- bytes ---

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes [start, end), as a slice has them; negative ones count from the end."""
        path = self._stripped(path)
        hit = self._views.hit(path)
        if hit is None:
            return self._cat_cold_file(path, start, end)
        fd, info, _ = hit
        try:
            begin, stop = span(start, end, info.st_size)
            return read_at(fd, begin, stop - begin)
        finally:
            os.close(fd)

    def _cat_cold_file(self, path: str, start: int | None, end: int | None) -> bytes:
        view = self._views.of(path)
        self._names.require_file(view, path)
        need = _asking(view)
        with LocatedFile(path, need(path, *first_need(start, end)), need) as file:
            return file.read_span(*span(start, end, file.size))

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **kwargs: Any) -> Any:
        """Contents of one file, or {path: content} of several. What is not cached comes concurrently."""
        paths = self.expand_path(path, recursive=recursive)
        if len(paths) == 1 and not isinstance(path, list) and paths[0] == self._stripped(path):
            return self.cat_file(paths[0], **kwargs)
        results = self._cat_all([(each, kwargs.get("start"), kwargs.get("end")) for each in paths])
        out = dict(zip(paths, results, strict=True))
        if on_error == "raise":
            _raise_first(results)
        return {k: v for k, v in out.items() if on_error == "return" or not isinstance(v, BaseException)}

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        results = self._cat_all(list(zip(paths, per_path(paths, starts), per_path(paths, ends), strict=True)))
        if on_error != "return":
            _raise_first(results)
        return results

    def _cat_all(self, ranges: list[tuple[str, int | None, int | None]]) -> list[Any]:
        """Bytes or the exception, for each; hits here, misses concurrently."""
        results: list[Any] = [None] * len(ranges)
        missing: list[int] = []
        for number, (path, start, end) in enumerate(ranges):
            if self._views.file(self._stripped(path)) is None:
                missing.append(number)
                continue
            try:
                results[number] = self.cat_file(path, start, end)
            except Exception as error:  # noqa: BLE001 - handed to the caller in its place
                results[number] = error
        if missing:
            wanted = [ranges[number] for number in missing]
            brought = self._run(self._cat_ranges(*map(list, zip(*wanted, strict=True))))  # type: ignore[arg-type]
            for number, result in zip(missing, brought, strict=True):
                results[number] = result
        return results

    def get_file(self, rpath: Any, lpath: Any = None, callback: Any = None, outfile: Any = None, **kwargs: Any) -> None:
        """Copy one object to a local path or file object; of a directory, the (empty) directory is made."""
        path = self._stripped(rpath)
        target = outfile if outfile is not None else lpath
        try:
            source = self.open(path, "rb")
        except (IsADirectory, ObjectNotFound):
            if self._type(path) != "directory":
                raise
            os.makedirs(target, exist_ok=True)
            return
        with source:
            copy_object(source, target, callback)

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = None,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Copy files to local paths, by fsspec's rules; what is not cached comes concurrently."""
        if callback is not None:
            kwargs["callback"] = callback
        return self._run(self._get(rpath, lpath, recursive=recursive, maxdepth=maxdepth, **kwargs))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it to its end on a loop of its own: fsspec's is in another thread, and gone in a forked child."""

        async def closing() -> T:
            try:
                return await work
            finally:
                await self._lines.close()

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(closing())
        return _in_thread(closing())  # called from a coroutine, as in a notebook

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


def _asking(view: View) -> Need:
    return lambda path, offset, length: view.connection.need(path, offset=offset, length=length)


def _entries(view: View, path: str) -> list[Entry]:
    try:
        return list(view.connection.entries(path))
    except (ObjectNotFound, NotADirectoryError):
        return []


def _raise_first(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            failure.append(error)

    thread = threading.Thread(target=run, name="cachefs-call")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]

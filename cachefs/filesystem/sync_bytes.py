"""Bytes, for code that blocks: open, cat, get.

A hit is a local file. Calls that name many objects read what is cached here, and bring the rest concurrently.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fsspec.spec import AbstractFileSystem

from cachefs.errors import CacheFull, IsADirectory, ObjectNotFound
from cachefs.filesystem.aio import Lines, per_path
from cachefs.filesystem.copying import copy_object
from cachefs.filesystem.files import CacheFile, LocatedFile, Need, first_need, local_file, opened, read_at, span
from cachefs.filesystem.names import Names
from cachefs.filesystem.readonly import read_only

if TYPE_CHECKING:
    from cachefs.filesystem.views import View, Views


class SyncBytes:
    """The part of CacheFileSystem that reads."""

    _views: Views
    _names: Names
    _lines: Lines
    _stripped: Any
    _type: Any
    _run: Any
    _get: Any
    _cat_ranges: Any
    expand_path: Any
    batch_size: int

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

    def _open_cold(self, path: str) -> CacheFile:
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
            brought = self._run(self._cat_ranges(*map(list, zip(*wanted, strict=True))))
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


def _asking(view: View) -> Need:
    return lambda path, offset, length: view.connection.need(path, offset=offset, length=length)


def _raise_first(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result

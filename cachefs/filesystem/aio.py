"""The async half: hits are answered in place, misses go to the fetcher over one socket per event loop.

A coroutine that hits does not wait for anything, because reading a cached file inline takes 20 us and handing it to
a thread 140. Any number of misses are in flight at once on the socket.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cachefs.errors import IsADirectory, ObjectNotFound, StaleObject
from cachefs.filesystem.copying import copy_object
from cachefs.filesystem.files import ASK_AT_MOST, first_need, read_at, span
from cachefs.filesystem.names import Info, Names, info_of
from cachefs.filesystem.readonly import read_only
from cachefs.messages import Entry

if TYPE_CHECKING:
    from cachefs.client import AsyncConnection
    from cachefs.filesystem.views import View, Views

# Reading this much takes the loop away from others for less than a millisecond; more is read in a thread.
INLINE_BYTES = 1024 * 1024


class Lines:
    """Connections of this file system by event loop and dataset. Each belongs to its loop."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._open: dict[asyncio.AbstractEventLoop, dict[View, AsyncConnection]] = {}
        self._inherited: list[object] = []

    async def of(self, view: View) -> AsyncConnection:
        """The connection for `view` on the running loop."""
        if self._pid != os.getpid():
            # The parent's: to take its sockets from its loop would take them from the parent's epoll as well.
            self._inherited.append(self._open)
            self._open, self._pid = {}, os.getpid()
        loop = asyncio.get_running_loop()
        here = self._open.get(loop)
        if here is None:
            for ended in [known for known in self._open if known.is_closed()]:
                await _close(self._open.pop(ended))
            here = self._open[loop] = {}
        connection = here.get(view)
        if connection is None:
            from cachefs.client import AsyncConnection

            connection = here[view] = AsyncConnection(view.config, view.session)
        return connection

    async def close(self) -> None:
        """Close the connections of the running loop."""
        await _close(self._open.pop(asyncio.get_running_loop(), {}))


async def _close(connections: dict[View, AsyncConnection]) -> None:
    for connection in connections.values():
        await connection.close()


class AsyncSide:
    """The coroutines of CacheFileSystem. fsspec's AsyncFileSystem makes the others (`_cat`, `_get`, ...) of these."""

    _views: Views
    _names: Names
    _lines: Lines
    _strip_protocol: Any
    open: Any

    # --- names ---

    async def _info(self, path: str, **kwargs: Any) -> Info:
        path = self._strip_protocol(path)
        view = self._views.of(path)
        known = self._names.info(view, path)
        if known is not None:
            return known
        return info_of(await (await self._lines.of(view)).info(path))

    async def _ls(self, path: str, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        view = self._views.of(path)
        infos = None if refresh else self._names.listed(view, path)
        if infos is None:
            entries = await self._entries(view, path)
            if entries:
                infos = self._names.keep(path, map(info_of, entries))
            else:
                info = await self._info(path)
                infos = [info] if info["type"] == "file" else []
        return infos if detail else [info["name"] for info in infos]

    async def _find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        path = self._strip_protocol(path)
        view = self._views.of(path)
        out = self._names.found(view, path, maxdepth, withdirs)
        if out is None and maxdepth is None:
            out = self._names.gathered(path, await self._entries(view, path, recursive=True), withdirs)
        if out is None:
            out = await self._find_by_level(path, maxdepth or 1, withdirs)
        if not out:
            try:
                info = await self._info(path)
            except FileNotFoundError:
                info = None
            if info is not None and (withdirs or info["type"] == "file"):
                out = {path: info}
        return out if detail else list(out)

    async def _find_by_level(self, path: str, maxdepth: int, withdirs: bool) -> dict[str, Info]:
        out: dict[str, Info] = {}
        level = [path]
        for _ in range(maxdepth):
            listings = await asyncio.gather(*(self._ls(folder) for folder in level), return_exceptions=True)
            level = []
            for listing in listings:
                if isinstance(listing, FileNotFoundError):
                    continue
                if isinstance(listing, BaseException):
                    raise listing
                for info in listing:
                    out[info["name"]] = info
                    if info["type"] == "directory":
                        level.append(info["name"])
        if out and path and path not in out:
            out[path] = info_of(Entry(path, 0, 0, "", directory=True))
        return {name: info for name, info in sorted(out.items()) if withdirs or info["type"] == "file"}

    async def _entries(self, view: View, path: str, *, recursive: bool = False) -> list[Entry]:
        connection = await self._lines.of(view)
        try:
            return await connection.entries(path, recursive=recursive)
        except (ObjectNotFound, NotADirectoryError):
            return []

    async def _exists(self, path: str, **kwargs: Any) -> bool:
        path = self._strip_protocol(path)
        if self._views.file(path) is not None:
            return True
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    async def _du(self, path: str, total: bool = True, maxdepth: int | None = None, **kwargs: Any) -> Any:
        found = await self._find(path, maxdepth=maxdepth, detail=True)
        sizes = {name: info["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    # --- bytes ---

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        hit = self._views.hit(path)
        if hit is not None:
            fd, info, _ = hit
            try:
                begin, stop = span(start, end, info.st_size)
                return await _read(fd, begin, stop - begin)
            finally:
                os.close(fd)
        return await self._cat_cold(path, start, end)

    async def _cat_cold(self, path: str, start: int | None, end: int | None) -> bytes:
        view = self._views.of(path)
        self._names.require_file(view, path)
        connection = await self._lines.of(view)
        offset, length = first_need(start, end)
        located = await connection.need(path, offset=offset, length=length)
        begin, stop = span(start, end, located.size)
        parts: list[bytes] = []
        while True:
            try:
                if located.start <= begin < located.stop:
                    count = min(stop, located.stop) - begin
                    parts.append(await _read(located.fd, begin - located.base, count))
                    if len(parts[-1]) != count:
                        raise changed(path)
                    begin += count
            finally:
                os.close(located.fd)
            if begin >= stop:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            version = located.version
            located = await connection.need(path, offset=begin, length=min(stop - begin, ASK_AT_MOST))
            if located.version != version:
                os.close(located.fd)
                raise changed(path)

    async def _get_file(self, rpath: str, lpath: Any, **kwargs: Any) -> None:
        path = self._strip_protocol(rpath)
        callback = kwargs.get("callback")
        fd = await self._whole(path)
        if fd is None:
            os.makedirs(lpath, exist_ok=True)
        elif fd < 0:  # not to be had as one file: in pieces, through threads
            with self.open(path, "rb") as source:
                await asyncio.to_thread(copy_object, source, lpath, callback)
        else:
            with os.fdopen(fd, "rb") as source:
                if os.fstat(source.fileno()).st_size <= INLINE_BYTES:
                    copy_object(source, lpath, callback)
                else:
                    await asyncio.to_thread(copy_object, source, lpath, callback)

    async def _whole(self, path: str) -> int | None:
        """A descriptor of the object's file; -1 where it is not one whole file; None for a directory."""
        hit = self._views.hit(path)
        if hit is not None:
            return hit[0]
        view = self._views.of(path)
        try:
            self._names.require_file(view, path)
            located = await (await self._lines.of(view)).need(path, offset=0, length=0)
        except IsADirectory:
            return None
        except ObjectNotFound:
            if (await self._info(path))["type"] == "directory":
                return None
            raise
        if located.complete:
            return located.fd
        os.close(located.fd)
        return -1

    async def _cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        batch_size: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """As fsspec's; max_gap is taken and has no effect, because ranges of a cached file need no merging."""
        starts, ends = per_path(paths, starts), per_path(paths, ends)
        from fsspec.asyn import _run_coros_in_chunks

        out: list[Any] = await _run_coros_in_chunks(
            [self._cat_file(*each) for each in zip(paths, starts, ends, strict=True)],
            batch_size=batch_size or self.batch_size,  # type: ignore[attr-defined]
            return_exceptions=True,
        )
        if on_error != "return":
            for result in out:
                if isinstance(result, BaseException):
                    raise result
        return out

    async def open_async(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """A file with coroutines for methods (aiofiles), read in threads. mode: "rb" only."""
        if set(mode) & set("wax+"):
            raise read_only("open for writing", path)
        if "b" not in mode or kwargs.get("compression"):
            raise ValueError("open_async opens binary files, without compression")
        from cachefs.filesystem.async_file import AsyncFile

        path = self._strip_protocol(path)
        if self._views.file(path) is None:
            fd = await self._whole(path)  # so that what follows does not wait for the origin
            if fd is not None and fd >= 0:
                os.close(fd)
        return AsyncFile(self.open(path, "rb"), asyncio.get_running_loop())


def per_path(paths: list[str], value: Any) -> list[Any]:
    """A range bound for each path. Raises TypeError, ValueError as fsspec does."""
    if not isinstance(paths, list):
        raise TypeError("cat_ranges takes a list of paths")
    values = list(value) if isinstance(value, Iterable) else [value] * len(paths)
    if len(values) != len(paths):
        raise ValueError("cat_ranges: as many starts and ends as paths are needed")
    return values


async def _read(fd: int, offset: int, length: int) -> bytes:
    if length <= INLINE_BYTES:
        return read_at(fd, offset, length)
    return await asyncio.to_thread(read_at, fd, offset, length)


def changed(path: str) -> StaleObject:
    return StaleObject(f"{path}: was replaced at the origin while it was read; read it again", path=path)

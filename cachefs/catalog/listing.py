"""From an origin's listing to a catalog: many requests at once, and an interrupted listing goes on.

An object store answers 1,000 names per request and, below one prefix, one request after the other, so speed comes
from listing several prefixes at once. First the upper directories are listed level by level until there are enough
of them (a lone `train/` is gone through); then everything below each is listed flat, in ranges where there is much
(`ranges`). What lies below a directory that is done is not listed again after a restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from cachefs.catalog.builder import Builder
from cachefs.catalog.catalog import Catalog
from cachefs.catalog.format import prefix_of
from cachefs.catalog.ranges import RangedListing, closing
from cachefs.errors import ConfigError, ObjectNotFound

if TYPE_CHECKING:
    from cachefs.messages import Entry

# Requests in flight that any origin takes without throttling; more than this and small servers answer slower.
_CONCURRENCY = 8

# Levels to go down in search of a fan-out: more than any dataset's layout, fewer than a loop of links would give.
_MAX_LEVELS = 16

# A level with more directories than this is listed flat from above: one request each would cost more than one
# request per 1,000 names, and their names would have to stay in memory (100 bytes each).
_MAX_FOLDERS = 25_000

# With more objects than this a level is listed flat from above, too, where that can be done in ranges.
_MAX_OBJECTS = 20_000

_PROGRESS_SECONDS = 0.2  # often enough for an eye, seldom enough to cost nothing

# Names of directories that cannot be asked for, see _Listing._ambiguous.
_AMBIGUOUS = ("", ".", "..")

Progress = Callable[[int, int], None]

_Result = TypeVar("_Result")


class Lister(Protocol):
    """What of an origin (cachefs/origin/contract.py) a listing needs."""

    identity: str

    async def head(self, path: str) -> Entry: ...

    def list_level(self, path: str) -> AsyncIterator[list[Entry]]: ...

    def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        """In key order at least where directories can have the names in _AMBIGUOUS."""
        ...

    def in_key_order(self, path: str) -> bool: ...


async def build(
    origin: Lister,
    root: str,
    file: Path,
    *,
    previous: Catalog | None = None,
    last_id: int = 0,
    progress: Progress | None = None,
    resume: bool = True,
    at_once: int | None = None,
) -> Catalog:
    """List everything below `root` of `origin` and seal it as the catalog `file`.

    progress(objects, bytes) is called at most every 0.2 s, and once at the end; also while the catalog is written.
    What was listed before a failure or a cancellation is kept for an hour, and the next call goes on from there
    unless resume=False. previous, last_id: see Builder. at_once: how many directories are listed at a time.

    Raises ObjectNotFound (there is nothing at `root`), ConfigError (`root` is an object), CacheFull, CacheError,
    and what the origin raises.
    """
    # SQLite waits for the disk, so it works in a thread of its own, and the event loop goes on.
    thread = ThreadPoolExecutor(1, thread_name_prefix="cachefs-catalog")
    opening = thread.submit(
        Builder, file, identity=origin.identity, root=root, previous=previous, last_id=last_id, resume=resume
    )
    try:
        builder = await asyncio.shield(asyncio.wrap_future(opening))
        listing = _Listing(origin, root, builder, thread, progress, at_once or _CONCURRENCY)
        await listing.run()
        return await listing.seal()
    finally:
        # Shielded: a second cancellation must not leave the builder open, its file locked.
        closing = thread.submit(_close, opening)
        thread.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(closing))


def _close(opening: Future[Builder]) -> None:
    """Close what was opened, if it was; in the same thread, so after all other work on it."""
    if opening.exception() is None:
        opening.result().close()


class _Listing:
    """One run. Counts what it has seen; the builder is used in `thread` only."""

    def __init__(
        self,
        origin: Lister,
        root: str,
        builder: Builder,
        thread: ThreadPoolExecutor,
        progress: Progress | None,
        at_once: int,
    ) -> None:
        self._at_once = at_once
        self._origin = origin
        self._root = root
        self._builder = builder
        self._thread = thread
        self._progress = progress
        self._reported = time.monotonic()
        self._objects = 0
        self._bytes = 0
        self._found_any = False
        self._root_is_object = False
        self._idle = asyncio.Semaphore(at_once)

    async def run(self) -> None:
        folders = await self._fan_out()
        await self._each(folders, self._whole)
        if not self._found_any:
            await self._explain_nothing()

    async def seal(self) -> Catalog:
        sealing = asyncio.wrap_future(self._thread.submit(self._builder.seal))
        sealing.add_done_callback(_look_at)
        try:
            while not sealing.done():
                await asyncio.wait((sealing,), timeout=_PROGRESS_SECONDS)
                self._report()
        except BaseException:
            self._builder.cancel()  # nobody waits for it any more
            raise
        catalog = sealing.result()
        if self._progress is not None:
            self._progress(self._objects, self._bytes)
        return catalog

    # --- the upper levels ---

    async def _fan_out(self) -> list[str]:
        """List level by level until there are enough directories; return those that are left to list."""
        folders = [self._root]
        for _ in range(_MAX_LEVELS):
            below: list[str] = []
            await self._each(folders, partial(self._level, below))
            folders = sorted(below)
            if not folders or len(folders) >= self._at_once:
                break
        return folders

    async def _level(self, below: list[str], folder: str) -> None:
        """Take the entries directly in `folder`; add its directories to `below`."""
        prefix = prefix_of(folder)
        ambiguous = flat = False
        found: list[str] = []
        objects = size = 0
        try:
            async with closing(self._origin.list_level(folder)) as pages:
                async for page in pages:
                    served = []
                    for entry in page:
                        if entry.directory and entry.path.startswith(prefix):
                            name = entry.path[len(prefix) :].removesuffix("/")
                            if name in _AMBIGUOUS:
                                ambiguous = True
                                continue  # no directory, only how objects below it are called
                            found.append(prefix + name)
                        served.append(entry)
                    more, more_bytes = await self._take(served)
                    objects += more
                    size += more_bytes
                    flat = len(found) > _MAX_FOLDERS or (objects > _MAX_OBJECTS and self._origin.in_key_order(folder))
                    if flat:
                        break
        except ObjectNotFound:
            return  # vanished since its parent was listed; for the root, _explain_nothing asks again
        if flat:
            self._objects -= objects  # they come again
            self._bytes -= size
            await self._whole(folder)
            return
        if ambiguous:
            await self._ambiguous(folder)
        below.extend(found)

    async def _ambiguous(self, folder: str) -> None:
        """Take what is below directories named "", "." and "..", to be listed as skipped.

        Their paths are not asked for: a client or server may resolve `bucket/..` and answer with something else.
        In key order their contents lie between "." and "0", the character after "/", so they are found from above.
        """
        prefix = prefix_of(folder)
        wanted = tuple(f"{prefix}{name}/" for name in _AMBIGUOUS)
        async with closing(self._origin.list_all(folder, after=prefix + ".")) as pages:
            async for page in pages:
                await self._take([entry for entry in page if entry.path.startswith(wanted)])
                if page and page[-1].path >= prefix + "0":
                    return

    # --- what is below ---

    async def _whole(self, folder: str) -> None:
        """Take everything below `folder`, unless an earlier run did."""
        earlier = await self._in_thread(partial(self._builder.finished, folder))
        if earlier is not None:
            self._found_any = True
            self._objects += earlier[0]
            self._bytes += earlier[1]
            return
        objects = size = 0

        async def take(page: list[Entry]) -> None:
            nonlocal objects, size
            more, more_bytes = await self._take(page)
            objects += more
            size += more_bytes

        try:
            await RangedListing(self._origin, folder, self._idle, take).run()
        except ObjectNotFound:
            return  # vanished since its parent was listed: there is nothing below it
        await self._in_thread(partial(self._builder.checkpoint, folder, objects, size))

    async def _take(self, page: list[Entry]) -> tuple[int, int]:
        """Hand entries to the builder. Returns how many objects they are and their bytes."""
        # The dataset's root may be an object as well as a directory; the object is not part of the dataset.
        entries = [entry for entry in page if entry.path != self._root or entry.directory]
        self._root_is_object = self._root_is_object or len(entries) < len(page)
        if not entries:
            return 0, 0
        self._found_any = True
        await self._in_thread(partial(self._builder.add_all, entries))
        objects = [entry.size for entry in entries if not entry.directory]
        self._objects += len(objects)
        self._bytes += sum(objects)
        self._report()
        return len(objects), sum(objects)

    # --- how ---

    async def _each(self, folders: list[str], work: Callable[[str], Awaitable[None]]) -> None:
        """`work` on each folder, some at once. The first failure ends the others and is raised."""
        waiting = iter(folders)

        async def worker() -> None:
            for folder in waiting:
                async with self._idle:
                    await work(folder)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._at_once, len(folders))):
                    group.create_task(worker())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.wrap_future(self._thread.submit(work))

    def _report(self) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self._progress(self._objects, self._bytes)

    async def _explain_nothing(self) -> None:
        """Nothing was listed: raise why, unless the root is a directory that is empty."""
        try:
            if not self._root_is_object and self._root and (await self._origin.head(self._root)).directory:
                return
            self._root_is_object = bool(self._root)
        except ObjectNotFound as error:
            # The origin may know better what is missing: its message names the bucket when that is it.
            await self._in_thread(self._builder.discard)
            raise ObjectNotFound(f"{self._root}: nothing to list ({error})", path=self._root) from error
        await self._in_thread(self._builder.discard)
        if self._root_is_object:
            raise ConfigError(
                f"{self._root}: is an object, not a directory; give the directory that it is in", path=self._root
            )
        raise ObjectNotFound("there is nothing at this origin", path=self._root)


def _look_at(sealing: asyncio.Future[Catalog]) -> None:
    """Take note of its failure, so that asyncio does not log it as unseen when nobody waits any more."""
    if not sealing.cancelled():
        sealing.exception()

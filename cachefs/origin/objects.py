"""An object store through obstore: the fast path of every cloud, and the whole of gs:// and az://.

obstore's own paths are stricter than object names: it refuses some names, and quietly strips slashes from others.
Subclasses and `_fallback` are for those; nothing here ever asks for a name other than the one given.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from cachefs.errors import CacheFSError, IsADirectory, ObjectNotFound, OriginError, UnsupportedOrigin
from cachefs.messages import Entry
from cachefs.origin.contract import Origin, etag_condition, require_version, stale, version_of
from cachefs.origin.failures import Place, obstore_error
from cachefs.origin.patience import Patience

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Entries of one page of a listing: what S3, GCS and Azure send at most per request.
PAGE = 1000

_REFUSED = re.compile(r"[\x00-\x1f\x7f]")

# How obstore says that a server answered a range with the status of a whole object.
_NOT_PARTIAL = ("non-partial response", "Range request not supported")

# HEAD requests at once, to tell the empty object "a" from the directory marker "a/".
_SETTLERS = 32


def addressable(key: str) -> bool:
    """Whether obstore can address the object named `key` as it is (measured with obstore 0.12: tests compare)."""
    return not _REFUSED.search(key) and all(part not in ("", ".", "..") for part in key.split("/"))


class RangeIgnored(OriginError):
    """A server answered a range request with status 200, which obstore takes for a mistake."""


class ObjectOrigin:
    """Buckets of one endpoint. Subclasses say how a bucket's store is made."""

    def __init__(self, identity: str, place: Place, patience: Patience) -> None:
        self.identity = identity
        self.place = place
        self.patience = patience
        self._stores: dict[str, ObjectStore] = {}
        self._deputy: Origin | None = None

    # --- for subclasses ---

    def make_store(self, bucket: str, patience: Patience) -> ObjectStore:
        raise NotImplementedError

    def make_deputy(self) -> Origin:
        """Another client that can address any name. Raises UnsupportedOrigin that names what to install."""
        raise UnsupportedOrigin(f"{self.place.scheme}://: no client here can address every name")

    def direct(self, path: str, key: str) -> bool:
        """Whether obstore can be asked for this object; else the deputy is."""
        return addressable(key)

    # --- reading ---

    async def head(self, path: str) -> Entry:
        bucket, key = await self._locate(path)
        if not key:
            return await self._directory(path)
        if not self.direct(path, key):
            return await self._fallback().head(path)
        try:
            return self._entry(path, await self._head(bucket, key))
        except Exception as error:
            failure = self._translate(error, path)
            if not isinstance(failure, ObjectNotFound):
                raise failure from error
            missing = failure
        return await self._directory(path, missing)

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        bucket, key = await self._locate(path)
        if not key:  # GET of a bucket is a listing
            await self._directory(path)
            raise IsADirectory(f"{self.place.url(path)}: is a bucket", path=path)
        if not self.direct(path, key):
            return await self._fallback().get(path, version=version, limit=limit)
        import obstore

        try:
            result = await obstore.get_async(self._store(bucket), key, options=cast(Any, self._condition(version)))
            entry = self._entry(path, result.meta)
            require_version(entry, version)
            if entry.size > limit:
                return entry, None
            data = bytes(await result.bytes_async())
        except Exception as error:
            raise self._translate(error, path) from error
        if len(data) != entry.size:
            raise stale(path)
        return entry, data

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        if stop <= start:
            return b""
        bucket, key = await self._locate(path)
        if not self.direct(path, key):
            return await self._fallback().get_range(path, start, stop, version=version)
        import obstore

        options = self._condition(version) | {"range": (start, stop)}
        try:
            result = await obstore.get_async(self._store(bucket), key, options=cast(Any, options))
            require_version(self._entry(path, result.meta), version)
            data = bytes(await result.bytes_async())
        except Exception as error:
            raise self._translate(error, path) from error
        if len(data) != stop - start:
            raise stale(path)
        return data

    # --- listing ---

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        import obstore

        bucket, key = await self._locate(path)
        try:
            if not addressable(key or "a"):
                raise UnsupportedOrigin(path)
            level = await obstore.list_with_delimiter_async(self._store(bucket), key or None)
            folders = [
                Entry(path=f"{bucket}/{prefix}", size=0, mtime_ns=0, version="", directory=True)
                for prefix in level["common_prefixes"]
            ]
            files = [self._entry(f"{bucket}/{meta['path']}", meta) for meta in level["objects"]]
        except Exception as error:
            failure = self._translate(error, path)
            if not isinstance(failure, UnsupportedOrigin):
                raise failure from error
            async for page in self._fallback().list_level(path):
                yield page
            return
        yield [*folders, *await self._settle(files)]

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        import obstore

        bucket, key = await self._locate(path)
        offset = after.partition("/")[2]
        last = after
        try:
            if not addressable(key or "a") or not addressable(offset or "a"):
                raise UnsupportedOrigin(path)
            store = self._store(bucket)
            async for page in obstore.list(store, key or None, offset=offset or None, chunk_size=PAGE):
                entries = [self._entry(f"{bucket}/{meta['path']}", meta) for meta in page]
                yield await self._settle(entries)
                last = entries[-1].path if entries else last
            return
        except Exception as error:
            failure = self._translate(error, path)
            if not isinstance(failure, UnsupportedOrigin):
                raise failure from error
        # One name that obstore cannot parse fails its whole listing: somebody else goes on from where it stopped.
        async for rest in self._fallback().list_all(path, after=last):
            yield rest

    def in_key_order(self, path: str) -> bool:
        return False

    async def check(self, path: str = "") -> None:
        import obstore

        bucket, key = await self._locate(path)
        try:
            store = self.make_store(bucket, self.patience.brief())
            async for _ in obstore.list(store, key or None, chunk_size=1):
                return
        except Exception as error:
            failure = self._translate(error, path)
            if not isinstance(failure, UnsupportedOrigin):
                raise failure from error

    async def aclose(self) -> None:
        self._stores.clear()
        if self._deputy is not None:
            await self._deputy.aclose()

    # --- inside ---

    async def _locate(self, path: str) -> tuple[str, str]:
        """(bucket, key) of an object path."""
        bucket, _, key = path.partition("/")
        if not bucket:
            raise UnsupportedOrigin(f"{self.place.scheme}://: name a bucket", path=path)
        return bucket, key

    def _store(self, bucket: str) -> ObjectStore:
        store = self._stores.get(bucket)
        if store is None:
            store = self._stores[bucket] = self.make_store(bucket, self.patience)
        return store

    def _fallback(self) -> Origin:
        if self._deputy is None:
            self._deputy = self.make_deputy()
        return self._deputy

    async def _head(self, bucket: str, key: str) -> Mapping[str, Any]:
        import obstore

        return await obstore.head_async(self._store(bucket), key)

    async def _directory(self, path: str, missing: ObjectNotFound | None = None) -> Entry:
        """The directory at `path`; raises `missing` when nothing is below it. A bucket may be empty."""
        async for page in self.list_all(path):
            if page:
                return Entry(path=path, size=0, mtime_ns=0, version="", directory=True)
        if missing is not None:
            raise missing
        return Entry(path=path, size=0, mtime_ns=0, version="", directory=True)

    def _condition(self, version: str) -> dict[str, Any]:
        match = etag_condition(version)
        return {"if_match": match} if match else {}

    def _entry(self, path: str, meta: Mapping[str, Any]) -> Entry:
        # Listings state milliseconds and headers seconds; a version made from the time must not depend on which.
        mtime_ns = int(meta["last_modified"].timestamp()) * 1_000_000_000
        version = version_of(meta["e_tag"], mtime_ns, meta["size"])
        return Entry(path=path, size=meta["size"], mtime_ns=mtime_ns, version=version)

    async def _settle(self, entries: list[Entry]) -> list[Entry]:
        """Gives directory markers their slash back.

        obstore reports the empty object "a/" (how consoles make a folder) as "a", which does not exist.
        """
        turns = asyncio.Semaphore(_SETTLERS)

        async def settled(entry: Entry) -> Entry:
            if entry.size:
                return entry
            bucket, key = await self._locate(entry.path)
            async with turns:
                try:
                    await self._head(bucket, key)
                except FileNotFoundError:
                    return Entry(f"{entry.path}/", 0, entry.mtime_ns, entry.version)
            return entry

        if all(entry.size for entry in entries):
            return entries
        return list(await asyncio.gather(*(settled(entry) for entry in entries)))

    def _translate(self, error: Exception, path: str) -> CacheFSError:
        if isinstance(error, CacheFSError):
            return error
        if any(sign in str(error) for sign in _NOT_PARTIAL):
            return RangeIgnored(f"{self.place.url(path)}: the origin does not serve byte ranges", path=path)
        return obstore_error(error, self.place, path, self.patience)

"""S3 spoken by ourselves: listings with the true names, and objects whose names obstore refuses.

obstore strips slashes from the ends of names in listings and fails a whole listing for one name like "../x"
(measured with 0.12), so what a bucket holds is only seen this way. Ordinary objects are read through obstore.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlsplit

from cachefs.errors import ObjectNotFound, OriginError
from cachefs.messages import Entry
from cachefs.origin.contract import etag_condition, require_version, stale, version_of
from cachefs.origin.failures import Place
from cachefs.origin.patience import Patience
from cachefs.origin.s3_keys import KeyRing
from cachefs.origin.s3_listing import FORGOTTEN, Page, UnreadablePage, parse_buckets, parse_page
from cachefs.origin.s3_settings import S3Settings
from cachefs.origin.sigv4 import encode_path, encode_query, signed_headers
from cachefs.origin.wire import Answer, Wire

T = TypeVar("T")

_DEFAULT_REGION = "us-east-1"

# Answers the question where a bucket is, even to strangers (status 403 with the header).
_REGION_ORACLE = "https://s3.amazonaws.com"


class S3Plain:
    def __init__(self, identity: str, place: Place, settings: S3Settings, ring: KeyRing) -> None:
        self.identity = identity
        self._place = place
        self._settings = settings
        self._ring = ring
        self._wire = Wire(place, settings.patience, settings.verify)
        self._regions: dict[str, str] = {}

    # --- reading ---

    async def head(self, path: str) -> Entry:
        bucket, _, key = path.partition("/")
        if not key:
            return await self.directory(path, None)
        try:
            return _entry(path, await self._request(bucket, key, path=path, method="HEAD"))
        except ObjectNotFound as error:
            return await self.directory(path, error)

    async def directory(self, path: str, missing: ObjectNotFound | None) -> Entry:
        """The directory at `path`; raises `missing` where nothing is below it. A bucket may be empty."""
        bucket, separator, key = path.partition("/")
        page = await self._page(path, bucket, {"prefix": _prefix(separator, key), "max-keys": "1"})
        if missing is not None and not page.files:
            raise missing
        return Entry(path, 0, 0, "", directory=True)

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        bucket, _, key = path.partition("/")
        answer = await self._request(bucket, key, path=path, limit=limit, headers=_condition(version))
        entry = _entry(path, answer)
        require_version(entry, version)
        return entry, answer.body

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        if stop <= start:
            return b""
        bucket, _, key = path.partition("/")
        answer = await self._request(bucket, key, path=path, span=(start, stop), headers=_condition(version))
        require_version(_entry(path, answer), version)
        if answer.body is None or len(answer.body) != stop - start:
            raise stale(path)
        return answer.body

    # --- listing ---

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        if not path:
            yield [Entry(name, 0, 0, "", directory=True) for name in await self._buckets()]
            return
        bucket, separator, key = path.partition("/")
        prefix = _prefix(separator, key)
        async for page in self._pages(path, bucket, {"prefix": prefix, "delimiter": "/"}):
            folders = [Entry(f"{bucket}/{name[:-1]}", 0, 0, "", directory=True) for name in page.prefixes]
            yield [*folders, *_less_marker(page.files, bucket, prefix)]

    def in_key_order(self, path: str) -> bool:
        return not path.partition("/")[0].endswith("--x-s3")  # directory buckets have no order

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        if not path:
            for name in sorted(await self._buckets()):
                if name >= after.partition("/")[0]:
                    async for entries in self.list_all(name, after=after if after.startswith(f"{name}/") else ""):
                        yield entries
            return
        bucket, separator, key = path.partition("/")
        prefix = _prefix(separator, key)
        query = {"prefix": prefix}
        if after:
            query["start-after"] = after.partition("/")[2]
        async for page in self._pages(path, bucket, query):
            yield _less_marker(page.files, bucket, prefix)

    async def check(self, path: str = "") -> None:
        if not path:
            await self._buckets(self._settings.patience.brief())
            return
        bucket, separator, key = path.partition("/")
        query = {"prefix": _prefix(separator, key), "max-keys": "1"}
        await self._page(path, bucket, query, self._settings.patience.brief())

    async def aclose(self) -> None:
        await self._wire.aclose()

    # --- where a bucket is ---

    async def region(self, bucket: str) -> str:
        """The bucket's region: as configured, else asked of AWS once."""
        if self._settings.region or not bucket:
            return self._settings.region or _DEFAULT_REGION
        if bucket not in self._regions:
            answer = await self._settings.patience.persevere(
                lambda: self._wire.ask(f"{_REGION_ORACLE}/{encode_path(bucket)}", {}, path=bucket, method="HEAD")
            )
            self._regions[bucket] = answer.headers.get("x-amz-bucket-region", _DEFAULT_REGION)
        return self._regions[bucket]

    def endpoint(self, region: str) -> str:
        if self._settings.endpoint:
            return self._settings.endpoint
        return f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"

    # --- requests ---

    async def _buckets(self, patience: Patience | None = None) -> list[str]:
        answer = await self._request("", "", path="", patience=patience)
        return self._parsed("", lambda: parse_buckets(answer.body or b""))

    async def _pages(self, path: str, bucket: str, query: dict[str, str]) -> AsyncIterator[Page]:
        while True:
            page = await self._page(path, bucket, query)
            yield page
            if not page.token:
                return
            if page.token == FORGOTTEN:
                query = query | {"start-after": page.last_key}
            else:
                query = {k: v for k, v in query.items() if k != "start-after"} | {"continuation-token": page.token}

    async def _page(self, path: str, bucket: str, query: Mapping[str, str], patience: Patience | None = None) -> Page:
        query = {"list-type": "2", "encoding-type": "url", **query}
        answer = await self._request(bucket, "", path=path, query=query, patience=patience)
        return self._parsed(path, lambda: parse_page(answer.body or b"", bucket))

    def _parsed(self, path: str, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except UnreadablePage as error:
            raise OriginError(
                f"{self._place.url(path)}: {self._place.where} answered with no listing of S3; is it an S3 endpoint?",
                path=path,
            ) from error

    async def _request(
        self,
        bucket: str,
        key: str,
        *,
        path: str,
        method: str = "GET",
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
        span: tuple[int, int] | None = None,
        patience: Patience | None = None,
    ) -> Answer:
        region = await self.region(bucket)
        url = self._url(self.endpoint(region), bucket, key) + (f"?{encode_query(query)}" if query else "")
        asked = dict(headers or {})
        if self._settings.requester_pays:
            asked["x-amz-request-payer"] = "requester"

        async def attempt() -> Answer:
            keys = await self._ring.current()
            # Signed anew each time: a signature is good for 15 minutes, and keys of a role change.
            ready = signed_headers(method, url, asked, keys=keys, region=region) if keys else asked
            return await self._wire.get(url, ready, path=path, method=method, limit=limit, span=span)

        return await (patience or self._settings.patience).persevere(attempt)

    def _url(self, endpoint: str, bucket: str, key: str) -> str:
        if not bucket:
            return f"{endpoint}/"
        if self._settings.virtual:
            parts = urlsplit(endpoint)
            return f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}/{encode_path(key)}"
        return f"{endpoint}/{encode_path(bucket)}" + (f"/{encode_path(key)}" if key else "")


def _prefix(separator: str, key: str) -> str:
    """What the names below a directory begin with. "bucket/" is the directory with the empty name in it."""
    return f"{key}/" if separator else ""


def _condition(version: str) -> dict[str, str]:
    match = etag_condition(version)
    return {"If-Match": match} if match else {}


def _less_marker(files: list[Entry], bucket: str, prefix: str) -> list[Entry]:
    """Without the marker object of the listed directory itself."""
    marker = f"{bucket}/{prefix}"
    return [entry for entry in files if entry.path != marker or entry.size]


def _entry(path: str, answer: Answer) -> Entry:
    modified = answer.headers.get("last-modified")
    mtime_ns = int(parsedate_to_datetime(modified).timestamp()) * 1_000_000_000 if modified else 0
    size = max(answer.size, 0)
    return Entry(path, size, mtime_ns, version_of(answer.headers.get("etag"), mtime_ns, size))

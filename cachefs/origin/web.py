"""http:// and https://: plain web servers.

Object paths are whole URLs, as fsspec has them. Ordinary ones are read through obstore; URLs with a query (signed
ones), and servers that ignore ranges, through requests of our own. A directory is listed by the links of its index
page, as far as it has one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from cachefs.errors import ConfigError, ObjectNotFound, OriginError, UnsupportedOrigin
from cachefs.messages import Entry
from cachefs.origin.contract import require_version, stale, version_of
from cachefs.origin.failures import Place, status_error
from cachefs.origin.objects import ObjectOrigin, RangeIgnored, addressable
from cachefs.origin.patience import Patience
from cachefs.origin.spec import OriginSpec
from cachefs.origin.wire import Answer, Wire

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Options of fsspec's http file system that change nothing here.
_IGNORED = frozenset(
    {
        "asynchronous",
        "block_size",
        "cache_options",
        "cache_type",
        "encoded",
        "listings_expiry_time",
        "loop",
        "max_paths",
        "same_scheme",
        "simple_links",
        "size_policy",
        "skip_instance_cache",
        "use_listings_cache",
    }
)

# An index page of 100,000 names is about 10 MB; more is not an index.
_INDEX_BYTES = 64 * 1024 * 1024

# A web server redirects once or twice (to https, to a mirror).
_REDIRECTS = 5

# HEAD requests at once while listing: index pages do not state sizes.
_SIZERS = 32


class WebOrigin(ObjectOrigin):
    def __init__(self, spec: OriginSpec) -> None:
        left = {name: value for name, value in spec.options.items() if name not in _IGNORED}
        patience = Patience.take(left)
        super().__init__(spec.identity, Place(spec.protocol, "the web server"), patience)
        client = dict(left.pop("client_kwargs", None) or {})
        self._headers = _headers(left, client)
        self._verify: bool | str = left.pop("verify", client.pop("verify", True))
        for name in (*(f"client_kwargs[{name!r}]" for name in sorted(client)), *sorted(left)):
            raise ConfigError(f"{spec.protocol}: unknown option {name}; known are headers, client_kwargs and verify")
        self._plain = WebPlain(spec.identity, self.place, patience, self._headers, self._verify)
        self._without_ranges: set[str] = set()

    def make_store(self, bucket: str, patience: Patience) -> ObjectStore:
        from obstore.store import HTTPStore

        options: dict[str, Any] = patience.client_options() | {
            "allow_http": bucket.startswith("http://"),
            "allow_invalid_certificates": self._verify is False,
            "default_headers": self._headers,
        }
        if isinstance(self._verify, str):
            try:
                with open(self._verify, "rb") as file:
                    options["root_certificate"] = file.read()
            except OSError as error:
                raise ConfigError(f"verify={self._verify!r}: cannot be read ({error.strerror})") from error
        return HTTPStore(bucket, client_options=options, retry_config=patience.retry_config())  # type: ignore[arg-type]

    def make_deputy(self) -> WebPlain:
        return self._plain

    def direct(self, path: str, key: str) -> bool:
        # obstore encodes what it is given: an encoded slash, or bytes that are not UTF-8, would come out different.
        odd = any(sign in path for sign in ("?", "#", "%2f", "%2F")) or "\ufffd" in key
        return not odd and addressable(key)

    async def head(self, path: str) -> Entry:
        host, key = await self._locate(path)
        if not self.direct(path, key):
            return await self._plain.head(path)
        try:
            return self._entry(path, await self._head(host, key))
        except Exception as error:
            failure = self._translate(error, path)
            if not isinstance(failure, OriginError) or isinstance(failure, ObjectNotFound):
                raise failure from error
        return await self._plain.head(path)  # some servers refuse HEAD but not GET

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        host, _ = await self._locate(path)
        if host not in self._without_ranges:
            try:
                return await super().get_range(path, start, stop, version=version)
            except RangeIgnored:
                self._without_ranges.add(host)
        return await self._plain.get_range(path, start, stop, version=version)

    def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        return self._plain.list_level(path)

    def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        return self._plain.list_all(path, after=after)

    async def check(self, path: str = "") -> None:
        if path:
            await self._plain.check(path)

    async def aclose(self) -> None:
        self._stores.clear()
        await self._plain.aclose()

    async def _locate(self, path: str) -> tuple[str, str]:
        parts = urlsplit(path)
        if not parts.netloc:
            raise UnsupportedOrigin(f"{path!r}: a URL needs a host", path=path)
        return f"{parts.scheme}://{parts.netloc}", unquote(parts.path.lstrip("/"), errors="replace")

    def _condition(self, version: str) -> dict[str, Any]:
        return {}  # If-Match never holds for a weak ETag (RFC 9110, 13.1.1); the answer's ETag is compared instead


class WebPlain:
    """The same with requests of our own."""

    def __init__(
        self, identity: str, place: Place, patience: Patience, headers: Mapping[str, str], verify: bool | str
    ) -> None:
        self.identity = identity
        self._place = place
        self._patience = patience
        self._headers = headers
        self._wire = Wire(place, patience, verify)

    async def head(self, path: str) -> Entry:
        # Not HEAD: a signed URL is good for GET only. One byte, and its answer states the whole size.
        answer = await self._request(path, span=(0, 1), empty=True)
        return _entry(path, answer)

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        answer = await self._request(path, limit=limit)
        entry = _entry(path, answer)
        require_version(entry, version)
        return entry, answer.body

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        answer = await self._request(path, span=(start, stop))
        require_version(_entry(path, answer), version)
        if answer.body is None or len(answer.body) != stop - start:
            raise stale(path)
        return answer.body

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        files, folders = await self._index(path)
        turns = asyncio.Semaphore(_SIZERS)

        async def sized(url: str) -> list[Entry]:
            async with turns:
                try:
                    return [await self.head(url)]
                except ObjectNotFound:
                    return []  # an index may name what is gone

        yield [Entry(url, 0, 0, "", directory=True) for url in folders]
        found = await asyncio.gather(*(sized(url) for url in files))
        yield [entry for entries in found for entry in entries]

    def in_key_order(self, path: str) -> bool:
        return False

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        async for entries in self.list_level(path):
            for entry in entries:
                if entry.directory:
                    async for below in self.list_all(entry.path, after=after):
                        yield below
            yield [entry for entry in entries if not entry.directory and entry.path > after]

    async def check(self, path: str = "") -> None:
        await self._request(path, span=(0, 1), empty=True, patience=self._patience.brief())

    async def aclose(self) -> None:
        await self._wire.aclose()

    async def _index(self, path: str) -> tuple[list[str], list[str]]:
        """(files, directories) that the index page of the directory links to, one level."""
        base = path + "/"
        answer = await self._request(base, limit=_INDEX_BYTES)
        if answer.body is None or "html" not in answer.headers.get("content-type", ""):
            raise UnsupportedOrigin(
                f"{self._place.url(path)}: plain http cannot be listed and this server has no index page here;"
                " give the files one by one, or use the server's own protocol (s3, webdav, ...)",
                path=path,
            )
        links = _Links()
        links.feed(answer.body.decode("utf-8", "replace"))
        files: set[str] = set()
        folders: set[str] = set()
        for link in links.found:
            url = urljoin(base, link).partition("#")[0].partition("?")[0]
            name = url.removeprefix(base)
            if url == name or not name.strip("/"):
                continue  # elsewhere, or the directory itself
            first, slash, _ = name.partition("/")
            (folders if slash else files).add(base + first)
        return sorted(files), sorted(folders)

    async def _request(
        self,
        path: str,
        *,
        limit: int | None = None,
        span: tuple[int, int] | None = None,
        empty: bool = False,
        patience: Patience | None = None,
    ) -> Answer:
        url, headers = _ascii(path), dict(self._headers)
        for _ in range(_REDIRECTS):
            ask = partial(self._wire.ask, url, headers, path=path, limit=limit, span=span)
            answer = await (patience or self._patience).persevere(ask)
            if answer.status in (301, 302, 303, 307, 308) and "location" in answer.headers:
                target = urljoin(url, answer.headers["location"])
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    headers = {k: v for k, v in headers.items() if k.lower() not in ("authorization", "cookie")}
                url = target
            elif answer.status == 416 and empty:
                return Answer(200, answer.headers, 0, b"")  # no first byte: an empty object
            else:
                if answer.status not in (200, 206):
                    raise status_error(answer.status, "", self._place, path)
                return answer
        raise OriginError(f"{self._place.url(path)}: the server redirects without end", path=path)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _headers(left: dict[str, Any], client: dict[str, Any]) -> dict[str, str]:
    headers = {str(k): str(v) for k, v in {**(client.pop("headers", {})), **(left.pop("headers", {}))}.items()}
    auth = client.pop("auth", None)
    if auth is not None:
        encode = getattr(auth, "encode", None)
        if encode is None:
            raise ConfigError("http: client_kwargs['auth'] must be an aiohttp.BasicAuth; or give headers")
        headers.setdefault("Authorization", str(encode()))
    return headers


def _ascii(url: str) -> str:
    """The URL with what HTTP cannot carry encoded, and what is encoded left alone."""
    return quote(url, safe="%/:?#[]@!$&'()*+,;=~-._")


def _entry(path: str, answer: Answer) -> Entry:
    modified = answer.headers.get("last-modified")
    mtime_ns = int(parsedate_to_datetime(modified).timestamp()) * 1_000_000_000 if modified else 0
    size = max(answer.size, 0)
    return Entry(path, size, mtime_ns, version_of(answer.headers.get("etag"), mtime_ns, size))

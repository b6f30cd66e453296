"""What every origin can do, and how versions are named and compared.

A version is the ETag where the origin has one. Where it has none, it is "<mtime_ns>-<size>", with the time as the
origin states it for both a listing and a read, so that the two agree.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Protocol

from cachefs.errors import StaleObject
from cachefs.messages import Entry
from cachefs.origin.redaction import plain_url

# Our own versions, not ETags: up to 20 digits hold any time in ns. (An S3 multipart ETag has 32 hex digits first.)
_MTIME_SIZE = re.compile(r"-?\d{1,20}-\d{1,20}")


class Origin(Protocol):
    """Distributed storage of one user. Belongs to one event loop of one process; all methods may run concurrently.

    Paths are object paths (ARCHITECTURE.md). Raises only errors of cachefs.errors: ObjectNotFound,
    OriginAccessDenied, OriginUnreachable, OriginTimeout, StaleObject, UnsupportedOrigin, IsADirectory, ConfigError,
    OriginError, after its own retries (cachefs/origin/patience.py).
    """

    identity: str

    async def head(self, path: str) -> Entry:
        """What is there: an object, or a directory where something lies below `path`."""
        ...

    async def get(self, path: str, *, version: str, limit: int) -> tuple[Entry, bytes | None]:
        """The object of that version ("" = any) if it has at most `limit` bytes, else (entry, None)."""
        ...

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        """Exactly bytes [start, stop) of exactly that version ("" = any), else StaleObject."""
        ...

    def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        """Files and directories directly below `path`, page by page."""
        ...

    def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        """Every object below `path`, flat, page by page; in key order where the origin has one.

        after: an object path; what is not greater than it is left out.
        """
        ...

    def in_key_order(self, path: str) -> bool:
        """Whether `list_all` gives names in the order of their bytes, and begins at any name without going through
        those before it."""
        ...

    async def check(self, path: str = "") -> None:
        """Whether the origin (and `path`, where given) answers with these credentials. Gives up early."""
        ...

    async def aclose(self) -> None: ...


def plain_etag(text: str | None) -> str:
    """An ETag without quotes and without W/: servers write the same one differently in listings and headers."""
    if not text:
        return ""
    return text.removeprefix("W/").strip('"')


def version_of(e_tag: str | None, mtime_ns: int, size: int) -> str:
    return plain_etag(e_tag) or f"{mtime_ns}-{size}"


def etag_condition(version: str) -> str | None:
    """What to send as If-Match for this version; None when it is not an ETag."""
    return f'"{version}"' if version and not _MTIME_SIZE.fullmatch(version) else None


def require_version(found: Entry, version: str) -> None:
    """Raises StaleObject unless `found` is of `version` ("" = any). Some servers ignore If-Match."""
    if version and found.version != version:
        raise stale(found.path)


def stale(path: str) -> StaleObject:
    shown = plain_url(path) if "://" in path else path
    return StaleObject(
        f"{shown}: was replaced at the origin since it was listed; run `cachefs refresh` to see the new one", path=path
    )

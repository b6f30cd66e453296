"""What an fsspec file system says about a file, as an Entry. Each says it under other names."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cachefs.messages import Entry
from cachefs.origin.contract import plain_etag

# Names under which file systems state what changes with the content, best first. An ETag before a checksum, because
# obstore reports the ETag of the same object; zip's CRC covers the content of the member.
_VERSIONS = ("ETag", "etag", "e_tag", "generation", "blob_id", "sha", "checksum", "md5", "content_md5", "CRC")

# When it was last written, best first; "created" is how fsspec's memory file system says it.
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "modificationTime", "date_time", "created")


def entry_of(info: Mapping[str, Any]) -> Entry:
    name = str(info["name"])
    mtime_ns = next((found for key in _TIMES if (found := _nanoseconds(info.get(key)))), 0)
    if info.get("type") == "directory":
        return Entry(name.rstrip("/") or name[:1], 0, mtime_ns, "", directory=True)
    size = int(info.get("size") or 0)
    return Entry(name, size, mtime_ns, _version(info) or f"{mtime_ns}-{size}")


def _version(info: Mapping[str, Any]) -> str:
    if info.get("kind") == "storage#object":  # gcsfs: Google's JSON, whose etag is not the ETag that obstore sees
        try:
            return base64.b64decode(info.get("md5Hash") or "", validate=True).hex() or f"-{info.get('etag', '')}"
        except binascii.Error:
            return ""
    for key in _VERSIONS:
        value = info.get(key)
        if isinstance(value, str) and value:
            return plain_etag(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{key.lower()}:{value:x}"
    return ""


def _nanoseconds(value: Any) -> int:
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
        return ((delta.days * 86400 + delta.seconds) * 1_000_000 + delta.microseconds) * 1000
    if isinstance(value, int | float) and not isinstance(value, bool):
        # milliseconds, as hdfs has them, are beyond the year 5000 if taken for seconds
        # A float of seconds since 1970 is exact to 0.24 microseconds: rounded, it equals the datetime it was made
        # from (fsspec's memory file system gives the one in ls and the other in info).
        return round(value * 1000) * 1000 if value > 1e11 else round(value * 1_000_000) * 1000
    if isinstance(value, str):
        try:
            return _nanoseconds(datetime.fromisoformat(value))
        except ValueError:
            return 0
    if isinstance(value, tuple) and len(value) >= 6:  # zip: (year, month, day, hour, minute, second)
        try:
            return _nanoseconds(datetime(*value[:6]).replace(tzinfo=UTC))
        except ValueError:
            return 0
    return 0

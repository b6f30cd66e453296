"""The fsspec face of the cache: `cachefs::s3://bucket/a.jpg`, and `fsspec.filesystem("cachefs", ...)`.

A hit is answered in the caller's process: resolve the name, open a local file. Nothing is asked of anybody, and no
event loop takes part, so a hit works the same in a thread, after a fork and in a DataLoader worker. A miss goes to
the fetcher of the cache, which answers with a file or a descriptor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefs.filesystem.core import CacheFileSystem as CacheFileSystem

__all__ = ["CacheFileSystem"]


def __getattr__(name: str) -> Any:
    if name == "CacheFileSystem":
        from cachefs.filesystem.core import CacheFileSystem

        return CacheFileSystem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""cachefs: training data from distributed storage at local-disk speed.

Importing this package does no work: every name is loaded when it is first used, because it is imported in
each DataLoader worker and a mount worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefs.config import CacheConfig as CacheConfig
    from cachefs.filesystem import CacheFileSystem as CacheFileSystem
    from cachefs.hints.reading import hinted as hinted

__all__ = ["CacheConfig", "CacheFileSystem", "__version__", "hinted"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "CacheConfig":
        from cachefs.config import CacheConfig

        return CacheConfig
    if name == "CacheFileSystem":
        from cachefs.filesystem import CacheFileSystem

        return CacheFileSystem
    if name == "hinted":
        from cachefs.hints.reading import hinted

        return hinted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

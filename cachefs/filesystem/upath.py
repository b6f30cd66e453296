"""`UPath("cachefs::s3://bucket/a.jpg", ...)`: universal_pathlib asks for a class of our own, by entry point."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fsspec import get_filesystem_class
from upath import UPath

# universal_pathlib takes the rules of paths from the class, if fsspec has loaded it, and otherwise warns and guesses.
get_filesystem_class("cachefs")


class CachePath(UPath):
    """A path in a cachefs file system."""

    __slots__ = ()

    @property
    def storage_options(self) -> Mapping[str, Any]:
        # Without what the chain adds for each URL, or two paths of one file system would not compare equal.
        return MappingProxyType({k: v for k, v in self._storage_options.items() if k != "fo"})

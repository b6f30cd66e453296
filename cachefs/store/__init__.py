"""Blobs on disk: where they are, and how they get there whole.

`Reader` is the side of every process that reads a cache, `Store` that of its one fetcher. Loaded when first used,
since a reader needs nothing of the writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefs.store.part import Part as Part
    from cachefs.store.reader import Reader as Reader
    from cachefs.store.writer import Store as Store
    from cachefs.store.writer import Usage as Usage

__all__ = ["Part", "Reader", "Store", "Usage"]

_HOMES = {"Part": "part", "Reader": "reader", "Store": "writer", "Usage": "writer"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"cachefs.store.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

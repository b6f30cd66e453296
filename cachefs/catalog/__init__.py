"""The names of a dataset, in one immutable SQLite file.

`Catalog` reads one (mount workers and the fetcher open millions of entries in a moment), `Builder` makes one from
entries in any order, `listing.build` makes one from an origin, `compare.changes` says what differs between two.
Names come from outside: `names` decides which of them are served as paths.

Every name is loaded when it is first used: a mount worker needs `Catalog` and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefs.catalog.builder import Builder as Builder
    from cachefs.catalog.catalog import Catalog as Catalog
    from cachefs.catalog.compare import Change as Change
    from cachefs.catalog.compare import changes as changes
    from cachefs.catalog.format import ROOT as ROOT
    from cachefs.catalog.format import Listed as Listed
    from cachefs.catalog.format import Row as Row
    from cachefs.catalog.format import Summary as Summary
    from cachefs.catalog.listing import build as build

_HOMES = {
    "ROOT": "format",
    "Builder": "builder",
    "Catalog": "catalog",
    "Change": "compare",
    "Listed": "format",
    "Row": "format",
    "Summary": "format",
    "build": "listing",
    "changes": "compare",
}

__all__ = ["ROOT", "Builder", "Catalog", "Change", "Listed", "Row", "Summary", "build", "changes"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What changed between two catalogs of a dataset, for a mount that goes over from one to the other.

Both are walked together, directory by directory in name order, so that neither has to fit in memory. Entries that
did not change kept their ids (builder.py), so what is yielded is what a kernel must forget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cachefs.catalog.catalog import Catalog
from cachefs.catalog.format import ROOT, Row

_NOTHING: Iterator[Row] = iter(())


class Change(NamedTuple):
    """An entry that is not the same in both. old None = added, new None = removed.

    parent: the id of its directory in the old catalog if that has it, else in the new one.
    """

    parent: int
    name: bytes
    old: Row | None
    new: Row | None


def changes(old: Catalog, new: Catalog) -> Iterator[Change]:
    """Every entry whose id, kind, size, time or version differs, or that only one of the two has; streaming.

    A directory comes before what is in it. Of an added or removed directory everything in it is yielded too.
    Raises CatalogError when either turns out damaged.
    """
    before, after = old.get(ROOT), new.get(ROOT)
    if before is not None and after is not None and before != after:
        yield Change(0, b"", before, after)
    walks = [_directory(old, ROOT, new, ROOT)]
    while walks:
        # Not recursive: an object's name may have more components than Python has frames.
        for change, differs in walks[-1]:
            if differs:
                yield change
            inner_old = change.old.id if change.old is not None and change.old.directory else 0
            inner_new = change.new.id if change.new is not None and change.new.directory else 0
            if inner_old or inner_new:
                walks.append(_directory(old, inner_old, new, inner_new))
                break
        else:
            walks.pop()


def _directory(old: Catalog, old_id: int, new: Catalog, new_id: int) -> Iterator[tuple[Change, bool]]:
    """(change, whether it is one) for what differs in one directory and for every directory in it. 0 = not there."""
    parent = old_id or new_id
    olds = old.named(old_id) if old_id else _NOTHING
    news = new.named(new_id) if new_id else _NOTHING
    before, after = next(olds, None), next(news, None)
    while before is not None or after is not None:
        if after is None or (before is not None and before.name < after.name):
            assert before is not None
            yield Change(parent, before.name, before, None), True
            before = next(olds, None)
        elif before is None or after.name < before.name:
            yield Change(parent, after.name, None, after), True
            after = next(news, None)
        else:
            differs = before[0] != after[0] or before[3:] != after[3:]
            if differs or before.directory:
                yield Change(parent, after.name, before, after), differs
            before, after = next(olds, None), next(news, None)

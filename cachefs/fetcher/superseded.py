"""What a refresh has replaced: kept while there is room, because a mount may still serve the old snapshot and open
files go on reading it, and the first to go when there is none.

One text file per refreshed dataset beside its record, a ref per line; for a large object another one, of what may be
incomplete of it. Losing it costs room, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from pathlib import Path

from cachefs.catalog import Catalog, changes
from cachefs.datasets import DatasetRecord
from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.errors import CatalogError
from cachefs.fetcher.attachments import domain_of, part_name

log = logging.getLogger("cachefs.fetcher")


def _file(home: Path, dataset: str) -> Path:
    return home / "datasets" / f"{dataset}.superseded"


# After the name of an incomplete object.
_PART = " part"


def note(home: Path, record: DatasetRecord, old: Catalog, new: Catalog) -> int:
    """Write down the refs of what `old` has and `new` has not, after those of earlier refreshes; how many."""
    count = 0
    try:
        with _file(home, record.id).open("a", encoding="ascii") as lines:
            for change in changes(old, new):
                before, after = change.old, change.new
                if before is None or before.directory or (after is not None and after.version == before.version):
                    continue
                path = old.object_path(before.id)
                lines.write(version_ref(path, before.version) + "\n")
                if before.size > BLOCK_SIZE:
                    lines.write(part_name(domain_of(record), path, before.version) + _PART + "\n")
                count += 1
    except CatalogError as error:
        log.warning("the old catalog is damaged (%s): what it alone names stays until its dataset is evicted", error)
    return count


def take(home: Path, *, kept: Container[str] = ()) -> Iterator[tuple[str, str, bool]]:
    """(dataset, ref, False) of everything superseded but of `kept` datasets, and (dataset, name, True) of what may be
    incomplete; a file is gone once all its lines were taken."""
    for file in sorted((home / "datasets").glob("*.superseded")):
        if file.stem in kept:
            continue
        with file.open(encoding="ascii") as lines:
            for line in lines:
                line = line.rstrip("\n")
                yield file.stem, line.removesuffix(_PART), line.endswith(_PART)
        file.unlink(missing_ok=True)

"""The names of an origin, listed by many machines at once into one catalog.

The listing is the fetcher's own (catalog/listing): upper levels first, then everything below each directory flat. Only
the second part, which is nearly all of it, is asked of workers, a few thousand names at a time; what they answer is
sorted here, into the staging file that an interrupted listing goes on from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from cachefs import datasets
from cachefs.batch.engine import Engine
from cachefs.batch.reach import Reach
from cachefs.batch.tasks import ListNames, Names, entry_of, pack, to_bytes
from cachefs.catalog import Catalog
from cachefs.catalog.listing import Progress, build
from cachefs.datasets import DatasetRecord
from cachefs.messages import Entry
from cachefs.origin import Origin

# Names per task: a few requests of 1,000 each, so that handing it out is a small part of it.
NAMES = 4000

# Directories listed at once: at least what one machine does, at most what an origin takes without throttling.
FEWEST, MOST = 8, 256


async def index(
    engine: Engine,
    reach: Reach,
    origin: Origin,
    home: Path,
    record: DatasetRecord,
    previous: Catalog | None,
    progress: Progress | None = None,
) -> Path:
    """A catalog of the dataset beside those it has, to be taken over by its fetcher (TakeCatalog).

    Raises what `listing.build` does.
    """
    folder = home / "catalogs" / record.id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    await origin.check(record.root)  # a wrong address or key is said at once, not by each worker
    catalog = await build(
        _Spread(engine, reach, origin),
        record.root,
        # The fetcher's name for it: whichever of the two begins keeps the other out, and either goes on from it.
        folder / "new.sqlite",
        previous=previous,
        last_id=datasets.last_inode(home, record) if previous is None else record.last_id,
        progress=progress,
        resume=previous is None,
        at_once=max(FEWEST, min(MOST, engine.slots)),
    )
    catalog.close()
    return catalog.file


class _Spread:
    """An origin whose flat listings are made elsewhere."""

    def __init__(self, engine: Engine, reach: Reach, origin: Origin) -> None:
        self.identity = origin.identity
        self._engine = engine
        self._reach = reach
        self._origin = origin

    async def head(self, path: str) -> Entry:
        return await self._origin.head(path)

    def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        return self._origin.list_level(path)

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        most = NAMES if self.in_key_order(path) else 2**63 - 1
        last = to_bytes(after)
        while True:
            task = ListNames(self._reach, to_bytes(path), last, most)
            answer = await self._engine.run(pack(f"index {path}", task))
            assert isinstance(answer, Names)
            if answer.names:
                yield [entry_of(name) for name in answer.names]
                last = max(path for path, *_ in answer.names)
            if not answer.more:
                return

    def in_key_order(self, path: str) -> bool:
        """Whether a listing may stop at a name and another go on after it."""
        return self._origin.in_key_order(path)

"""How a dataset comes by its catalog, and by the next one: listed here, or brought from the node that listed.

Or a command has made it. Whatever the way, a catalog is put in place under the name of its snapshot, and the dataset's
record names it: that is the switch, and it never goes back to an older edition (`datasets.DatasetRecord`). A catalog
that was sealed is a newer edition of the same snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cachefs import datasets
from cachefs.budget import Urgency
from cachefs.catalog import Catalog, hold
from cachefs.datasets import DatasetRecord
from cachefs.errors import CacheError, CatalogError, ConfigError, PeerError
from cachefs.fetcher import superseded
from cachefs.fetcher.arriving import arrived
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.flights import Flights
from cachefs.fetcher.room import Room
from cachefs.fetcher.tally import Tally

if TYPE_CHECKING:
    from cachefs.cluster.nodes import Node
    from cachefs.cluster.peers.catalogs import Edition
    from cachefs.fetcher.editions import Editions

log = logging.getLogger("cachefs.fetcher")

# How often another catalog may come while one is brought. Once is rare.
MOST_MOVES = 5


class Made(NamedTuple):
    """record: of the dataset, with its catalog. changed: it is another snapshot than before. behind: see Catalogued."""

    record: DatasetRecord
    changed: bool
    behind: Sequence[tuple[str, str]] = ()
    behind_total: int = 0


class _Brought(NamedTuple):
    """A catalog that is here and not served yet. keys: see Edition. last_id: the largest inode number that it knows.
    follows: snapshot and largest number of the one that its numbers agree with. file: None = it is in place."""

    snapshot: str
    keys: int
    last_id: int
    follows: tuple[str, int]
    file: Path | None

    def is_there(self) -> bool:
        return self.file is not None and self.file.exists()


class Cataloguing:
    """Belongs to the fetcher's loop; `close` it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._home = room.config.home
        # Apart, because a node that waits for another one may be asked by a third to list: views differ.
        self._asking: Flights[Made] = Flights()
        self._listing: Flights[Made] = Flights()
        self._bringing: Flights[_Brought] = Flights()
        self._brought: dict[str, _Brought] = {}  # by dataset
        # By dataset: held while it is listed, or what was listed elsewhere takes its place.
        self._listing_now: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._noting: set[asyncio.Task[None]] = set()

    async def catalogue(self, attachment: Attachment, refresh: bool, tally: Tally) -> Made:
        """The dataset's catalog, made unless it has one; refresh: the origin is listed from now on.

        In a cluster it comes from the node whose turn it is, unless that is this one, or it was that node who asked.
        """
        if self._room.editions is None or attachment.direct:
            return await self._listed(attachment, refresh, tally)
        editions = self._room.editions
        return await self._asking.join(
            attachment.dataset, lambda _: self._from_cluster(editions, attachment, refresh, tally)
        )

    async def adopt(self, node: str, dataset: str, edition: Edition, switch: bool, tally: Tally) -> Made | None:
        """Go over to what another node has; None: the dataset has no catalog here. Raises PeerError, CacheError.

        switch: not only bring it.
        """
        record, editions = datasets.load_by_id(self._home, dataset), self._room.editions
        if record is None or not record.catalog:
            return None
        if editions is None:
            raise PeerError("this node is in no cluster")
        return await self._take(editions, editions.node(node), edition, record, tally, switch=switch)

    async def follow(self, dataset: str, tally: Tally) -> Made | None:
        """Go over to the catalog of the cluster, if that is newer; None: the dataset has no catalog here."""
        record, editions = datasets.load_by_id(self._home, dataset), self._room.editions
        if record is None or not record.catalog:
            return None
        found = None if editions is None else await editions.served(record)
        if editions is None or found is None or found.edition.order <= _order(record):
            return Made(record, False)
        if self._listing_now[dataset].locked():
            return Made(record, False)
        return await self._take(editions, found.node, found.edition, record, tally)

    async def close(self) -> None:
        for flights in (self._asking, self._listing, self._bringing):
            await flights.close()
        await asyncio.gather(*self._noting, return_exceptions=True)

    # --- from another node ---

    async def _from_cluster(self, editions: Editions, attachment: Attachment, refresh: bool, tally: Tally) -> Made:
        record = self._record(attachment)
        if not refresh and self._usable(record):
            return Made(record, False)
        found = await editions.found(record, refresh, tally)
        if found is not None:
            try:
                made = await self._take(editions, found.node, found.edition, self._record(attachment), tally)
                changed = made.record.snapshot != record.snapshot
                return Made(made.record, changed, found.behind, found.behind_total)
            except (PeerError, CacheError) as error:
                log.warning("%s: its catalog did not come, so it is listed here: %s", record.root, error)
        return await self._listed(attachment, refresh, tally)

    async def _take(
        self,
        editions: Editions,
        node: Node,
        edition: Edition,
        record: DatasetRecord,
        tally: Tally,
        *,
        switch: bool = True,
        listing: bool = False,
    ) -> Made:
        """Bring an edition that is newer than what is here. listing: this is part of listing the dataset.

        Raises PeerError, CacheError.
        """
        for _ in range(MOST_MOVES):
            self._refuse_while_listed(record, listing)
            usable = self._usable(record)
            if usable and edition.order <= _order(record):
                return Made(record, False)
            if usable and edition.snapshot == record.snapshot and edition.keys <= await self._keys(record):
                # Listed again, and nothing had changed.
                brought = _Brought(record.snapshot, edition.keys, record.last_id, _follows(record), None)
            else:
                bring = partial(self._bring, editions, node, edition, record, tally)
                brought = await self._bringing.join((record.id, edition.snapshot, edition.keys), bring)
            self._refuse_while_listed(record, listing)
            record = datasets.load(self._home, record.identity, record.root) or record
            if brought.follows == _follows(record):
                break
            # Another one came meanwhile, and its inode numbers may be those of this one.
        else:
            raise PeerError(f"{record.root}: catalogs come faster than they can be brought")
        if not switch:
            return Made(record, False)
        return self._switched(record, edition.snapshot, brought.last_id, edition.number, brought.file)

    def _refuse_while_listed(self, record: DatasetRecord, listing: bool) -> None:
        """What is being listed gets its inode numbers from the catalog that is here: that must not change meanwhile."""
        if self._listing_now[record.id].locked() and not listing:
            raise PeerError(f"{record.root}: is being listed here just now")

    async def _bring(
        self, editions: Editions, node: Node, edition: Edition, record: DatasetRecord, tally: Tally, _: Urgency
    ) -> _Brought:
        here, wanted = self._brought.get(record.id), (edition.snapshot, edition.keys, _follows(record))
        if here is None or (here.snapshot, here.keys, here.follows) != wanted or not here.is_there():
            self._forget_brought(record.id)
            last_id = await editions.bring(node, edition, record, datasets.last_inode(self._home, record), tally)
            file = arrived(self._home, record.id, edition.snapshot)
            here = self._brought[record.id] = _Brought(edition.snapshot, edition.keys, last_id, _follows(record), file)
        return here

    def _forget_brought(self, dataset: str) -> None:
        brought = self._brought.pop(dataset, None)
        if brought is not None and brought.file is not None:
            brought.file.unlink(missing_ok=True)

    # --- from the origin ---

    async def _listed(self, attachment: Attachment, refresh: bool, tally: Tally) -> Made:
        return await self._listing.join(attachment.dataset, lambda _: self._list(attachment, refresh, tally))

    async def _list(self, attachment: Attachment, refresh: bool, tally: Tally) -> Made:
        async with self._listing_now[attachment.dataset]:
            return await self._list_alone(attachment, refresh, tally)

    async def _list_alone(self, attachment: Attachment, refresh: bool, tally: Tally) -> Made:
        record, editions = self._record(attachment), self._room.editions
        usable = self._usable(record, say=True)
        if usable and not refresh:
            return Made(record, False)
        newest = record.edition
        if editions is not None:
            known = await editions.newest(record)
            if known is not None and not refresh:
                try:
                    return await self._take(editions, known.node, known.edition, record, tally, listing=True)
                except (PeerError, CacheError) as error:
                    log.warning("%s: a catalog that %s has did not come: %s", record.root, known.node.name, error)
            newest = max(newest, known.edition.number if known is not None else 0)
        number = _number_after(newest)
        made = await self._build(attachment, record, tally)
        return await self._served(record, made, number, tally, everywhere=refresh)

    async def _served(self, record: DatasetRecord, made: Path, number: int, tally: Tally, *, everywhere: bool) -> Made:
        """Let the finished catalog `made` be the dataset's, here, and in the whole cluster if that is to follow."""
        with Catalog.open(made) as catalog:
            snapshot, last_id = catalog.summary.snapshot, catalog.summary.last_id
        hold.put(made, made.with_name(f"{snapshot}.sqlite"))
        editions = self._room.editions
        if editions is None or not everywhere:
            switched = self._switched(record, snapshot, last_id, number)
            await self._noted()
            return switched
        edition = await self._edition(replace(record, snapshot=snapshot, catalog=f"{snapshot}.sqlite", edition=number))
        ready, behind = await editions.hand_out(record, edition, tally)
        switched = self._switched(record, snapshot, last_id, number)
        behind += await editions.switch(record, edition, ready)
        await self._noted()
        return Made(switched.record, switched.changed, behind, len(behind))

    async def _build(self, attachment: Attachment, record: DatasetRecord, tally: Tally) -> Path:
        """List into a catalog, which is not in place yet."""
        from cachefs.catalog import listing

        folder = self._home / "catalogs" / record.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        previous = self._open(record)
        tally.what, tally.total = "objects listed", 0

        def progress(objects: int, count: int) -> None:
            tally.done, tally.bytes = objects, count

        try:
            await attachment.origin.check(record.root)  # a wrong address or key is said at once, not after retries
            catalog = await listing.build(
                attachment.origin,
                record.root,
                folder / "new.sqlite",
                previous=previous,
                last_id=datasets.last_inode(self._home, record) if previous is None else record.last_id,
                progress=progress,
                # A refresh was asked for because something changed just now: what an interrupted one listed before
                # that must not be taken for it.
                resume=previous is None,
            )
        finally:
            if previous is not None:
                previous.close()
        catalog.close()
        return catalog.file

    # --- from a command ---

    async def take(self, attachment: Attachment, file: str, follows: tuple[str, int], tally: Tally) -> Made:
        """Go over to the catalog `file`, which a command has made here; in a cluster all others do, as after a refresh.

        follows: snapshot ("" = it had no catalog) and last inode number of the dataset when it was begun. Raises
        ConfigError when these are others by now: what was added meanwhile may have the numbers that this catalog gives.
        """
        if "/" in file or not file.endswith(".sqlite"):
            raise ConfigError(f"{file}: is no name of a catalog")
        async with self._listing_now[attachment.dataset]:
            record = self._record(attachment)
            made = self._home / "catalogs" / record.id / file
            with Catalog.open(made) as catalog:
                summary = catalog.summary
            if (summary.identity, summary.root) != (record.identity, record.root):
                raise ConfigError(f"{file}: is a catalog of another dataset than {record.root}")
            if (record.snapshot if record.catalog else "", record.last_id) == follows:
                taken = await self._taken(record, made, tally)
            elif (record.snapshot, record.last_id) == (summary.snapshot, max(summary.last_id, follows[1])):
                # Asked again: the fetcher that took it died before it answered.
                taken = Made(record, record.snapshot != follows[0])
            else:
                raise ConfigError(f"{record.root}: was listed by somebody else meanwhile; run it again")
            made.unlink(missing_ok=True)
            return taken

    async def _taken(self, record: DatasetRecord, made: Path, tally: Tally) -> Made:
        """The file keeps its name until all is done, for whoever has to begin again."""
        editions = self._room.editions
        known = None if editions is None else await editions.newest(record)
        number = _number_after(max(record.edition, known.edition.number if known is not None else 0))
        ours = made.with_name("taken.sqlite")
        ours.unlink(missing_ok=True)
        os.link(made, ours)
        try:
            return await self._served(record, ours, number, tally, everywhere=True)
        finally:
            ours.unlink(missing_ok=True)  # rename(2) leaves it where both names are of one file already

    # --- the switch ---

    def _switched(
        self, known: DatasetRecord, snapshot: str, last_id: int, number: int, file: Path | None = None
    ) -> Made:
        """Let the dataset's record name this catalog, unless it names it by now, or a newer one. file: None = it is in
        place."""
        before = datasets.load(self._home, known.identity, known.root) or known
        if self._usable(before) and (number, snapshot) <= _order(before):
            return Made(before, False)
        if file is not None:
            hold.put(file, file.with_name(f"{snapshot}.sqlite"))
        record = datasets.update(
            self._home,
            known,
            snapshot=snapshot,
            catalog=f"{snapshot}.sqlite",
            last_id=max(last_id, before.last_id),
            edition=number,
        )
        self._forget_brought(record.id)
        old = datasets.catalog_file(self._home, before)
        if old is not None and before.snapshot != snapshot:
            self._note(record, old)
        if before.snapshot == snapshot:
            self._room.attachments.sealed(record)
        hold.forget_old(self._home / "catalogs" / record.id, current=record.catalog)
        return Made(record, before.snapshot != snapshot)

    def _note(self, record: DatasetRecord, old: Path) -> None:
        """Write down what the new catalog replaces. It reads both, which takes long: nobody else need wait for it."""
        held = hold.hold(old)

        def note() -> None:
            new = datasets.catalog_file(self._home, record)
            assert new is not None
            try:
                with Catalog.open(old) as before, Catalog.open(new) as after:
                    superseded.note(self._home, record, before, after)
            except (CatalogError, OSError) as error:
                log.warning("what %s replaces is not known: %s", new, error)
            finally:
                if held is not None:
                    held.release()

        task = asyncio.create_task(asyncio.to_thread(note))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def _noted(self) -> None:
        """Wait for that: whoever refreshed and then needs room shall find what was replaced."""
        await asyncio.gather(*(asyncio.shield(task) for task in self._noting))

    # --- what is here ---

    def _record(self, attachment: Attachment) -> DatasetRecord:
        return datasets.load(self._home, attachment.identity, attachment.record.root) or attachment.record

    async def _edition(self, record: DatasetRecord) -> Edition:
        """The record's catalog as other nodes are told of it. Raises CacheError."""
        from cachefs.cluster.peers.catalogs import edition_of

        file = datasets.catalog_file(self._home, record)
        assert file is not None
        return await asyncio.to_thread(edition_of, record.edition, record.snapshot, file)

    async def _keys(self, record: DatasetRecord) -> int:
        """Of how many files the record's catalog has the content key."""
        from cachefs.cluster.peers.catalogs import keys_in

        file = datasets.catalog_file(self._home, record)
        return 0 if file is None else await asyncio.to_thread(keys_in, file)

    def _usable(self, record: DatasetRecord, *, say: bool = False) -> bool:
        catalog = self._open(record, say=say)
        if catalog is not None:
            catalog.close()
        return catalog is not None

    def _open(self, record: DatasetRecord, *, say: bool = False) -> Catalog | None:
        """say: when it cannot be used; whoever then has the dataset listed says so, once."""
        file = datasets.catalog_file(self._home, record)
        if file is None:
            return None
        try:
            return Catalog.open(file)
        except (CatalogError, OSError) as error:
            if say:
                log.warning("%s: cannot be used (%s); the dataset is listed again", file, error)
            return None


def _order(record: DatasetRecord) -> tuple[int, str]:
    """As editions are compared (peers/catalogs)."""
    return record.edition, record.snapshot


def _follows(record: DatasetRecord) -> tuple[str, int]:
    """What a catalog's inode numbers agree with that is brought while this is the dataset's record."""
    return record.snapshot, record.last_id


def _number_after(newest: int) -> int:
    """Of an edition that is newer than this one. Not the clock alone: a node whose clock is behind must not make what
    passes for older."""
    return max(newest + 1, time.time_ns() // 1000)

"""What peers hear of this node's catalogs, and the blocks of their files.

What a peer asks for may take hours, so it is begun here, by the fetcher, and each question is answered with how far it
is (`peers/catalogs`). Work that nobody has asked about for a while is cancelled; what a listing found is kept for the
next one. Only datasets that this server was told to share are spoken of.

It also looks, now and then, whether the cluster has gone over to another catalog than this node (`follow`): who missed
it when it was told comes to it so. And whichever way that changes, the mounts of this node go along.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cachefs import datasets
from cachefs.client.aio import AsyncConnection
from cachefs.cluster.peers.catalogs import (
    FAILED,
    HAS,
    MOST_BEHIND,
    NONE,
    WORKS,
    Ask,
    Block,
    Edition,
    Renew,
    State,
    Take,
    cut,
    edition_of,
    packed,
    word_of,
)
from cachefs.cluster.peers.server.asking import Asking
from cachefs.cluster.peers.server.blobs import Piece
from cachefs.cluster.peers.wire import Item, Status
from cachefs.config import CacheConfig
from cachefs.datasets import DatasetRecord
from cachefs.errors import CacheFSError
from cachefs.messages import Adopt, Catalogued, Follow, MakeCatalog, Progress, Reply, Request

log = logging.getLogger("cachefs.peers")

# A question waits so long for the work to end, so that short work needs one question. Less than anybody's patience.
ANSWER_SECONDS = 1.0

# Work that nobody has asked about for so long is cancelled: whoever wanted it is gone, or has it from elsewhere.
ABANDONED_SECONDS = 60.0

# Who waits asks more often than this. What ended and was not asked for is older than it looks.
FRESH_SECONDS = 10.0

# Work under way for peers at once, and how many that ended are remembered: a lost answer is asked for again.
MOST_WORK = 16
MOST_ENDED = 256

# How often it is looked whether the cluster serves another catalog; soon at first, as members come to be known.
FOLLOW_SECONDS = 30.0
FIRST_FOLLOW_SECONDS = 1.0

# Told the id of a dataset and the file of the catalog that it has now, when other nodes or peers had it change; raises
# CacheFSError when a mount does not serve it.
Switched = Callable[[str, Path], Awaitable[None]]


class _Work:
    """Something that the fetcher does for peers. asked: when somebody last wanted to know."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.state = State(WORKS)
        self.asked = time.monotonic()
        self.task: asyncio.Task[State] | None = None

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()

    def seen(self, progress: Progress) -> None:
        self.state = State(WORKS, None, progress.done, progress.total, progress.bytes, progress.what[:40])


class _Offer(NamedTuple):
    """A file that was named to peers, as it was then."""

    edition: Edition
    inode: int
    mtime_ns: int

    def is_of(self, info: os.stat_result) -> bool:
        return (self.inode, self.mtime_ns) == (info.st_ino, info.st_mtime_ns)


Doing = Callable[[_Work], Coroutine[Any, Any, State]]


class Catalogs:
    """shared: ids of the datasets that peers may hear of. switched: see above.

    Used on one event loop, but for `find`.
    """

    def __init__(
        self, config: CacheConfig, shared: frozenset[str], asking: Asking, switched: Switched | None = None
    ) -> None:
        self._home = config.home
        self._shared = shared
        self._asking = asking
        self._switched = switched
        self._fetcher = AsyncConnection(config, None)
        self._work: dict[tuple[object, ...], _Work] = {}
        self._offers: dict[tuple[str, str], _Offer] = {}
        self._offering = asyncio.Lock()
        self._switching = asyncio.Lock()
        self._following: asyncio.Task[Any] | None = None

    # --- the file ---

    def find(self, index: int, item: Item) -> Piece | None:
        """The block that `item` asks for; None: this node has no such file (any more). For any thread."""
        word = word_of(item.word)
        if not isinstance(word, Block) or item.dataset not in self._shared or item.length < 0:
            return None
        try:
            file = self._home / "catalogs" / item.dataset / f"{word.snapshot}.sqlite"
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        info = os.fstat(fd)
        # Not only those that were named from here: the fetcher names a new one before it is the dataset's.
        offer = self._offers.get((item.dataset, word.snapshot))
        if offer is not None and offer.is_of(info) and offer.edition.key != word.key:
            os.close(fd)
            return None
        size = info.st_size
        offset = min(item.offset, size)
        return Piece(index, fd, offset, min(item.length, size - offset), offset, size)

    async def _offer(self, record: DatasetRecord) -> Edition | None:
        """The record's catalog with its key, which is found once; None when it cannot be read."""
        file = datasets.catalog_file(self._home, record)
        if file is None:
            return None
        async with self._offering:  # one at a time: each reads a whole file
            try:
                info = os.stat(file)
                known = self._offers.get((record.id, record.snapshot))
                if known is None or not known.is_of(info):
                    edition = await asyncio.to_thread(edition_of, record.edition, record.snapshot, file)
                    known = _Offer(edition, info.st_ino, info.st_mtime_ns)
            except OSError as error:
                log.warning("%s: cannot be read for peers: %s", file, error)
                return None
            for other in [each for each in self._offers if each[0] == record.id]:
                del self._offers[other]
            self._offers[record.id, record.snapshot] = known
        # It was refreshed perhaps, and nothing had changed.
        return msgspec.structs.replace(known.edition, number=record.edition)

    # --- words ---

    async def answer(self, index: int, item: Item) -> Piece | Status:
        """The state that answers the word of `item`. Raises PeerWrong."""
        word, dataset = word_of(item.word), item.dataset
        if dataset not in self._shared or isinstance(word, Block):
            return Status.MISSING
        match word:
            case Ask():
                # What finds the key of a large file may take long too.
                state = await self._worked(("has", dataset), lambda work: self._has(dataset))
                if state.is_ == NONE and word.make:
                    state = await self._worked(("make", dataset), lambda work: self._made(dataset, work, False))
            case Renew():
                renew = ("renew", dataset, word.ticket)
                state = await self._worked(renew, lambda work: self._made(dataset, work, True), keep=True)
            case Take():
                take = ("take", dataset, *word.edition.order, word.switch)
                state = await self._worked(take, lambda work: self._adopted(dataset, work, word))
        return _as_piece(index, packed(state))

    async def _worked(self, key: tuple[object, ...], doing: Doing, *, keep: bool = False) -> State:
        """How far the work `key` is, begun if need be. keep: how it ended is remembered, for who asks once more."""
        work = self._work.get(key)
        if work is not None and not keep and work.done and time.monotonic() - work.asked > FRESH_SECONDS:
            work = None  # who had it begun did not come for it, and things may be other by now
        if work is None:
            if sum(not each.done for each in self._work.values()) >= MOST_WORK:
                return State(FAILED, why="does too much for other nodes just now")
            work = self._work[key] = _Work(f"{key[0]} {key[1]}")
            work.task = asyncio.create_task(self._ended(work, doing(work)))
        assert work.task is not None
        work.asked = time.monotonic()
        await asyncio.wait((work.task,), timeout=ANSWER_SECONDS)
        if not work.task.done():
            return work.state
        if not keep and self._work.get(key) is work:
            del self._work[key]
        self._forget_ended()
        return work.task.result()

    async def _ended(self, work: _Work, doing: Coroutine[Any, Any, State]) -> State:
        """How it ends; it is cancelled when nobody wants to know any more."""
        task = asyncio.create_task(doing)
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=ABANDONED_SECONDS / 4)
                if not task.done() and time.monotonic() - work.asked > ABANDONED_SECONDS:
                    log.info("%s: nobody waits for it any more", work.what)
                    work.asked = 0.0
                    return State(FAILED, why="nobody asked for it for a while")
            return task.result()
        except (CacheFSError, OSError) as error:
            log.warning("%s: could not be done for a peer: %s", work.what, error)
            return State(FAILED, why=cut(str(error)))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _forget_ended(self) -> None:
        ended = [key for key, work in self._work.items() if work.done]
        for key in ended[: max(0, len(ended) - MOST_ENDED)]:
            del self._work[key]

    async def _has(self, dataset: str) -> State:
        record = datasets.load_by_id(self._home, dataset)
        edition = None if record is None else await self._offer(record)
        return State(NONE) if edition is None else State(HAS, edition)

    async def _made(self, dataset: str, work: _Work, refresh: bool) -> State:
        connection = await self._asking.connection(dataset)
        if connection is None:
            return State(NONE)
        made = await connection.work(
            lambda attachment, id: MakeCatalog(id=id, attachment=attachment, refresh=refresh), work.seen
        )
        if not isinstance(made, Catalogued):
            return State(NONE)
        behind, total = list(made.behind), made.behind_total
        if refresh:
            try:
                await self._tell(dataset)
            except CacheFSError as error:
                behind, total = [("the node that listed", cut(str(error))), *behind], total + 1
        state = await self._has(dataset)
        return State(state.is_, state.edition, behind=behind[:MOST_BEHIND], behind_total=total)

    async def _adopted(self, dataset: str, work: _Work, word: Take) -> State:
        edition = word.edition

        def request(_: int, id: int) -> Request:
            return Adopt(
                id=id,
                dataset=dataset,
                node=word.node,
                edition=edition.number,
                snapshot=edition.snapshot,
                size=edition.size,
                key=edition.key,
                switch=word.switch,
                keys=edition.keys,
            )

        done = await self._fetcher.work(request, work.seen)
        if not isinstance(done, Catalogued):
            return State(NONE)
        if word.switch:
            await self._tell(dataset)
        # Of the catalog that is here now: whoever told of an older one learns it so.
        return State(HAS, Edition(done.edition, done.snapshot, edition.size, edition.key, edition.keys))

    # --- what is here ---

    async def _tell(self, dataset: str) -> None:
        """Have the mounts go along with what is here by now. (Not with what somebody saw here: that may be older.)"""
        if self._switched is None:
            return
        async with self._switching:
            record = datasets.load_by_id(self._home, dataset)
            file = None if record is None else datasets.catalog_file(self._home, record)
            if file is not None:
                await self._switched(dataset, file)

    def follow(self) -> None:
        """From now on, look now and then whether the cluster serves another catalog."""
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        pause = FIRST_FOLLOW_SECONDS
        while True:
            for dataset in sorted(self._shared):
                try:
                    now = await self._look(dataset)
                    if isinstance(now, Catalogued):
                        await self._tell(dataset)
                except (CacheFSError, OSError) as error:
                    log.warning("the catalog of this node may be behind the cluster's: %s", error)
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads, hides nothing
            pause = min(FOLLOW_SECONDS, 2 * pause)

    async def _look(self, dataset: str) -> Reply:
        return await self._fetcher.work(lambda _, id: Follow(id=id, dataset=dataset), lambda progress: None)

    async def close(self) -> None:
        tasks = [work.task for work in self._work.values() if work.task is not None]
        tasks += [self._following] if self._following is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetcher.close()


def _as_piece(index: int, data: bytes) -> Piece:
    fd = os.memfd_create("cachefs-state", os.MFD_CLOEXEC)
    os.write(fd, data)
    return Piece(index, fd, 0, len(data), 0, len(data))

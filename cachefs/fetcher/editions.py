"""Which catalog of a dataset the cluster has: asked of other nodes, and told to them. One node lists for all.

Who it is, every node finds out by itself (`cluster/placement`); one that is gone or slow to answer is passed over for
the next in the order, and whoever finds nobody lists by itself. A split view costs listings, and the newest edition is
the one that all come to.

A new edition goes out in two steps. First all nodes bring its file, in their own time, as long as they get on. When
each has it, or has shown that it will not, all are told to serve it: that is a small message, so they switch within the
time of one question. There is no vote: a node that was not reached goes on with the catalog that it has, is named to
whoever asked for the refresh, and follows when it looks the next time (`peers/server/catalogs`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from cachefs.cluster.membership import Members
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.catalogs import (
    FAILED,
    WORKS,
    Ask,
    Edition,
    Renew,
    State,
    Take,
    Word,
    packed,
    state_of,
)
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.wire import Item
from cachefs.cluster.placement import Placement, catalog_key
from cachefs.cluster.settling import View
from cachefs.datasets import DatasetRecord
from cachefs.digest import KEY_BYTES
from cachefs.errors import PeerError, PeerHasNot, PeerRefused, PeerTimeout, PeerWrong
from cachefs.fetcher.arriving import bring
from cachefs.fetcher.tally import Tally

log = logging.getLogger("cachefs.fetcher")

# Of the nodes in a catalog's order so many are asked to list; with these gone, the origin is nearer.
MOST_CANDIDATES = 3

# A question is answered within a second or so, whatever is under way.
ANSWER_SECONDS = 10.0

# A node that has answered before may be silent for so long: its process may be replaced meanwhile.
GRACE_SECONDS = 3.0

# Between questions, whatever the other side does: it waits by itself while work is under way.
PAUSE_SECONDS = 0.1

# A node that lists, and does not get on for so long, is passed over. Writing a catalog of 10^7 names shows nothing for
# minutes.
LISTING_STALL_SECONDS = 600.0

# The same for one that brings a catalog: whoever waits for a refresh waits for it.
BRINGING_STALL_SECONDS = 60.0

# And for one that only says what it has.
SAYING_STALL_SECONDS = 20.0

# Nodes told at once.
TOLD_AT_ONCE = 32

T = TypeVar("T")

Behind = list[tuple[str, str]]


class Found(NamedTuple):
    """An edition and a node that has it. behind: as State has it."""

    node: Node
    edition: Edition
    behind: Behind
    behind_total: int = 0


class Editions:
    """Belongs to the fetcher's loop. see: told of each new view of the members."""

    def __init__(self, home: Path, members: Members, peers: Peers) -> None:
        self._home = home
        self._members = members
        self._peers = peers
        self.see(members.view)

    def see(self, view: View) -> None:
        self._placement = Placement(view)
        self._others = sorted(node for node in view if node.name != self._members.me.name)

    # --- who has it ---

    async def found(self, record: DatasetRecord, refresh: bool, tally: Tally) -> Found | None:
        """The edition that the node whose turn it is has, or makes now; None: it is this node's turn to list.

        refresh: one that is listed from now on.
        """
        word = Renew(secrets.token_bytes(KEY_BYTES)) if refresh else Ask(make=True)
        for node in self._before_us(record):
            try:
                state = await self._ended(node, record.id, word, tally, LISTING_STALL_SECONDS)
            except PeerError as error:
                log.warning("%s: is not asked for its catalog: %s", record.root, error)
                continue
            if state.edition is not None:
                return Found(node, state.edition, self._without_us(state.behind), state.behind_total)
            if state.is_ == FAILED:
                log.warning("%s: could not be listed by %s: %s", record.root, node.name, state.why)
                return None
        return None

    def _before_us(self, record: DatasetRecord) -> list[Node]:
        """Those in the dataset's order before this node, but for those that are left alone."""
        nodes = []
        for node in self._placement.ranking(catalog_key(record.identity, record.root), MOST_CANDIDATES):
            if node.name == self._members.me.name:
                break
            if not self._peers.why_not(node):
                nodes.append(node)
        return nodes

    def _without_us(self, behind: Behind) -> Behind:
        """What is here, whoever asked here finds out in a moment."""
        return [(name, why) for name, why in behind if name != self._members.me.name]

    async def newest(self, record: DatasetRecord) -> Found | None:
        """The newest edition that any other node has; None: none has any."""

        async def one(node: Node) -> Found | None:
            try:
                state = await self._ended(node, record.id, Ask(), Tally(""), SAYING_STALL_SECONDS)
            except PeerError:
                return None
            return None if state.edition is None else Found(node, state.edition, [])

        found = [each for each in await self._each(self._others, one) if each is not None]
        return max(found, key=lambda each: each.edition.order, default=None)

    async def served(self, record: DatasetRecord) -> Found | None:
        """What the cluster serves: the node whose turn it is says so, and if that is this one, all others are asked.

        None: no other node has any.
        """
        for node in self._before_us(record):
            try:
                state = await self._ended(node, record.id, Ask(), Tally(""), SAYING_STALL_SECONDS)
            except PeerError as error:
                log.info("%s: cannot say which catalog it has: %s", node.name, error)
                continue
            return None if state.edition is None else Found(node, state.edition, [])
        return await self.newest(record)

    def node(self, name: str) -> Node:
        """Raises PeerError when this node knows no such other one."""
        for node in self._others:
            if node.name == name:
                return node
        raise PeerError(f"{name}: is no other node of the cluster as it is seen here")

    async def bring(self, node: Node, edition: Edition, record: DatasetRecord, last_id: int, tally: Tally) -> int:
        """See `arriving.bring`."""
        return await bring(self._peers, node, edition, record, self._home, last_id, tally)

    # --- telling ---

    async def hand_out(self, record: DatasetRecord, edition: Edition, tally: Tally) -> tuple[list[Node], Behind]:
        """Have all others bring this edition, which is in place here: (who has it by now, who has not and why)."""
        tally.what, tally.done, tally.total, tally.bytes = "nodes have it", 0, len(self._others), 0

        async def one(node: Node) -> tuple[Node, str]:
            why = await self._told(node, record, edition, switch=False)
            tally.done += 1
            return node, why

        answers = await self._each(self._others, one)
        ready = [node for node, why in answers if not why]
        return ready, [(node.name, why) for node, why in answers if why]

    async def switch(self, record: DatasetRecord, edition: Edition, ready: list[Node]) -> Behind:
        """Have these serve it; who does not, and why."""

        async def one(node: Node) -> tuple[str, str]:
            return node.name, await self._told(node, record, edition, switch=True)

        return [(name, why) for name, why in await self._each(ready, one) if why]

    async def _told(self, node: Node, record: DatasetRecord, edition: Edition, *, switch: bool) -> str:
        """Why the node does not have it, or serve it; "" = it does, or needs none, or has a newer one."""
        word = Take(self._members.me.name, edition, switch)
        try:
            state = await self._ended(node, record.id, word, Tally(""), BRINGING_STALL_SECONDS)
        except PeerHasNot:
            return ""  # that node does not share this dataset
        except PeerError as error:
            return error.message
        return state.why or "failed" if state.is_ == FAILED else ""

    # --- asking ---

    async def _each(self, nodes: Iterable[Node], work: Callable[[Node], Awaitable[T]]) -> list[T]:
        turns = asyncio.Semaphore(TOLD_AT_ONCE)

        async def one(node: Node) -> T:
            async with turns:
                return await work(node)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(node)) for node in nodes]
        return [task.result() for task in tasks]

    async def _ended(self, node: Node, dataset: str, word: Word, tally: Tally, stall: float) -> State:
        """What came of it: asked again and again while the node works on it and gets on. Raises PeerError."""
        clock = asyncio.get_running_loop().time
        answered, progress, moved = 0.0, None, clock()
        while True:
            try:
                state = await self._say(node, dataset, word)
                answered = clock()
            except (PeerHasNot, PeerWrong, PeerRefused):
                raise
            except PeerError:
                if clock() - answered > GRACE_SECONDS:
                    raise
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if state.is_ != WORKS:
                return state
            if state.progress != progress:
                progress, moved = state.progress, clock()
                tally.done, tally.total, tally.bytes, tally.what = state.progress
            elif clock() - moved > stall:
                raise PeerTimeout(f"{node.name}: has not got on for {stall:g} s")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _say(self, node: Node, dataset: str, word: Word) -> State:
        item = Item(dataset, word=packed(word))
        piece = await self._peers.get(node, item, fetch=True, deadline=ANSWER_SECONDS)
        try:
            return state_of(piece.data)
        except PeerWrong as error:
            self._peers.wrong(node, error.message)
            raise

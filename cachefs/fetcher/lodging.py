"""What an owner has no room for, with a node that has: who keeps what for whom, and how it gets there.

Hashing gives nodes unequal shares, so some are full where others are not. An owner that read an object from the origin
and cannot store it *offers* it to the next in the object's order that is not known to be full, and notes who took it.
At the next miss it asks that node, and the origin only if that has it no more. Whoever takes one in fetches it from the
owner as any object, digest and all: nobody writes into another node's cache. It counts on it from then on, as on what
it owns, for as long as the same node is the owner.

Of a large object each block is lodged by itself, and not only by name: an owner that has no room for a block, known
before it is fetched, asks such a node to fetch it, keep it and give it. So it comes from the origin once, and no node
needs room for all of it. A guest counts on all that it has of such an object.

Both sides have it in the index, so that a restart changes nothing. An owner that lost its index reads from the origin
what others keep for it, and offers it anew; a keeper that lost its own takes what it has for copies, which may give
way, and then the owner misses one. Either costs reads, no error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.wire import Item, Status
from cachefs.cluster.placement import Placement
from cachefs.errors import PeerError
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.index import Index

log = logging.getLogger("cachefs.fetcher")

# Some 150 bytes each. Shares differ by the square root of what a node has: a few thousand of millions.
MOST_GUESTS = 65536

# Offered at once, and waiting to be: what is offered has to be still in memory when it is fetched (transit.KEEP_LEAST).
MOST_TOGETHER = 64
MOST_WAITING = 256
MOST_WAITING_BYTES = 8 * 1024 * 1024

# A node that was full is asked again after so long, with one object.
CLOSED_SECONDS = 30.0


# Asked for one block: each hop costs its reader time.
MOST_KEEPERS_ASKED = 3


def block_key(object_key: bytes, block: int) -> bytes:
    """As the key of an object, of a block of a large one."""
    return object_key + block.to_bytes(8, "little")


@dataclass
class _Offer:
    """tried: names of nodes that could not take this one."""

    item: Item
    tried: set[str] = field(default_factory=set)


class Lodging:
    """Of this node, while it is in a cluster. Belongs to the fetcher's loop; `close` it.

    Keys are those of placement: one for each version of an object; what others keep of large ones has a `block_key`.
    """

    def __init__(self, peers: Peers, index: Index, counters: Counters) -> None:
        self._peers = peers
        self._index = index
        self._counters = counters
        self._placement: Placement
        self._others: dict[str, Node] = {}
        self._guests: OrderedDict[bytes, str] = OrderedDict()  # with the name of their owner
        self._offers: dict[bytes, _Offer] = {}
        self._waiting_bytes = 0
        # (node, dataset, whether blocks): full until when. Where a block finds no room, many small objects may.
        self._closed: dict[tuple[str, str, bool], float] = {}
        self._working: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self._index.flush()
        known = await asyncio.to_thread(lambda: list(islice(self._index.guests(), MOST_GUESTS)))
        self._guests = OrderedDict(known) | self._guests

    def see(self, placement: Placement, me: Node) -> None:
        """Who is there now."""
        self._placement = placement
        self._others = {node.name: node for node in placement.nodes if node.name != me.name}
        self._closed = {house: until for house, until in self._closed.items() if house[0] in self._others}

    async def close(self) -> None:
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    # --- what others keep for this node ---

    def keeper(self, key: bytes) -> Node | None:
        """The node that took it, while it is in the cluster."""
        name = self._index.lodged_with(key)
        return self._others.get(name) if name else None

    def forget(self, key: bytes) -> None:
        """Its keeper does not have it any more."""
        self._index.lodge(key, None)

    def offer(self, key: bytes, item: Item) -> None:
        """This node owns it, has it in memory now, and no room for it. Returns at once."""
        if key in self._offers or len(self._offers) >= MOST_WAITING:
            return
        if self._offers and self._waiting_bytes + item.size > MOST_WAITING_BYTES:
            return
        if not any(self._is_open(node, item.dataset) for node in self._others.values()):
            return
        self._offers[key] = _Offer(item)
        self._waiting_bytes += item.size
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())

    def _is_open(self, node: Node, dataset: str, *, blocks: bool = False) -> bool:
        return self._closed.get((node.name, dataset, blocks), 0.0) <= time.monotonic() and not self._peers.why_not(node)

    async def _work(self) -> None:
        try:
            while self._offers:
                houses: dict[tuple[Node, str], list[bytes]] = {}
                for key, offer in list(islice(self._offers.items(), MOST_TOGETHER)):
                    if (node := self._next_house(key, offer)) is None:
                        self._done(key)
                    else:
                        houses.setdefault((node, offer.item.dataset), []).append(key)
                await asyncio.gather(*(self._ask(*house, keys) for house, keys in houses.items()))
        except Exception:  # a defect here must not be silent, and costs only what lodging saves
            log.exception("offering objects to other nodes")
            self._offers.clear()
            self._waiting_bytes = 0

    def _next_house(self, key: bytes, offer: _Offer) -> Node | None:
        ranking = self._placement.ranking(key, len(self._placement.nodes))
        return next(
            (
                node
                for node in ranking
                if node.name in self._others
                and node.name not in offer.tried
                and self._is_open(node, offer.item.dataset)
            ),
            None,
        )

    async def _ask(self, node: Node, dataset: str, keys: list[bytes]) -> None:
        house = node.name, dataset, False
        if house in self._closed:  # it was full when it was asked last
            keys = keys[:1]
        offers = [self._offers[key] for key in keys]
        try:
            answers = await self._peers.offer(node, [offer.item for offer in offers])
        except (PeerError, OSError) as error:
            log.info("%s: could not be asked to keep %d objects: %s", node.name, len(keys), error)
            answers = {}
        if Status.REFUSED in answers.values():
            self._closed[house] = time.monotonic() + CLOSED_SECONDS
        elif Status.KEPT in answers.values():
            self._closed.pop(house, None)
        for number, (key, offer) in enumerate(zip(keys, offers, strict=True)):
            offer.tried.add(node.name)
            if answers.get(number) is Status.KEPT:
                self._index.lodge(key, node.name)
                self._counters.lodged += 1
                self._done(key)

    def _done(self, key: bytes) -> None:
        self._waiting_bytes -= self._offers.pop(key).item.size

    def block_keepers(self, object_key: bytes, block: int, dataset: str) -> list[Node]:
        """Who is to be asked for a block that has no room here: the node that keeps it, if one does; else the next in
        the order of its object that are not known to be full."""
        keeper = self.keeper(block_key(object_key, block))
        if keeper is not None:  # while it cannot be asked, nobody else takes the block in: it would be kept twice
            return [] if self._peers.why_not(keeper) else [keeper]
        ranking = self._placement.ranking(object_key, len(self._placement.nodes))
        open_ones = (
            node for node in ranking if node.name in self._others and self._is_open(node, dataset, blocks=True)
        )
        return list(islice(open_ones, MOST_KEEPERS_ASKED))

    def asks(self, key: bytes, node: Node) -> bool:
        """The node is asked to keep a block: noted at once. When its answer is not waited for any more, it may keep it
        all the same, and is asked first the next time. False: it was noted before."""
        if self._index.lodged_with(key) == node.name:
            return False
        self._index.lodge(key, node.name)
        return True

    def keeps(self, key: bytes, node: Node, dataset: str, *, new: bool) -> None:
        """It said so: it took it in, or had."""
        self.asks(key, node)  # again: another one may have been asked meanwhile
        self._closed.pop((node.name, dataset, True), None)
        self._counters.lodged += new

    def refuses(self, key: bytes, node: Node, dataset: str) -> None:
        """It has no room, or does not know the dataset."""
        self._closed[node.name, dataset, True] = time.monotonic() + CLOSED_SECONDS
        if self._index.lodged_with(key) == node.name:
            self.forget(key)

    # --- what this node keeps for others ---

    def is_guest(self, key: bytes, owner: str) -> bool:
        """Whether this node counts on it for `owner`. Not any more when another node has come to own it."""
        return self._guests.get(key) == owner

    def take_in(self, key: bytes, owner: str) -> None:
        if self._guests.get(key) != owner:  # each block of a large object comes by here
            self._index.host(key, owner)
        self._guests[key] = owner
        self._guests.move_to_end(key)
        if len(self._guests) > MOST_GUESTS:
            self.turn_away(next(iter(self._guests)))

    def turn_away(self, key: bytes) -> None:
        """What this node has of it is a copy from now on."""
        if self._guests.pop(key, None) is not None:
            self._index.host(key, None)

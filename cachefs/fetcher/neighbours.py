"""Missing bytes from the other nodes of the cluster: the owner of an object reads it from the origin, once for all.

Who owns it, every node finds out by itself (cluster/placement). Whoever misses it asks the owner; the owner asks the
origin, joining the flight that may be under way, and never a third node. An owner that fails, is slow, or is left alone
for a while is overtaken: by the next in the object's order, and by the origin. A split view costs reads, nothing else.
A node that cannot reach the origin itself asks the next in the order, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from cachefs.budget import Urgency
from cachefs.cluster.membership import Members
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.client import DEADLINE_SECONDS, Peers
from cachefs.cluster.peers.link import PREFETCH_PATIENCE
from cachefs.cluster.peers.race import first
from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.peers.wire import Item
from cachefs.cluster.placement import Placement, object_key
from cachefs.cluster.settling import View
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import (
    IsADirectory,
    ObjectNotFound,
    OriginError,
    PeerBusy,
    PeerError,
    PeerHasNot,
    PeerTimeout,
    StaleObject,
)
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.lanes import BACKGROUND
from cachefs.fetcher.lodging import Lodging, block_key
from cachefs.fetcher.sources import Data, FromOrigin, Usual
from cachefs.messages import Entry, Need

T = TypeVar("T")

# Of the nodes in an object's order so many are looked at: with the owner and its successor gone, the origin is nearer.
MOST_CANDIDATES = 3

# What a block takes, as long as none has come: 8 MiB from an origin that many share.
UNKNOWN_BLOCK_SECONDS = 2.0


class FromCluster:
    """A Source. see: told of each new view of the members."""

    def __init__(
        self, origin: FromOrigin, members: Members, peers: Peers, lodging: Lodging, counters: Counters
    ) -> None:
        self._origin = origin
        self._members = members
        self._peers = peers
        self._lodging = lodging
        self._counters = counters
        self._usual_block = Usual(UNKNOWN_BLOCK_SECONDS)  # from its owner
        self.see(members.view)

    def see(self, view: View) -> None:
        self._placement = Placement(view)
        self._peers.keep(view)
        self._lodging.see(self._placement, self._members.me)

    def owner(self, identity: str, path: str, version: str) -> Node | None:
        """Who is to be asked for this version of an object; None: it is this node's to read from the origin."""
        key = object_key(identity, path, version)
        owner = self._placement.owner(key)
        if owner.name == self._members.me.name:
            return None
        if not self._peers.why_not(owner):
            return owner
        for node in self._placement.ranking(key, MOST_CANDIDATES)[1:]:
            if node.name == self._members.me.name:
                return None
            if not self._peers.why_not(node):
                return node
        return None

    def counts_on_us(self, identity: str, path: str, version: str, block: int | None = None) -> bool:
        key = object_key(identity, path, version)
        if self.owner(identity, path, version) is None:
            return self._lodging.keeper(key if block is None else block_key(key, block)) is None
        # What this node keeps for another comes by `take_in`, whatever its own readers miss.
        return block is None and self._lodging.is_guest(key, self._placement.owner(key).name)

    @property
    def owners(self) -> object:
        return self._placement

    def offer(self, attachment: Attachment, entry: Entry) -> None:
        key = object_key(attachment.identity, entry.path, entry.version)
        if self._placement.owner(key).name == self._members.me.name:
            self._lodging.offer(key, Item(attachment.dataset, entry.path, entry.version, entry.size))

    def take_in(self, attachment: Attachment, path: str, version: str) -> bool:
        """From now on an object that its owner has no room for counts on this node. False: this one is the owner."""
        key = object_key(attachment.identity, path, version)
        owner = self._placement.owner(key).name
        if owner == self._members.me.name:
            return False
        self._lodging.take_in(key, owner)
        return True

    def turn_away(self, attachment: Attachment, path: str, version: str) -> None:
        """It does not any more."""
        self._lodging.turn_away(object_key(attachment.identity, path, version))

    async def from_owner(self, attachment: Attachment, path: str, version: str, size: int) -> Data:
        """Raises PeerError."""
        owner = self._placement.owner(object_key(attachment.identity, path, version))
        item = Item(attachment.dataset, path, version, size)
        try:
            # Room is set aside here meanwhile: an owner that has too much to do must not hold that for ever.
            async with asyncio.timeout(DEADLINE_SECONDS):
                return (await self._peer(owner, item, Urgency(BACKGROUND))).data
        except PeerTimeout:
            raise
        except TimeoutError:
            raise PeerTimeout(f"{owner.name}: had no time for what it lodges here", path=path) from None

    async def whole(
        self, attachment: Attachment, request: Need, version: str, urgency: Urgency
    ) -> tuple[Entry, Data | None]:
        item = Item(attachment.dataset, request.path, version, request.size)

        async def from_origin() -> tuple[Entry, Data | None]:
            return await self._origin.whole(attachment, request, version, urgency)

        async def from_node(node: Node, *, fetch: bool = True) -> tuple[Entry, Data | None]:
            piece = await self._peer(node, item, urgency, fetch=fetch)
            return Entry(request.path, piece.size, 0, version), None if piece.large else piece.data

        owner = self._asked(attachment, request.path, version)
        key = object_key(attachment.identity, request.path, version)
        missing: Callable[[], Awaitable[tuple[Entry, Data | None]]] = from_origin
        if owner is not None:
            self._lodging.turn_away(key)  # whatever this node kept for its owner, it has not any more
        elif version:
            missing = self._from_keeper(key, from_node, from_origin, urgency)
        seconds = self._origin.usual.seconds
        return await self._somewhere(attachment, item, owner, from_node, missing, seconds, urgency)

    async def block(
        self, attachment: Attachment, entry: Entry, start: int, stop: int, urgency: Urgency, *, lodge: bool = False
    ) -> Data:
        item = Item(attachment.dataset, entry.path, entry.version, entry.size, start, stop - start)

        async def from_origin() -> Data:
            return await self._origin.block(attachment, entry, start, stop, urgency)

        async def from_node(node: Node, *, keep: bool = False) -> Data:
            began = time.monotonic()
            wanted = msgspec.structs.replace(item, keep=True) if keep else item
            piece = await self._peer(node, wanted, urgency)
            if len(piece.data) != stop - start:
                raise PeerHasNot(f"{node.name}: gave a part of a block", path=entry.path)
            # The longest of late: they take longer as more of them are read ahead at once.
            took = time.monotonic() - began
            self._usual_block.took(took)
            self._usual_block.seconds = max(took, self._usual_block.seconds)
            return piece.data

        # A node may own few large objects, or none, and never learn from the origin how long a block takes.
        seconds = self._origin.usual_block.seconds or self._usual_block.seconds
        owner = self._asked(attachment, entry.path, entry.version)
        missing: Callable[[], Awaitable[Data]] = from_origin
        key = object_key(attachment.identity, entry.path, entry.version)
        if lodge and owner is None and self._placement.owner(key).name == self._members.me.name:
            number = start // BLOCK_SIZE
            for keeper in reversed(self._lodging.block_keepers(key, number, attachment.dataset)):
                missing = self._kept_by(keeper, block_key(key, number), item, from_node, missing, seconds, urgency)
        return await self._somewhere(attachment, item, owner, from_node, missing, seconds, urgency)

    def _kept_by(
        self,
        keeper: Node,
        key: bytes,
        item: Item,
        from_node: Callable[..., Awaitable[T]],
        further: Callable[[], Awaitable[T]],
        seconds: float,
        urgency: Urgency,
    ) -> Callable[[], Awaitable[T]]:
        """A block that this node owns and has no room for, from one that keeps it, or will; else by `further`."""

        async def kept() -> T:
            new = self._lodging.asks(key, keeper)
            try:
                came = await from_node(keeper, keep=True)
            except PeerHasNot as error:
                self._lodging.refuses(key, keeper, item.dataset)
                raise PeerError(str(error)) from None  # it may be full, and is none that cannot reach the origin
            except PeerError:
                if new:
                    self._lodging.forget(key)  # the next may keep it
                raise
            self._lodging.keeps(key, keeper, item.dataset, new=new)
            return came

        return lambda: self._first(keeper, kept, further, seconds, urgency)

    async def _somewhere(
        self,
        attachment: Attachment,
        item: Item,
        owner: Node | None,
        from_node: Callable[[Node], Awaitable[T]],
        from_origin: Callable[[], Awaitable[T]],
        seconds: float,
        urgency: Urgency,
    ) -> T:
        """From its owner; from the origin; and where this node cannot reach that, from one that can.

        owner: None where the origin is this node's to ask. seconds: what the origin usually takes.
        """
        try:
            if owner is None:
                return await from_origin()
            return await self._first(owner, lambda: from_node(owner), from_origin, seconds, urgency)
        except (ObjectNotFound, StaleObject, IsADirectory):
            raise  # it can be reached, and says so
        except OriginError:
            if attachment.direct or not item.version:
                raise
            # A clock that is off, a network that is cut on this side: for others the origin may be there.
            key = object_key(attachment.identity, item.path, item.version)
            for node in self._placement.ranking(key, MOST_CANDIDATES):
                if node not in (owner, self._members.me) and not self._peers.why_not(node):
                    with contextlib.suppress(PeerError):
                        return await from_node(node)
            raise

    def _asked(self, attachment: Attachment, path: str, version: str) -> Node | None:
        # Which version a snapshot without a catalog serves is between its reader and the origin: another node may have
        # seen an older one.
        return None if attachment.direct or not version else self.owner(attachment.identity, path, version)

    def _from_keeper(
        self,
        key: bytes,
        from_node: Callable[..., Awaitable[T]],
        from_origin: Callable[[], Awaitable[T]],
        urgency: Urgency,
    ) -> Callable[[], Awaitable[T]]:
        """The way to the origin, by the node that keeps for this one what it had no room for, if one does.

        That is asked for what it has stored, so it asks nobody else.
        """
        keeper = self._lodging.keeper(key)
        if keeper is None or self._peers.why_not(keeper):
            return from_origin

        async def kept() -> T:
            try:
                return await from_node(keeper, fetch=False)
            except PeerHasNot as error:
                self._lodging.forget(key)
                raise PeerError(str(error)) from None  # it may let go of it, and is none that cannot get it

        return lambda: self._first(keeper, kept, from_origin, self._origin.usual.seconds, urgency)

    async def _peer(self, owner: Node, item: Item, urgency: Urgency, *, fetch: bool = True) -> Piece:
        while True:
            unwaited = urgency.level > 0
            try:
                piece = await self._peers.get(owner, item, fetch=fetch, urgency=urgency)
                break
            except PeerError as error:
                # Who refuses what nobody waits for yet has it for whoever comes again, or waits: no reason to read it
                # from the origin once more.
                busy = self._peers.busy_for(owner) if unwaited and isinstance(error, PeerBusy) else 0.0
                if not busy:
                    self._counters.peer_failures += 1
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(busy):
                    await urgency.waited_for()
        self._counters.peer_reads += 1
        self._counters.peer_bytes += len(piece.data)
        return piece

    async def _first(
        self,
        owner: Node,
        from_owner: Callable[[], Awaitable[T]],
        from_origin: Callable[[], Awaitable[T]],
        seconds: float,
        urgency: Urgency,
    ) -> T:
        """From the owner, or from the origin if that takes too long. seconds: what the origin usually takes."""
        clock = asyncio.get_running_loop().time
        asked: float | None = None  # when the origin was, beside the owner
        answered = empty = False

        async def one() -> T:
            nonlocal answered, empty
            try:
                came = await from_owner()
            except PeerError as error:
                answered, empty = True, isinstance(error, PeerHasNot)
                raise
            if asked is not None:
                self._peers.hedged_in_vain(owner, clock() - asked, seconds)
            return came

        async def both() -> T:
            nonlocal asked
            asked = None if answered else clock()
            came = await from_origin()
            if empty:
                self._peers.gave_nothing(owner)
            elif asked is not None and not answered:
                self._peers.overtaken(owner, clock() - asked, seconds)
            return came

        after = self._peers.hedge(owner, seconds)
        patience = self._peers.caution(owner) * PREFETCH_PATIENCE
        return await first(one, both, after=after, urgency=urgency, patience=patience)

"""Ask other nodes for bytes: the face of this room for the fetcher.

    piece = await first(
        lambda: peers.get(owner, item, fetch=True), lambda: origin.get(...), after=peers.hedge(owner, usual)
    )

Whatever a peer does, the caller gets checked bytes, or a PeerError within its deadline, and asks the origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
from collections.abc import Iterable

from cachefs.budget import Urgency
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.health import Health, PeerState
from cachefs.cluster.peers.link import Link, Told
from cachefs.cluster.peers.offering import offer
from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.peers.trust import Trust
from cachefs.cluster.peers.wire import Item, Status

log = logging.getLogger("cachefs.peers")

# As long as a fetch through a slow origin takes; a reader goes to the origin itself long before (`hedge`).
DEADLINE_SECONDS = 30.0

# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (mallopt(3)), and what they are set to.
_MALLOPT = ((-1, 64 * 1024 * 1024), (-3, 32 * 1024 * 1024))


class Peers:
    """All peers of this node. told: called when one says what it can store. Used on one event loop."""

    def __init__(self, trust: Trust, told: Told = lambda name, capacity: None) -> None:
        _keep_freed_memory()
        self._trust = trust
        self._told = told
        self._links: dict[str, Link] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def get(
        self,
        node: Node,
        item: Item,
        *,
        fetch: bool = False,
        urgency: Urgency | None = None,
        deadline: float = DEADLINE_SECONDS,
    ) -> Piece:
        """What `item` asks for, checked. fetch: the node fetches it from the origin if it does not have it.

        urgency: None = somebody waits for it. What nobody waits for goes behind, and moves up when it is lifted.

        Raises PeerHasNot when the node does not have it, PeerBusy at once when it is not to be asked now, other
        PeerErrors when it fails.
        """
        return await self._link(node).get(item, fetch=fetch, urgency=urgency, deadline=deadline)

    def wrong(self, node: Node, why: str) -> None:
        """What it gave was found wrong after it had come: it is left alone, as for wrong bytes."""
        log.error("%s: %s; it is left alone for a while", node.name, why)
        self._link(node).health.sent_wrong(why)

    async def offer(self, node: Node, items: list[Item], deadline: float = DEADLINE_SECONDS) -> dict[int, Status]:
        """Ask it to keep these for this node, which owns them: KEPT, REFUSED (it is full), or why not, for each by its
        number. It fetches what it keeps from here. Raises PeerError, OSError.
        """
        return await offer(self._link(node), items, deadline)

    async def greet(self, node: Node) -> int:
        """Bytes that it can store, as it says to whoever connects; 0: it does not say. Raises PeerError, OSError."""
        return await self._link(node).greet()

    def hedge(self, node: Node, usual: float) -> float:
        """Seconds after which the origin is worth asking, too. usual: what that takes; 0.0 = it is not known."""
        return self._link(node).health.hedge(usual)

    def caution(self, node: Node) -> float:
        """How many times as long as otherwise that is, because the origin was slow lately."""
        return self._link(node).health.caution

    def hedged_in_vain(self, node: Node, took: float, usual: float) -> None:
        """The origin was asked, too, and the node had it first; so long after, where `usual` is what that takes."""
        self._link(node).health.hedged_in_vain(took, usual)

    def overtaken(self, node: Node, took: float, usual: float) -> None:
        """The origin was asked, too, and was faster: within `took`."""
        self._link(node).health.overtaken(took, usual)

    def gave_nothing(self, node: Node) -> None:
        """It could not get from the origin what this node then got."""
        self._link(node).health.gave_nothing()

    def why_not(self, node: Node) -> str:
        """Why it is not to be asked now; "" = ask. May be called from any thread."""
        link = self._links.get(node.name)
        return "" if link is None else link.health.why_not()

    def busy_for(self, node: Node) -> float:
        """Seconds for which it does not want to be asked for what nobody waits for."""
        return self._link(node).health.busy_for(prefetch=True)

    def status(self) -> list[PeerState]:
        return [link.health.row() for _, link in sorted(self._links.items())]

    def keep(self, nodes: Iterable[Node]) -> None:
        """These are the members now: forget the others."""
        names = {node.name for node in nodes}
        for name in [name for name in self._links if name not in names]:
            self._drop(self._links.pop(name))

    async def close(self) -> None:
        for link in self._links.values():
            self._drop(link)
        self._links.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _link(self, node: Node) -> Link:
        link = self._links.get(node.name)
        if link is not None and (link.node.host, link.node.port) == (node.host, node.port):
            return link
        if link is not None:
            self._drop(link)  # it came back at another address, perhaps as another machine: nothing holds against it
        loop = asyncio.get_running_loop()
        link = self._links[node.name] = Link(node, self._trust, Health(node.name, loop.time), self._told)
        return link

    def _drop(self, link: Link) -> None:
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _keep_freed_memory() -> None:
    """Let the allocator use the memory of one object for the next.

    It gives freed memory back from 128 KiB on, and the kernel then clears each page of the next object before bytes are
    received into it: 110 us of CPU per 110 KB instead of 37.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for parameter, value in _MALLOPT:
            ctypes.CDLL(None).mallopt(parameter, value)

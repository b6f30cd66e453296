"""Ask a peer to keep what this node owns and has no room for. Nothing is sent but names: it fetches what it takes."""

from __future__ import annotations

import asyncio

from cachefs.cluster.peers.link import Link
from cachefs.cluster.peers.receiving import Answer, Piece, Unlike
from cachefs.cluster.peers.wire import Item, Request, Status, encode
from cachefs.errors import PeerBusy, PeerTimeout


async def offer(link: Link, items: list[Item], deadline: float) -> dict[int, Status]:
    """What it says to each, by its number. Raises PeerError, OSError.

    Says nothing of the peer's health: an offer may wait for as long as the peer is busy with others' reads.
    """
    try:
        async with asyncio.timeout(deadline):
            try:
                return await _exchange(link, items, deadline)
            except ConnectionError:  # one that was kept, and closed by the peer meanwhile: a new one tells
                return await _exchange(link, items, deadline)
    except TimeoutError:
        raise PeerTimeout(f"{link.node.name}: no answer to an offer in {deadline:g} s") from None


async def _exchange(link: Link, items: list[Item], deadline: float) -> dict[int, Status]:
    said: dict[int, Status] = {}

    def arrived(index: int, came: Piece | Status | Unlike) -> None:
        if isinstance(came, Status):  # there are no bytes in such an answer
            said[index] = came

    async with link.line() as line:
        answer = Answer(items, line.session, arrived)
        patience = max(1, min(600_000, int(deadline * 1000)))
        await line.session.send(line.channel, encode(Request(items, prefetch=True, patience=patience, keep=True)))
        await line.channel.fill(answer.frames(), lambda: deadline)
    if answer.last is Status.BUSY:
        raise PeerBusy(f"{link.node.name}: has too much to do")
    return said

"""Ask the nodes of the cluster what they can store, where nobody has said it: what a node owns depends on it.

A node says it to whoever connects, so this only connects, to each soon after it is first heard of; the connection is
kept for what is asked later. Who is not there yet is tried again, less and less often.
"""

from __future__ import annotations

import asyncio
import logging

from cachefs.cluster.membership import Members
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.client import Peers
from cachefs.errors import PeerError

log = logging.getLogger("cachefs.fetcher")

# How soon a node is met that was not there before. Each view that changes moves objects, so the first to be read move.
LOOK_SECONDS = 0.2
LONGEST_PAUSE = 30.0

# Connections that are opened at the same time: a cluster of hundreds is met within a second.
MOST_AT_ONCE = 32


async def greet(members: Members, peers: Peers) -> None:
    """Until it is cancelled."""
    again: dict[str, tuple[float, float]] = {}  # by name: when, and the pause before that
    meeting: set[str] = set()
    loop = asyncio.get_running_loop()
    turns = asyncio.Semaphore(MOST_AT_ONCE)

    async def meet(node: Node) -> None:
        try:
            async with turns:
                capacity = await peers.greet(node)
        except (PeerError, OSError) as error:
            log.debug("%s: cannot be met yet: %s", node.name, error)
            capacity = 0
        if capacity:
            again.pop(node.name, None)
            members.told(node.name, capacity)  # once more, if it was forgotten while the connection stayed
        else:
            _, pause = again.get(node.name, (0.0, LOOK_SECONDS))
            again[node.name] = loop.time() + pause, min(LONGEST_PAUSE, 2 * pause)
        meeting.discard(node.name)

    async with asyncio.TaskGroup() as group:  # one that does not answer keeps nobody from meeting the others
        while True:
            silent = members.silent
            for name in again.keys() - {node.name for node in silent}:
                del again[name]
            for node in silent:
                if node.name not in meeting and again.get(node.name, (0.0, 0.0))[0] <= loop.time():
                    meeting.add(node.name)
                    group.create_task(meet(node))
            await asyncio.sleep(LOOK_SECONDS)

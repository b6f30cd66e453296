"""This node's part in a cluster: who its members are, how they are asked, and the source that asks them.

Loaded only where a cluster is joined: a fetcher that starts for a reader has no time for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from cachefs.cluster.membership import Members, open_members
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.survey import survey
from cachefs.cluster.peers.trust import Trust, open_trust
from cachefs.cluster.placement import shares
from cachefs.errors import PeerError
from cachefs.fetcher.editions import Editions
from cachefs.fetcher.greeting import greet
from cachefs.fetcher.lodging import Lodging
from cachefs.fetcher.neighbours import FromCluster
from cachefs.fetcher.room import Room
from cachefs.fetcher.telling import Telling
from cachefs.messages import Join


def open_part(room: Room, request: Join) -> Part:
    """Raises ConfigError."""
    me = Node(request.name, request.host, request.port, request.weight)
    trust = open_trust(me.name, request.secret, request.ca, request.certificate, request.key, request.sign)
    members = open_members(request.members, me)
    return Part(room, members, Peers(trust, members.told), trust)


class Part:
    """Of one cluster, from `begin` to `end`."""

    def __init__(self, room: Room, members: Members, peers: Peers, trust: Trust) -> None:
        self._members = members
        self._peers = peers
        self._trust = trust
        self._lodging = Lodging(peers, room.index, room.counters)
        self.source = FromCluster(room.origin, members, peers, self._lodging, room.counters)
        self.editions = Editions(room.config.home, members, peers)
        self._telling = Telling(room, members, peers)
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        await self._lodging.begin()
        await self._members.__aenter__()
        self._tasks = [
            asyncio.create_task(self._follow()),
            asyncio.create_task(self._telling.recent.keep()),
            asyncio.create_task(greet(self._members, self._peers)),
        ]

    async def _follow(self) -> None:
        async for view in self._members.changes():
            self.source.see(view)
            self.editions.see(view)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._lodging.close()
        await self._members.__aexit__(None, None, None)
        await self._peers.close()  # what is still asked of peers is asked of the origin instead

    def status(self) -> dict[str, Any]:
        view = sorted(self._members.view)
        share = shares(view)
        return {
            "me": self._members.me.name,
            "trouble": self._members.trouble,
            "nodes": [
                {"name": node.name, "address": node.address, "weight": node.weight,
                 "share": share[node.name]}
                for node in view
            ],
            "peers": [msgspec.to_builtins(row) for row in self._peers.status()],
        }  # fmt: skip

    def account(self) -> dict[str, Any]:
        """What this node says of itself, but for what its server gave."""
        told: dict[str, Any] = msgspec.to_builtins(self._telling.account(), builtin_types=(bytes,))
        return told

    async def survey(self) -> AsyncGenerator[dict[str, Any], None]:
        """For each node of the view what it says of itself, or why it says nothing; then who is asked, and for whom."""
        view, me, trouble = sorted(self._members.view), self._members.me, self._members.trouble
        share = shares(view)
        async with contextlib.aclosing(survey(view, self._trust)) as told:
            async for node, account in told:
                row = {"node": node.name, "address": node.address, "weight": node.weight, "share": share[node.name]}
                if isinstance(account, PeerError):
                    yield row | {"why": account.message, "account": None}
                else:
                    yield row | {"why": "", "account": msgspec.to_builtins(account, builtin_types=(bytes,))}
        yield {"me": me.name, "trouble": trouble}

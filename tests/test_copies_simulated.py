"""What plans save a cluster in transfers: K nodes on paper, each with the fetcher's own code for what copies it keeps.

One job, in the orders of DistributedSampler. Each node has room for all that it owns and for some copies; all others'
objects that it reads and has no copy of come from their owners.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefs.cluster.nodes import Node as Member
from cachefs.cluster.placement import Placement, object_key
from cachefs.hints.orders import DistributedOrder
from tests.foreseeing import DATASET, SIZE, Node


class Simulated:
    """share: room for copies on each node, of the objects that others own. early: how much of an epoch has passed when
    the next one is announced; None: nothing ever is."""

    def __init__(self, folder: Path, items: int, nodes: int, share: float, early: float | None) -> None:
        self.names = [f"bucket/{n}" for n in range(items)]
        self.early = early
        placement = Placement([Member(f"node-{n}", "host", 7070) for n in range(nodes)])
        self.owner = [int(placement.owner(object_key("s3", name, "v")).name[5:]) for name in self.names]
        number = {name: n for n, name in enumerate(self.names)}
        self.nodes = []
        for rank in range(nodes):
            owned = self.owner.count(rank)
            size = (owned + int(share * (items - owned))) * SIZE
            own = {name for name in self.names if self.owner[number[name]] == rank}
            self.nodes.append(Node(folder / str(rank), size, own.__contains__))
        self.orders = [DistributedOrder(items, nodes, rank, seed=5) for rank in range(nodes)]
        self.courses = [node.consumers.announce(self.names, believed=False) for node in self.nodes]
        if early is not None:
            for node, course in zip(self.nodes, self.courses, strict=True):
                node.room.plans = node.consumers.foresight
                course.streams = True  # as the first that did not fit would say

    async def epoch(self, number: int) -> int:
        """How many objects were transferred."""
        orders = [order.epoch(number) for order in self.orders]
        length = len(orders[0])
        if not number and self.early is not None:
            await self._announce(orders)
        transfers = 0
        for at in range(length):
            if self.early is not None and at == int(self.early * length):
                await self._announce([order.epoch(number + 1) for order in self.orders])
            for rank, order in enumerate(orders):
                transfers += await self._read(rank, order[at], number * length + at + 1)
        return transfers

    async def _announce(self, orders) -> None:
        for node, course, order in zip(self.nodes, self.courses, orders, strict=True):
            node.consumers.plan(course, order)
            if course.believed:
                await node.consumers.look_through()

    async def _read(self, rank: int, item: int, position: int) -> int:
        path, node, owner = self.names[item], self.nodes[rank], self.nodes[self.owner[item]]
        if self.early is not None:
            node.consumers.at(self.courses[rank], position, position * 0.01)
        if node.has(path):
            return 0
        asked = node.consumers.board.get((DATASET, path))
        if asked is not None:
            asked.course.asked(asked)
        if not owner.has(path):
            assert await owner.keep(path)
        if owner is node:
            return 0
        await node.keep(path)
        if asked is not None:
            asked.course.waiting(asked, 0.0)
        return 1

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()


async def transfers(
    folder: Path, items: int, nodes: int, share: float, early: float | None, epochs: int
) -> list[float]:
    """Of each epoch, per object."""
    simulated = Simulated(folder, items, nodes, share, early)
    try:
        return [await simulated.epoch(number) / items for number in range(epochs)]
    finally:
        await simulated.close()


@pytest.mark.parametrize(("nodes", "saved"), [(2, 0.25), (4, 0.15), (8, 0.05)])
async def test_plans_save_transfers(tmp_path: Path, nodes: int, saved: float):
    """Room for a quarter of what others own; in later epochs, when all is full. Announced early, as cachefs.torch does,
    more than in the middle of an epoch: of what has passed by then nothing was kept for the next one."""
    found = {}
    for early in (None, 0.5, 0.05):
        found[early] = sum((await transfers(tmp_path / f"{early}", 800, nodes, 0.25, early, 6))[3:])
    assert found[0.05] <= (1 - saved) * found[None]
    assert found[0.05] < found[0.5] < found[None]

"""When a node asks the origin beside an owner, decided by what the fetcher runs, in a cluster on paper.

An owner whose link is slow, one that is gone, machines that are all busy, an origin that is slow. Time passes where
everybody waits, and only there.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cachefs.budget import Urgency
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.health import LEAST_HEDGE, MOST_LATE, Health
from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.peers.wire import Item
from cachefs.cluster.placement import Placement, object_key
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.neighbours import FromCluster
from cachefs.fetcher.sources import FromOrigin
from cachefs.messages import Entry, Need

DATA = bytes(110)

ME, *OWNERS = NODES = [Node(f"node-{number}", "host", 7070, 1) for number in range(4)]
UNLUCKY = OWNERS[0].name
PLACEMENT = Placement(NODES)

NEVER = 3600.0


class _Leaps(selectors.SelectSelector):
    """Nothing comes from outside, so whoever waits has waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now += timeout
        return ready


def run(what: Callable[[], Coroutine[Any, Any, None]]) -> None:
    def loop() -> asyncio.AbstractEventLoop:
        leaps = _Leaps()
        made = asyncio.SelectorEventLoop(leaps)
        made.time = lambda: leaps.now  # type: ignore[method-assign]
        return made

    random.seed(0)  # how long somebody is left alone is partly by chance
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(what())


def now() -> float:
    return asyncio.get_running_loop().time()


class Origin:
    """takes: seconds of a request, told how many are under way."""

    def __init__(self, takes: Callable[[int], float]) -> None:
        self.takes = takes
        self.active = self.reads = 0

    async def get(self, path: str, **_: object) -> tuple[Entry, bytes]:
        self.reads += 1
        self.active += 1
        try:
            await asyncio.sleep(self.takes(self.active))
        finally:
            self.active -= 1
        return Entry(path, len(DATA), 0, "v"), DATA


class Owners:
    """Peers, of which each takes as long as `takes` says, told its name and the path."""

    def __init__(self, takes: Callable[[str, str], Awaitable[None]]) -> None:
        self.takes = takes
        self.health = {node.name: Health(node.name, now) for node in OWNERS}

    async def get(self, node: Node, item: Item, *, fetch: bool, urgency: Urgency) -> Piece:
        health, began = self.health[node.name], now()
        health.tried()
        try:
            await self.takes(node.name, item.path)
        except asyncio.CancelledError:
            health.given_up()
            raise
        health.answered(now() - began, len(DATA))
        health.well(now() - began)
        return Piece(memoryview(DATA), 0, len(DATA), b"", "")

    def keep(self, nodes: object) -> None:
        pass

    def caution(self, node: Node) -> float:
        return self.health[node.name].caution

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Whatever else is asked is asked of the health."""
        return lambda node, *more, **named: getattr(self.health[node.name], name)(*more, **named)


class Cluster:
    """One node of it, and what it reads. Of the latest `read`: slowest, in seconds; others, how many others own."""

    def __init__(self, origin: Origin, takes: Callable[[str, str], Awaitable[None]]) -> None:
        members = SimpleNamespace(me=ME, view=frozenset(NODES))
        nobody_lodges = SimpleNamespace(see=lambda *_: None, keeper=lambda _: None, turn_away=lambda _: None)
        self.owners, counters = Owners(takes), Counters()
        asked = cast(Any, self.owners)
        self._source = FromCluster(FromOrigin(counters), cast(Any, members), asked, cast(Any, nobody_lodges), counters)
        self._attachment: Any = SimpleNamespace(dataset="d5" * 16, identity="s3", direct=False, origin=origin)
        self._paths = 0
        self.slowest, self.others = 0.0, 0

    async def read(self, count: int, *, own: bool = True, readers: int = 6) -> None:
        """So many objects that were not read before. own: also such as this node owns."""
        self.slowest, self.others = 0.0, 0
        paths: list[str] = []
        while len(paths) < count:
            self._paths += 1
            path = f"bucket/{self._paths}"
            mine = owner_of(path) == ME.name
            if own or not mine:
                paths.append(path)
                self.others += not mine

        async def reader() -> None:
            while paths:
                began, path = now(), paths.pop()
                need = Need(attachment=0, path=path, version="v", size=len(DATA))
                await self._source.whole(self._attachment, need, "v", Urgency(0))
                self.slowest = max(self.slowest, now() - began)

        async with asyncio.TaskGroup() as group:
            for _ in range(readers):
                group.create_task(reader())


def owner_of(path: str) -> str:
    return PLACEMENT.owner(object_key("s3", path, "v")).name


async def at_once(name: str, path: str) -> None:
    await asyncio.sleep(0.002)


async def known(origin: Origin, unlucky: Callable[[], Awaitable[None]]) -> tuple[Cluster, Callable[[], None]]:
    """(a cluster that has read for a while, what makes it go wrong with one of its owners)."""
    well = True

    async def takes(name: str, path: str) -> None:
        await (at_once(name, path) if well or name != UNLUCKY else unlucky())

    def strike() -> None:
        nonlocal well
        well = False

    cluster = Cluster(origin, takes)
    await cluster.read(200)
    origin.reads = 0
    return cluster, strike


def test_an_owner_whose_link_is_slow_is_waited_for_no_longer_than_the_origin_needs():
    """At 1% of 1 Gbit/s, where bytes that nobody wants any more have to pass, too."""
    free_at = 0.0

    async def line() -> None:
        nonlocal free_at
        free_at = max(free_at, now()) + 0.09
        await asyncio.sleep(free_at - now())

    async def story() -> None:
        origin = Origin(lambda active: 0.025)
        cluster, strike = await known(origin, line)
        strike()
        for _ in range(3):  # nor is it as it takes longer and longer
            await cluster.read(200)
            assert cluster.slowest <= LEAST_HEDGE + 0.026
        assert cluster.owners.health[UNLUCKY].latency(0.95) > 0.4

    run(story)


def test_an_owner_that_is_gone_is_left_alone_soon():
    async def story() -> None:
        origin = Origin(lambda active: 0.025)
        cluster, strike = await known(origin, lambda: asyncio.sleep(NEVER))
        strike()
        await cluster.read(200)
        assert cluster.slowest <= LEAST_HEDGE + 0.026
        late = cluster.owners.health[UNLUCKY].row().late
        assert MOST_LATE <= late <= MOST_LATE + 6  # so many readers wait for it at once
        assert cluster.owners.health[UNLUCKY].state == "open"

    run(story)


def test_owners_that_are_as_busy_as_this_node_are_waited_for():
    """On a machine that gives nobody its turn the origin takes longer, too, as this node sees it."""
    dice = random.Random(0)

    async def busy(name: str, path: str) -> None:
        await asyncio.sleep(0.3 + dice.expovariate(1 / 0.1))

    async def story() -> None:
        origin = Origin(lambda active: 0.15 + dice.expovariate(1 / 0.1))
        cluster = Cluster(origin, busy)
        await cluster.read(2000)
        assert origin.reads - (2000 - cluster.others) <= 0.03 * cluster.others

    run(story)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("slow", [0.55, 0.7, 3.0, 10.0])
def test_an_origin_that_becomes_slow_is_not_asked_twice(slow, own):
    """Owners that have to read from it are as slow. own: whether this node reads from it, too, and so hears of it."""
    takes = 0.025

    async def through(name: str, path: str) -> None:
        await asyncio.sleep(takes)

    async def story() -> None:
        nonlocal takes
        origin = Origin(lambda active: takes)
        cluster = Cluster(origin, through)
        await cluster.read(200)
        takes, origin.reads = slow, 0
        await cluster.read(1000, own=own)
        assert origin.reads - (1000 - cluster.others) <= 0.1 * cluster.others

    run(story)


def test_an_origin_that_is_the_slower_the_more_it_is_asked_is_not_driven_over_the_edge():
    """Requests beside owners are what makes it slow: each brings others, if nobody holds back."""
    under_way = 0

    async def story() -> None:
        def takes(active: int) -> float:
            return 0.05 * max(1.0, (active + under_way) / 4)

        async def through(name: str, path: str) -> None:
            nonlocal under_way
            under_way += 1
            try:
                await asyncio.sleep(takes(origin.active))
            finally:
                under_way -= 1

        origin = Origin(takes)
        cluster = Cluster(origin, through)
        await cluster.read(200, readers=4)
        origin.reads = 0
        await cluster.read(2000, readers=64)  # of which each waits for 0.8 s
        assert origin.reads - (2000 - cluster.others) <= 0.1 * cluster.others

    run(story)

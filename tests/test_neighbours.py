"""What a node does with the answers of an owner: whom it asks then. (Peers that answer by plan; real ones are in
test_peers.py and test_cluster.py.)"""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cachefs.budget import Urgency
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.health import Health
from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.placement import object_key
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import PeerBusy, PeerHasNot, PeerTimeout
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.index import Index
from cachefs.fetcher.lodging import Lodging, block_key
from cachefs.fetcher.neighbours import FromCluster
from cachefs.fetcher.sources import Usual
from cachefs.messages import Entry, Need

ME, OWNER = Node("me", "127.0.0.1", 1, 0), Node("owner", "127.0.0.1", 2, 1)
ATTACHMENT: Any = SimpleNamespace(dataset="d5" * 16, identity="s3", direct=False)
DATA = b"what was asked for"


class Busy:
    """Peers of which the owner refuses what nobody waits for, so many times. asked: with which urgency."""

    def __init__(self, times: int, seconds: float, *, of_all: bool = False) -> None:
        self.left = times
        self.seconds = seconds
        self.of_all = of_all
        self.asked: list[int] = []
        self.health = Health("owner", time.monotonic)

    async def get(self, node: Node, item: object, *, fetch: bool, urgency: Urgency) -> Piece:
        self.asked.append(urgency.level)
        if self.left and (urgency.level or self.of_all):
            self.left -= 1
            raise PeerBusy("has too much to do")
        return Piece(memoryview(DATA), 0, len(DATA), b"", "")

    def busy_for(self, node: Node) -> float:
        return self.seconds

    def why_not(self, node: Node) -> str:
        return ""

    def hedge(self, node: Node, usual: float) -> float:
        return self.health.hedge(usual)

    def caution(self, node: Node) -> float:
        return self.health.caution

    def overtaken(self, node: Node, took: float, usual: float) -> None:
        self.health.overtaken(took, usual)

    def keep(self, nodes: object) -> None:
        pass


class Origin:
    def __init__(self) -> None:
        self.usual = self.usual_block = Usual()
        self.reads = 0

    async def whole(self, *_: object) -> tuple[Entry, bytes]:
        self.reads += 1
        return Entry("bucket/a", len(DATA), 0, "v"), DATA

    async def block(self, *_: object) -> bytes:
        self.reads += 1
        return DATA


def source(peers: Busy) -> tuple[FromCluster, Origin]:
    origin = Origin()
    members = SimpleNamespace(me=ME, view=frozenset({OWNER}))  # not in its own view: all is the other's
    nobody_lodges = SimpleNamespace(see=lambda *_: None, keeper=lambda _: None, turn_away=lambda _: None)
    parts = [cast(Any, part) for part in (origin, members, peers, nobody_lodges)]
    return FromCluster(parts[0], parts[1], parts[2], parts[3], Counters()), origin


def wanted(neighbours: FromCluster, urgency: Urgency) -> asyncio.Task[tuple[Entry, object]]:
    need = Need(attachment=0, path="bucket/a", version="v", size=len(DATA))
    return asyncio.create_task(neighbours.whole(ATTACHMENT, need, "v", urgency))


async def test_what_nobody_waits_for_comes_again_and_is_not_read_from_the_origin():
    peers = Busy(3, 0.01)
    neighbours, origin = source(peers)
    assert (await wanted(neighbours, Urgency(1)))[1] == DATA
    assert (peers.asked, origin.reads) == ([1, 1, 1, 1], 0)


async def test_it_comes_again_at_once_when_somebody_waits():
    peers = Busy(1, 3600.0)
    neighbours, origin = source(peers)
    urgency = Urgency(1)
    task = wanted(neighbours, urgency)
    await asyncio.sleep(0.05)
    assert not task.done()
    urgency.lift(0)
    assert (await task)[1] == DATA
    assert (peers.asked, origin.reads) == ([1, 0], 0)


@pytest.mark.parametrize("seconds", [0.0, 0.01])
async def test_who_waits_does_not_wait_for_a_busy_owner(seconds):
    peers = Busy(1, seconds, of_all=True)
    neighbours, origin = source(peers)
    assert (await wanted(neighbours, Urgency(0)))[1] == DATA
    assert (peers.asked, origin.reads) == ([0], 1)


async def test_nor_does_anybody_for_one_that_is_left_alone():
    peers = Busy(1, 0.0)
    neighbours, origin = source(peers)
    assert (await wanted(neighbours, Urgency(1)))[1] == DATA
    assert (peers.asked, origin.reads) == ([1], 1)


async def test_what_an_owner_lodged_here_is_waited_for_so_long_and_no_longer(monkeypatch):
    """Room is set aside for it meanwhile."""
    monkeypatch.setattr("cachefs.fetcher.neighbours.DEADLINE_SECONDS", 0.05)
    neighbours, _ = source(Busy(10**9, 0.01))
    async with asyncio.timeout(20):
        with pytest.raises(PeerTimeout, match="had no time"):
            await neighbours.from_owner(ATTACHMENT, "bucket/a", "v", len(DATA))


async def test_whose_it_is_is_found_out_once_for_each_miss(monkeypatch):
    """It takes 165 us among 1,000 nodes."""
    neighbours, _ = source(Busy(0, 0.0))
    asked: list[str] = []
    owner = neighbours.owner

    def counting(identity: str, path: str, version: str) -> Node | None:
        asked.append(path)
        return owner(identity, path, version)

    monkeypatch.setattr(neighbours, "owner", counting)
    await wanted(neighbours, Urgency(0))
    assert asked == ["bucket/a"]


# --- a block of a large object that this node owns and has no room for ---


class Keepers(Busy):
    """Each has room or has not, or does not answer; asked: whom, and whether it was to keep it."""

    def __init__(self, **rooms: bool | None) -> None:
        super().__init__(0, 0.0)
        self.rooms = rooms
        self.told: list[tuple[str, bool]] = []

    async def get(self, node: Node, item: Any, *, fetch: bool, urgency: Urgency) -> Piece:
        self.told.append((node.name, item.keep))
        room = self.rooms[node.name]
        if room is None:
            raise PeerTimeout(f"{node.name}: no answer")
        if not room:
            raise PeerHasNot(f"{node.name}: gives less in one answer")
        return Piece(memoryview(DATA), 0, item.size, b"", "")


ONE, TWO = Node("one", "127.0.0.1", 3, 1), Node("two", "127.0.0.1", 4, 1)
MINE = Node("me", "127.0.0.1", 1, 1_000_000)


def at_home(peers: Keepers, folder: Path) -> tuple[FromCluster, Origin, Lodging]:
    """A node that owns everything, of three."""
    origin = Origin()
    members = SimpleNamespace(me=MINE, view=frozenset({MINE, ONE, TWO}))
    lodging = Lodging(cast(Any, peers), Index(folder / "index"), Counters())
    return FromCluster(cast(Any, origin), cast(Any, members), cast(Any, peers), lodging, Counters()), origin, lodging


async def block_of(neighbours: FromCluster, *, lodge: bool = True) -> object:
    entry = Entry("bucket/shard", 10 * BLOCK_SIZE, 0, "v")
    start = 2 * BLOCK_SIZE
    return await neighbours.block(ATTACHMENT, entry, start, start + len(DATA), Urgency(0), lodge=lodge)


def counts(neighbours: FromCluster, block: int | None = None) -> bool:
    return neighbours.counts_on_us("s3", "bucket/shard", "v", block)


async def test_it_is_fetched_and_kept_by_a_node_that_has_room(tmp_path):
    peers = Keepers(one=True, two=True)
    neighbours, origin, _ = at_home(peers, tmp_path)
    assert await block_of(neighbours) == DATA
    ((keeper, keep),) = peers.told
    assert (keep, origin.reads) == (True, 0)
    assert not counts(neighbours, 2)
    assert counts(neighbours, 3)
    assert counts(neighbours)
    peers.rooms[keeper] = True
    assert await block_of(neighbours) == DATA
    assert peers.told == [(keeper, True)] * 2
    assert await block_of(neighbours, lodge=False) == DATA  # there is room by now
    assert (len(peers.told), origin.reads) == (2, 1)


async def test_it_goes_on_to_the_next_and_to_the_origin_where_nobody_keeps_it(tmp_path):
    peers = Keepers(one=False, two=False)
    neighbours, origin, _ = at_home(peers, tmp_path)
    assert await block_of(neighbours) == DATA
    assert (sorted(peers.told), origin.reads) == ([("one", True), ("two", True)], 1)
    assert counts(neighbours, 2)
    assert await block_of(neighbours) == DATA  # they are full for a while
    assert (len(peers.told), origin.reads) == (2, 2)


async def test_one_that_does_not_answer_costs_no_read_where_another_keeps_it(tmp_path):
    peers = Keepers(one=True, two=True)
    neighbours, origin, lodging = at_home(peers, tmp_path)
    dead, other = lodging.block_keepers(object_key("s3", "bucket/shard", "v"), 2, ATTACHMENT.dataset)
    peers.rooms[dead.name] = None
    assert await block_of(neighbours) == DATA
    assert (peers.told, origin.reads) == ([(dead.name, True), (other.name, True)], 0)
    assert lodging.keeper(block_key(object_key("s3", "bucket/shard", "v"), 2)) == other
    # That one is gone for a while: it has it still.
    peers.rooms = {dead.name: True, other.name: None}
    assert await block_of(neighbours) == DATA
    assert (len(peers.told), origin.reads) == (3, 1)
    assert not counts(neighbours, 2)


async def test_one_that_is_slow_may_have_kept_it(tmp_path, monkeypatch):
    for least in ("LEAST_HEDGE", "FIRST_HEDGE"):
        monkeypatch.setattr(f"cachefs.cluster.peers.health.{least}", 0.01)
    monkeypatch.setattr("cachefs.fetcher.neighbours.UNKNOWN_BLOCK_SECONDS", 0.01)

    class Slow(Keepers):
        async def get(self, node: Node, item: Any, *, fetch: bool, urgency: Urgency) -> Piece:
            self.told.append((node.name, item.keep))
            await asyncio.sleep(3600)
            raise AssertionError

    peers = Slow(one=True, two=True)
    neighbours, origin, _ = at_home(peers, tmp_path)
    neighbours.see(frozenset({MINE, ONE}))
    async with asyncio.timeout(20):
        assert await block_of(neighbours) == DATA
    assert (peers.told, origin.reads) == ([("one", True)], 1)
    assert not counts(neighbours, 2)


async def test_what_a_guest_keeps_of_an_object_counts_until_another_node_owns_it(tmp_path):
    """And what its own readers miss of it is not kept beside."""
    neighbours, _, _ = at_home(Keepers(one=True, two=True), tmp_path)
    neighbours.see(frozenset({Node("me", "127.0.0.1", 1, 1), Node("one", "127.0.0.1", 3, 10**9)}))
    assert not counts(neighbours)
    assert neighbours.take_in(ATTACHMENT, "bucket/shard", "v")
    assert counts(neighbours)
    assert not counts(neighbours, 2)
    neighbours.see(frozenset({Node("me", "127.0.0.1", 1, 1), Node("two", "127.0.0.1", 4, 10**9)}))
    assert not counts(neighbours)

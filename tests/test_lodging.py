"""Who keeps what an owner has no room for: offered to the next that is not full, remembered, let go of in the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.wire import Item, Status
from cachefs.cluster.placement import Placement, object_key
from cachefs.errors import PeerTimeout
from cachefs.fetcher import lodging as lodging_module
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.index import Index
from cachefs.fetcher.lodging import MOST_KEEPERS_ASKED, MOST_WAITING, Lodging, block_key

ME = Node("me", "192.0.2.0", 7070)
OTHERS = [Node(f"node-{number}", "192.0.2.1", 7070 + number) for number in range(3)]
DATASET = "d5" * 16


class Asked:
    """Instead of peers: each has room for so many more objects, or does not answer (None)."""

    def __init__(self, rooms: dict[str, int | None]) -> None:
        self.rooms = rooms
        self.offers: list[tuple[str, int]] = []
        self.has: dict[str, list[str]] = {}

    def why_not(self, node: Node) -> str:
        return ""

    async def offer(self, node: Node, items: list[Item]) -> dict[int, Status]:
        self.offers.append((node.name, len(items)))
        await asyncio.sleep(0)
        room = self.rooms[node.name]
        if room is None:
            raise PeerTimeout("no answer")
        taken = min(room, len(items))
        self.rooms[node.name] = room - taken
        self.has.setdefault(node.name, []).extend(item.path for item in items[:taken])
        return {n: Status.KEPT if n < taken else Status.REFUSED for n in range(len(items))}


class Home:
    def __init__(self, folder: Path, rooms: dict[str, int | None]) -> None:
        self.peers = Asked(rooms)
        self.index = Index(folder / "index")
        self.counters = Counters()
        self.placement = Placement([ME, *OTHERS])
        self.lodging = Lodging(self.peers, self.index, self.counters)  # type: ignore[arg-type]
        self.lodging.see(self.placement, ME)

    def offer(self, number: int, size: int = 1000) -> bytes:
        path = f"b/{number}"
        key = object_key("s3", path, "v")
        self.lodging.offer(key, Item(DATASET, path, "v", size))
        return key

    async def settled(self) -> None:
        working = self.lodging._working
        if working is not None:
            async with asyncio.timeout(20):
                await working

    def order(self, key: bytes) -> list[str]:
        return [node.name for node in self.placement.ranking(key, 4) if node != ME]


async def test_it_goes_to_the_next_in_its_order_and_that_is_known_after_a_restart(tmp_path):
    home = Home(tmp_path, dict.fromkeys((node.name for node in OTHERS), 1000))
    keys = [home.offer(number) for number in range(100)]
    assert home.lodging.keeper(keys[0]) is None
    await home.settled()
    assert home.counters.lodged == 100
    home.index.close()
    again = Home(tmp_path, {})
    for key in keys:
        keeper = again.lodging.keeper(key)
        assert keeper is not None
        assert keeper.name == home.order(key)[0]
    assert sum(count for _, count in home.peers.offers) == 100
    assert len(home.peers.offers) < 10  # many at once


async def test_who_is_full_is_passed_over_and_left_in_peace_for_a_while(tmp_path):
    home = Home(tmp_path, {"node-0": 0, "node-1": 5, "node-2": 10_000})
    keys = [home.offer(number) for number in range(100)]
    await home.settled()
    keepers = [home.lodging.keeper(key) for key in keys]
    assert all(keepers)
    assert [len(home.peers.has.get(node.name, ())) for node in OTHERS] == [0, 5, 95]
    asked = len(home.peers.offers)
    home.offer(1000)
    await home.settled()
    assert home.peers.offers[asked:] == [("node-2", 1)]


async def test_where_all_are_full_nothing_is_offered_but_one_object_now_and_then(tmp_path, monkeypatch):
    home = Home(tmp_path, dict.fromkeys((node.name for node in OTHERS), 0))
    for number in range(100):
        home.offer(number)
    await home.settled()
    asked = len(home.peers.offers)
    for number in range(100, 200):
        home.offer(number)
    await home.settled()
    assert len(home.peers.offers) == asked
    monkeypatch.setattr(lodging_module, "CLOSED_SECONDS", 0.0)
    home.lodging._closed = dict.fromkeys(home.lodging._closed, 0.0)
    home.peers.rooms["node-1"] = 1000
    for number in range(200, 220):
        home.offer(number)
    await home.settled()
    assert all(count == 1 for name, count in home.peers.offers[asked:] if name != "node-1")
    assert next(count for name, count in home.peers.offers[asked:] if name == "node-1") == 1
    assert len(home.peers.has["node-1"]) == 20


async def test_who_does_not_answer_keeps_nobody_from_asking_the_next(tmp_path):
    home = Home(tmp_path, {"node-0": None, "node-1": None, "node-2": 10_000})
    keys = [home.offer(number) for number in range(50)]
    await home.settled()
    assert {home.lodging.keeper(key) for key in keys} == {OTHERS[2]}


async def test_no_more_waits_than_is_in_memory(tmp_path):
    home = Home(tmp_path, {"node-0": 0, "node-1": 0, "node-2": 10_000})
    for number in range(2 * MOST_WAITING):
        home.offer(number)
    await home.settled()
    assert len(home.peers.has["node-2"]) == MOST_WAITING
    for number in range(1000, 1010):
        home.offer(number, size=3 << 20)
    await home.settled()
    assert len(home.peers.has["node-2"]) == MOST_WAITING + 2


async def test_a_keeper_that_left_the_cluster_keeps_nothing(tmp_path):
    home = Home(tmp_path, {"node-0": 1000, "node-1": 0, "node-2": 0})
    key = home.offer(1)
    await home.settled()
    assert home.lodging.keeper(key) == OTHERS[0]
    home.lodging.see(Placement([ME, *OTHERS[1:]]), ME)
    assert home.lodging.keeper(key) is None
    home.lodging.see(home.placement, ME)
    assert home.lodging.keeper(key) == OTHERS[0]
    home.lodging.forget(key)
    assert home.lodging.keeper(key) is None


async def test_a_guest_counts_as_long_as_its_owner_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(lodging_module, "MOST_GUESTS", 10)
    home = Home(tmp_path, {})
    keys = [object_key("s3", str(number), "v") for number in range(11)]
    for key in keys:
        home.lodging.take_in(key, "node-1")
    assert home.lodging.is_guest(keys[10], "node-1")
    assert not home.lodging.is_guest(keys[10], "node-2")
    assert not home.lodging.is_guest(keys[0], "node-1")  # one too many
    home.index.close()
    again = Home(tmp_path, {})
    await again.lodging.begin()
    assert [again.lodging.is_guest(key, "node-1") for key in keys] == [False] + 10 * [True]
    home = again
    home.lodging.turn_away(keys[10])
    assert not home.lodging.is_guest(keys[10], "node-1")


async def test_a_defect_while_it_offers_ends_nothing(tmp_path, caplog):
    home = Home(tmp_path, {"node-0": 1000, "node-1": 1000, "node-2": 1000})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "offer", None)
        home.offer(1)
        await home.settled()
    assert "offering" in caplog.text
    key = home.offer(2)
    await home.settled()
    assert home.lodging.keeper(key) is not None


# --- blocks of large objects ---


def test_a_block_may_go_to_the_next_in_the_order_of_its_object_and_that_is_known_after_a_restart(tmp_path):
    home = Home(tmp_path, {})
    key = object_key("s3", "b/shard", "v")
    first, second, third = home.lodging.block_keepers(key, 0, DATASET)
    assert [first.name, second.name, third.name] == home.order(key)
    assert home.lodging.asks(block_key(key, 5), second)
    home.lodging.keeps(block_key(key, 5), second, DATASET, new=True)
    assert home.counters.lodged == 1
    assert home.lodging.block_keepers(key, 5, DATASET) == [second]
    assert home.lodging.block_keepers(key, 6, DATASET) == [first, second, third]
    home.index.close()
    again = Home(tmp_path, {})
    assert again.lodging.block_keepers(key, 5, DATASET) == [second]
    assert again.lodging.keeper(key) is None  # of the object as a whole nothing is noted
    assert not again.lodging.asks(block_key(key, 5), second)


def test_who_refuses_a_block_does_not_have_it_and_is_left_in_peace_but_for_what_it_keeps(tmp_path):
    home = Home(tmp_path, {})
    key = object_key("s3", "b/shard", "v")
    first, second, third = home.lodging.block_keepers(key, 0, DATASET)
    for block in (0, 1):
        home.lodging.asks(block_key(key, block), first)
    home.lodging.keeps(block_key(key, 0), first, DATASET, new=True)
    home.lodging.refuses(block_key(key, 1), first, DATASET)
    assert home.lodging.block_keepers(key, 0, DATASET) == [first]
    assert home.lodging.block_keepers(key, 1, DATASET) == [second, third]
    assert home.lodging.block_keepers(key, 1, "e6" * 16)[0] == first  # of another dataset it may have room
    home.lodging.refuses(block_key(key, 1), second, DATASET)
    home.lodging.refuses(block_key(key, 1), third, DATASET)
    assert home.lodging.block_keepers(key, 1, DATASET) == []
    home.lodging.keeps(block_key(key, 0), first, DATASET, new=False)  # it answers, so it may have room again
    assert home.lodging.block_keepers(key, 1, DATASET) == [first]


def test_whoever_was_asked_and_not_waited_for_is_asked_the_next_time(tmp_path):
    """It may have kept the block, and nobody else knows."""
    home = Home(tmp_path, {})
    key = object_key("s3", "b/shard", "v")
    last = home.lodging.block_keepers(key, 0, DATASET)[-1]
    home.lodging.asks(block_key(key, 0), last)
    assert home.lodging.block_keepers(key, 0, DATASET) == [last]


def test_what_a_node_keeps_that_cannot_be_asked_just_now_is_not_kept_twice(tmp_path, monkeypatch):
    home = Home(tmp_path, {})
    key = object_key("s3", "b/shard", "v")
    first, *_ = home.lodging.block_keepers(key, 0, DATASET)
    home.lodging.asks(block_key(key, 0), first)
    monkeypatch.setattr(home.peers, "why_not", lambda node: "failed" if node == first else "")
    assert home.lodging.block_keepers(key, 0, DATASET) == []
    assert first not in home.lodging.block_keepers(key, 1, DATASET)


async def test_who_has_no_room_for_a_block_may_have_some_for_small_objects(tmp_path):
    home = Home(tmp_path, dict.fromkeys((node.name for node in OTHERS), 1000))
    for node in OTHERS:
        home.lodging.refuses(block_key(object_key("s3", "b/shard", "v"), 1), node, DATASET)
    key = home.offer(1)
    await home.settled()
    assert home.lodging.keeper(key) is not None


def test_no_more_are_asked_for_a_block_than_its_reader_has_time_for(tmp_path):
    home = Home(tmp_path, {})
    many = [Node(f"many-{number}", "192.0.2.2", 7070 + number) for number in range(20)]
    home.lodging.see(Placement([ME, *many]), ME)
    assert len(home.lodging.block_keepers(object_key("s3", "b/shard", "v"), 0, DATASET)) == MOST_KEEPERS_ASKED


def test_a_keeper_of_blocks_that_left_the_cluster_keeps_none(tmp_path):
    home = Home(tmp_path, {})
    key = object_key("s3", "b/shard", "v")
    gone, *others = home.lodging.block_keepers(key, 0, DATASET)
    home.lodging.asks(block_key(key, 0), gone)
    home.lodging.see(Placement([ME, *others]), ME)
    assert home.lodging.keeper(block_key(key, 0)) is None
    assert gone not in home.lodging.block_keepers(key, 0, DATASET)

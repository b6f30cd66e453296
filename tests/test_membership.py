"""Views change when what was seen has lasted, nobody waits for one, and a source that is lost leaves the last."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cluster import membership as membership_module
from cachefs.cluster import settling as settling_module
from cachefs.cluster.addresses import host_port, is_here, recognise
from cachefs.cluster.membership import Alone, Membership, open_members
from cachefs.cluster.nodes import MOST_CAPACITY, Node
from cachefs.cluster.placement import Placement, object_key
from cachefs.cluster.settling import APART, JOIN, LEAVE, LONGEST_JOIN, Settling, View
from cachefs.cluster.weights import weighed
from cachefs.errors import ConfigError, MembershipError


def node(name: str, host: str = "192.0.2.1", weight: int = 1) -> Node:
    return Node(name, host, 7070, weight)


A, B, C, D = (node(name) for name in "abcd")
ME = node("me", "192.0.2.250")


def names(view: View) -> str:
    return "".join(sorted(n.name for n in view))


class Timeline:
    """A Settling that is looked at whenever it asks to be, on a clock of its own."""

    def __init__(self, first: str) -> None:
        self.settling = Settling()
        self.now = 100.0
        self.changes: list[tuple[float, str]] = []
        self.see(first)

    def see(self, seen: str) -> None:
        self.settling.saw(self.now, [node(name) for name in seen])
        self.pass_time(0)

    def pass_time(self, seconds: float) -> str:
        end = self.now + seconds
        while (due := self.settling.due()) <= end:
            before = names(self.settling.view)
            self.now = max(self.now, due)
            if (after := names(self.settling.settle(self.now))) != before:
                self.changes.append((self.now, after))
        self.now = end
        return names(self.settling.view)


def test_the_first_that_is_heard_is_believed_at_once():
    assert Timeline("abc").changes == [(100.0, "abc")]


def test_a_node_that_is_back_before_it_was_missed_never_left():
    line = Timeline("abc")
    for _ in range(20):
        line.see("ab")
        line.pass_time(LEAVE * 0.9)
        line.see("abc")
        line.pass_time(0.1)
    assert line.changes == [(100.0, "abc")]


def test_a_node_that_stays_away_is_gone_and_one_that_stays_is_there():
    line = Timeline("abc")
    line.see("ab")
    assert line.pass_time(LEAVE - 0.01) == "abc"
    assert line.pass_time(0.02) == "ab"
    line.see("abd")
    assert line.pass_time(JOIN - 0.01) == "ab"
    assert line.pass_time(0.02) == "abd"


def test_a_node_that_flaps_slowly_is_out_longer_each_time():
    line = Timeline("ab")
    for _ in range(200):
        line.see("a")
        line.pass_time(LEAVE + 1)
        line.see("ab")
        line.pass_time(30)
    assert len(line.changes) < 30  # of 400 that a source told
    assert line.pass_time(LONGEST_JOIN + 1) == "ab"  # in the end it is quiet


def test_what_was_long_ago_is_forgiven():
    line = Timeline("ab")
    for _ in range(6):
        line.see("a")
        line.pass_time(LEAVE + 1)
        line.see("ab")
        line.pass_time(LONGEST_JOIN + 1)
    line.see("a")
    line.pass_time(2 * settling_module.FORGET)
    line.see("ab")
    assert line.pass_time(JOIN) == "ab"


def test_a_cluster_that_starts_node_by_node_changes_once_a_second_at_most():
    line = Timeline("a")
    for count in range(2, 27):
        line.see("abcdefghijklmnopqrstuvwxyz"[:count])
        line.pass_time(0.1)
    assert line.pass_time(5) == "abcdefghijklmnopqrstuvwxyz"
    times = [when for when, _ in line.changes]
    assert len(times) <= 5
    assert all(later - earlier >= APART for earlier, later in itertools.pairwise(times))


def test_an_address_or_a_weight_that_changed_counts_at_once():
    settling = Settling()
    settling.saw(0, [A, B])
    settling.settle(0)
    moved = node("a", "192.0.2.99", 7)
    settling.saw(0.1, [moved, B])
    assert settling.due() <= 0.1
    assert settling.settle(0.1) == {moved, B}


def test_of_two_nodes_of_one_name_every_node_takes_the_same():
    other = node("a", "192.0.2.0")
    for order in ([A, other], [other, A]):
        settling = Settling()
        settling.saw(0, order)
        assert settling.settle(0) == {other}


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcdef"), min_size=1), st.floats(0, 20)), min_size=1))
def test_whatever_happened_the_view_becomes_what_is_seen(events: list[tuple[set[str], float]]):
    line = Timeline("abc")
    for seen, wait in events:
        line.see("".join(seen))
        line.pass_time(wait)
    line.pass_time(LONGEST_JOIN + LEAVE + 10)
    assert names(line.settling.view) == "".join(sorted(events[-1][0]))
    assert line.settling.due() == float("inf")


def test_nodes_that_see_different_clusters_disagree_only_about_what_is_owned_by_whom_one_misses():
    whole, part = Placement([A, B, C]), Placement([A, B])
    keys = [object_key("s3", f"b/{number}", "v") for number in range(3000)]
    disagree = [key for key in keys if whole.owner(key) != part.owner(key)]
    assert disagree == [key for key in keys if whole.owner(key) == C]
    assert {part.owner(key) for key in disagree} == {A, B}


# --- following a source


class Script:
    """A source that says what it is told to, and fails when it is told to."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[View | Exception] = asyncio.Queue()
        self.watches = 0
        self.closed = 0

    async def watch(self) -> AsyncGenerator[View, None]:
        self.watches += 1
        try:
            while True:
                what = await self.said.get()
                if isinstance(what, Exception):
                    raise what
                yield what
        finally:
            self.closed += 1

    def say(self, *nodes: Node) -> None:
        self.said.put_nowait(frozenset(nodes))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAVE", "JOIN", "APART"):
        monkeypatch.setattr(settling_module, name, 0.0)


async def until(members: Membership, view: set[Node]) -> None:
    async with asyncio.timeout(20):
        async with contextlib.aclosing(members.changes()) as changes:
            async for now in changes:
                if now == view:
                    return


async def until_true(what: Any) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)


async def test_until_the_source_has_spoken_a_node_is_alone():
    source = Script()
    async with Membership(source, ME) as members:
        assert members.view == {ME}
        assert not await members.heard(0.05)
        source.say(A, B)
        assert await members.heard(20)
        assert members.view == {A, B}
    assert source.closed == source.watches == 1


@pytest.mark.usefixtures("_at_once")
async def test_joins_and_leaves_are_told_to_whoever_follows():
    source = Script()
    async with Membership(source, ME) as members:
        for view in ({A}, {A, B}, {A, B, C}, {B, C}, {C, D}):
            source.say(*view)
            await until(members, view)


async def test_a_source_that_flaps_changes_nothing_for_whoever_follows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settling_module, "LEAVE", 60.0)
    source, views = Script(), []

    async def follow(members: Membership) -> None:
        async for view in members.changes():
            views.append(view)

    async with Membership(source, ME) as members:
        source.say(A, B)
        await until(members, {A, B})
        following = asyncio.create_task(follow(members))
        for _ in range(100):
            source.say(A)
            source.say(A, B)
            await until_true(source.said.empty)
        following.cancel()
    assert views == [{A, B}]


@pytest.mark.usefixtures("_at_once")
async def test_who_follows_slowly_gets_the_newest_view_and_not_each():
    source = Script()
    async with Membership(source, ME) as members, contextlib.aclosing(members.changes()) as changes:
        assert await anext(changes) == {ME}
        for view in ({A}, {A, B}, {A, B, C}):
            source.say(*view)
            await until(members, view)
        assert await anext(changes) == {A, B, C}


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("error", [MembershipError("no answer"), RuntimeError("a defect")])
async def test_a_source_that_is_lost_leaves_the_last_view_with_one_warning_and_is_tried_again(error, caplog):
    caplog.set_level(logging.INFO, "cachefs.cluster")
    source = Script()
    async with Membership(source, ME) as members:
        source.say(A, B)
        await until(members, {A, B})
        for _ in range(3):
            source.said.put_nowait(error)
        await until_true(lambda: source.watches == 4)
        assert members.view == {A, B}
        assert str(error) in members.trouble
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "2 nodes last seen" in warnings[0].getMessage()
        source.say(A, B, C)
        await until(members, {A, B, C})
        assert members.trouble == ""
    assert source.closed == source.watches


@pytest.mark.usefixtures("_at_once")
async def test_a_source_that_names_nobody_is_not_believed():
    source = Script()
    async with Membership(source, ME) as members:
        source.say(A, B)
        await until(members, {A, B})
        source.say()
        await until_true(lambda: members.trouble)
        assert members.view == {A, B}
        source.say(B)
        await until(members, {B})
        assert source.watches == 1  # it was not given up either


@pytest.mark.usefixtures("_at_once")
async def test_a_source_that_ends_is_watched_again():
    class Ending:
        watches = 0

        async def watch(self) -> AsyncGenerator[View, None]:
            self.watches += 1
            yield frozenset({A} if self.watches < 3 else {A, B})

    async with Membership(Ending(), ME) as members:
        await until(members, {A, B})


async def test_a_view_is_read_while_its_source_hangs():
    class Hanging:
        async def watch(self) -> AsyncGenerator[View, None]:
            yield frozenset({A, B})
            await asyncio.Event().wait()

    async with Membership(Hanging(), ME) as members:
        assert await members.heard(20)
        assert members.view == {A, B}


@pytest.mark.parametrize("turns", range(10))
async def test_a_membership_ends_when_something_new_comes_at_that_moment(turns: int):
    """asyncio.wait_for lost the cancellation then, in Python 3.11: the end waited for ever."""
    source = Script()
    async with asyncio.timeout(20):
        async with Membership(source, ME) as members:
            source.say(A, B)
            assert await members.heard(20)
            source.say(A, B, C)
            await asyncio.sleep(0.01)  # it waits until C has been there long enough
            source.say(A, B, C, D)
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_a_node_alone_is_there_and_never_changes():
    async with open_members("", ME) as members:
        assert isinstance(members, Alone)
        assert members.view == {ME}
        assert members.me == ME
        assert members.trouble == ""
        async with contextlib.aclosing(members.changes()) as changes:
            assert await anext(changes) == {ME}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(changes)


# --- what nodes can store


def test_what_a_node_told_counts_and_who_has_not_told_counts_as_the_typical_one():
    known = weighed({A, B, C, D}, {"a": 100, "b": 300, "c": 200, "z": 1})
    assert {n.name: n.weight for n in known} == {"a": 100, "b": 300, "c": 200, "d": 200}
    assert weighed({A, B}, {}) == {A, B}


def test_a_weight_that_the_source_gave_stays():
    sized = {node("a", weight=7 << 40), node("b", weight=1 << 40)}
    assert weighed(sized, {"a": 5, "b": 5}) == sized


@pytest.mark.usefixtures("_at_once")
async def test_nodes_count_as_what_they_told_as_soon_as_they_told_it():
    source, me = Script(), node("a", weight=1000)
    async with Membership(source, me) as members:
        source.say(A, B)
        await until(members, {me, node("b", weight=1000)})
        members.told("b", 250)
        await until(members, {me, node("b", weight=250)})
        members.told("nobody", 1)
        source.say(A, B, C)
        await until(members, {me, node("b", weight=250), node("c", weight=250)})
        source.say(A)
        await until(members, {me})
        source.say(A, B)  # another, perhaps: it has to tell again
        await until(members, {me, node("b", weight=1000)})


async def test_what_a_node_told_is_known_while_it_flaps():
    source, me = Script(), node("a", weight=1000)
    told = {me, node("b", weight=250)}
    async with Membership(source, me) as members:
        source.say(A, B)
        assert await members.heard(20)
        assert members.silent == {B}
        members.told("b", 250)
        await until(members, told)
        for _ in range(20):
            source.say(A)
            source.say(A, B)
            await until_true(source.said.empty)
            assert members.view == told
            assert not members.silent


async def test_a_weight_beyond_what_there_is_is_not_believed():
    source, me = Script(), node("a", weight=1000)
    async with Membership(source, me) as members:
        source.say(A, B)
        assert await members.heard(20)
        for weight in (0, -5, MOST_CAPACITY + 1):
            members.told("b", weight)
        assert members.silent == {B}


# --- who is this node


def test_a_node_knows_itself_by_name_then_by_address():
    elsewhere = Node("me", "192.0.2.7", 9999)
    here, other_port = Node("x", "127.0.0.1", 7070), Node("y", "127.0.0.1", 7071)
    assert recognise({A, here, elsewhere}, ME) == elsewhere
    assert recognise({A, here, other_port}, ME) == here
    assert recognise({A, B}, ME) == ME


def test_own_addresses_are_told_from_others(monkeypatch: pytest.MonkeyPatch):
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    for own in ("gpu-1", "gpu-1.rack-a"):
        monkeypatch.setattr(socket, "gethostname", lambda own=own: own)
        assert is_here("gpu-1")
        assert is_here("gpu-1.rack-a")
        assert is_here("gpu-1.rack-b") == ("." not in own)
    assert not is_here("192.0.2.1")  # TEST-NET-1: nobody's
    assert not is_here("2001:db8::1")
    assert not is_here("somewhere.example")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a:1", "a", 1),
        ("a", "a", 7070),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]:9", "::1", 9),
        ("[::1]", "::1", 7070),
        ("fe80::1", "fe80::1", 7070),
        (" a:1 ", "a", 1),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, host: str, port: int):
    assert host_port(text) == (host, port)
    assert host_port(Node("n", host, port).address) == (host, port)


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:0", "a:65536", "a:x", "a b:1", "a/b:1", "[::1:9", "a:²", "[]:1"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(ConfigError, match="cluster node"):
        host_port(text)

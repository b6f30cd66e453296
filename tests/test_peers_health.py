"""Whom a node asks, when it asks the origin too, and what reaches a peer over a network that breaks."""

import asyncio
import itertools
import os
import socket
import time

import pytest

from cachefs.budget import Urgency
from cachefs.cluster.peers import health, link
from cachefs.cluster.peers.health import Health
from cachefs.cluster.peers.race import first
from cachefs.cluster.peers.wire import Item
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.errors import OriginError, PeerBusy, PeerError, PeerHasNot
from cachefs.store import Store
from cachefs_sidecar.testbed.network import network, why_no_network
from tests.peers import Credentials, all_of, asking, served

DATASET = "d5" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_three_failures_in_a_row_open_and_one_answer_closes(clock):
    peer = Health("owner", clock)
    for _ in range(health.MOST_FAILURES - 1):
        peer.failed("no route")
    assert peer.why_not() == ""
    peer.well(0.1)
    for _ in range(health.MOST_FAILURES):
        assert peer.why_not() == ""
        peer.failed("no route")
    assert (peer.state, peer.why_not()) == ("open", "is left alone (no route)")
    clock.now += 1.3
    assert (peer.state, peer.why_not()) == ("half open", "")
    peer.tried()
    assert peer.why_not()  # one at a time
    peer.failed("no route")
    clock.now += 1.5
    assert peer.state == "open"  # for twice as long
    clock.now += 1.0
    peer.tried()
    peer.well(0.1)
    assert (peer.state, peer.why_not()) == ("closed", "")


def test_who_gave_up_on_a_probe_does_not_keep_others_from_asking(clock):
    peer = Health("owner", clock)
    for _ in range(health.MOST_FAILURES):
        peer.failed("no route")
    clock.now += 1.3
    peer.tried()
    peer.given_up()
    assert peer.why_not() == ""


def test_wrong_bytes_open_at_once_and_for_long(clock):
    peer = Health("owner", clock)
    peer.sent_wrong("other bytes")
    clock.now += health.WRONG_PAUSE * 0.7
    assert peer.state == "open"
    clock.now += health.WRONG_PAUSE * 0.6
    assert peer.state == "half open"


def test_an_answer_that_was_under_way_makes_no_peer_right_again_that_sent_wrong_bytes(clock):
    peer = Health("owner", clock)
    peer.tried()
    peer.sent_wrong("other bytes")
    peer.well(0.1)
    assert peer.state == "open"
    clock.now += health.WRONG_PAUSE * 1.3
    assert peer.state == "half open"
    peer.tried()
    peer.well(0.1)
    assert peer.state == "closed"


def test_what_is_told_of_a_peer_is_of_the_last_minute(clock):
    peer = Health("owner", clock)
    for _ in range(20):
        peer.answered(5.0, 1)
    clock.now += health.LATELY
    for latency in [0.1] * 98 + [0.7] * 2:
        peer.answered(latency, 1)
        clock.now += 0.2
    peer.overtaken(0.1, 0.1)
    row = peer.row()
    assert (row.objects, row.lately, row.lately_p50, row.lately_p99, row.late) == (120, 100, 0.1, 0.7, 1)
    clock.now += health.LATELY
    assert (peer.row().lately, peer.row().lately_p99, peer.row().late, peer.row().objects) == (0, 0.0, 0, 120)
    assert peer.row().latency_p99 == 5.0


def test_a_busy_peer_is_no_failed_one(clock):
    peer = Health("owner", clock)
    for _ in range(2 * health.MOST_FAILURES):
        peer.was_busy(0.1)
    assert (peer.state, peer.failures, peer.why_not()) == ("closed", 0, "is busy")
    clock.now += 0.2
    assert peer.why_not() == ""


def test_who_refuses_what_nobody_waits_for_is_asked_for_the_rest(clock):
    peer = Health("owner", clock)
    peer.was_busy(0.1, prefetch=True)
    assert (peer.why_not(), peer.why_not(prefetch=True)) == ("", "is busy")
    assert peer.busy_for(prefetch=True) == pytest.approx(0.1)
    peer.was_busy(0.3)
    assert peer.why_not() == "is busy"
    assert peer.busy_for(prefetch=True) == pytest.approx(0.3)
    clock.now += 0.4
    assert peer.why_not(prefetch=True) == ""


def test_where_the_origin_is_slow_itself_it_is_asked_later_for_a_while(clock):
    peer = Health("owner", clock)
    cautions = []
    for _ in range(5):
        peer.hedged_in_vain(1.0, 0.1)
        cautions.append(peer.caution)
    assert cautions == [2.0, 4.0, 8.0, health.MOST_CAUTION, health.MOST_CAUTION]
    for _ in range(300):
        peer.answered(0.1, 10)
    assert peer.caution == 1.0


def test_a_peer_that_had_it_first_by_a_moment_says_nothing_of_the_origin_unless_it_always_has(clock):
    peer = Health("owner", clock)
    for _ in range(10):
        for _ in range(health.MOST_IN_VAIN - 1):
            peer.hedged_in_vain(0.01, 0.1)
        peer.overtaken(0.1, 0.1)
    assert peer.caution == 1.0
    for _ in range(health.MOST_IN_VAIN):
        peer.hedged_in_vain(0.01, 0.1)
    assert peer.caution == 2.0


def test_an_origin_that_overtakes_a_peer_as_fast_as_ever_needs_no_caution(clock):
    peer = Health("owner", clock)
    peer.hedged_in_vain(1.0, 0.1)
    peer.overtaken(1.0, 0.1)
    assert peer.caution == 2.0
    peer.overtaken(0.2, 0.1)
    assert peer.caution == 1.0


def test_a_peer_that_the_origin_overtakes_again_and_again_is_left_alone(clock):
    peer = Health("owner", clock)
    for _ in range(health.MOST_LATE - 1):
        peer.overtaken(0.1, 0.1)
    peer.answered(0.1, 10)
    for _ in range(health.MOST_LATE):
        assert peer.why_not() == ""
        peer.overtaken(0.1, 0.1)
    assert peer.state == "open"


def test_the_hedge_follows_what_the_origin_usually_takes_and_not_the_peer(clock):
    peer = Health("owner", clock)
    assert peer.hedge(0.1) == health.FIRST_HEDGE
    assert peer.hedge(10.0) == 10.0 * health.ORIGIN_TIMES
    for latency in (0.0001, 60.0):
        for _ in range(100):
            peer.answered(latency, 10)
        assert peer.hedge(0.1) == health.LEAST_HEDGE
        assert peer.hedge(10.0) == 10.0 * health.ORIGIN_TIMES
        assert peer.hedge(0.0) == health.FIRST_HEDGE  # that of the origin is not known
    peer.hedged_in_vain(1.0, 0.1)
    assert peer.hedge(0.1) == 2 * health.LEAST_HEDGE


# --- first ----------------------------------------------------------------------------------------------------

ended: list[str] = []


def gives(name: str, seconds: float, error: Exception | None = None):
    async def run() -> str:
        try:
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
            return name
        finally:
            ended.append(name)

    return run


NEVER = 3600.0


@pytest.mark.parametrize(
    ("owner", "origin", "after", "winner"),
    [
        (gives("owner", 0), gives("origin", NEVER), NEVER, "owner"),
        (gives("owner", NEVER), gives("origin", 0), 0.01, "origin"),
        (gives("owner", 0.1), gives("origin", NEVER), 0.01, "owner"),
        (gives("owner", 0, PeerHasNot("no")), gives("origin", 0.01), NEVER, "origin"),
        (gives("owner", 0.05, PeerBusy("no")), gives("origin", 0.1), 0.01, "origin"),
        (gives("owner", 0.1), gives("origin", 0.01, OriginError("down")), 0.01, "owner"),
    ],
)
async def test_whoever_has_it_first_gives_it_and_the_other_ends(owner, origin, after, winner):
    ended.clear()
    before = asyncio.all_tasks()
    assert await first(owner, origin, after=after) == winner
    assert winner in ended
    assert asyncio.all_tasks() == before  # the loser has ended


async def test_a_process_that_got_no_turn_looks_for_what_has_come_before_it_asks_the_origin():
    ended.clear()
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)

        async def owner() -> str:
            said = (await loop.sock_recv(ours, 100)).decode()
            await asyncio.sleep(0.05)  # it takes some turns more
            return said

        def busy() -> None:
            theirs.send(b"owner")
            time.sleep(0.5)

        loop.call_later(0.1, busy)
        assert await first(owner, gives("origin", 0), after=0.2) == "owner"
    assert not ended


async def test_the_origin_is_not_asked_beside_for_what_nobody_waits_for():
    ended.clear()
    urgency = Urgency(1)
    race = asyncio.create_task(
        first(gives("owner", NEVER), gives("origin", 0), after=0.0, urgency=urgency, patience=NEVER)
    )
    await asyncio.sleep(0.05)
    assert not ended
    urgency.lift(0)
    assert await race == "origin"
    assert await first(gives("owner", NEVER), gives("origin", 0), after=0, urgency=Urgency(1), patience=0) == "origin"


async def test_what_the_origin_says_counts_when_both_fail():
    for order in itertools.permutations((0.0, 0.05)):
        with pytest.raises(OriginError, match="down"):
            await first(
                gives("owner", order[0], PeerError("gone")), gives("origin", order[1], OriginError("down")), after=0.01
            )


async def test_a_defect_is_no_failed_peer():
    with pytest.raises(ZeroDivisionError):
        await first(gives("owner", 0, ZeroDivisionError()), gives("origin", 0), after=NEVER)


async def test_whoever_gives_up_ends_both():
    ended.clear()
    race = asyncio.create_task(first(gives("owner", NEVER), gives("origin", NEVER), after=0.0))
    await asyncio.sleep(0.05)
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    assert sorted(ended) == ["origin", "owner"]


# --- a network of its own -------------------------------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.skipif(bool(why_no_network()), reason=why_no_network())
@pytest.mark.parametrize("kind", ["tls", "all"])
async def test_a_link_that_is_cut_in_the_middle_and_comes_back(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(link, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.5)
    home = tmp_path / "cache"
    store = Store.open(CacheConfig.make(home, min_free=0))
    data = [os.urandom(BLOCK_SIZE) for _ in range(8)]
    for number, content in enumerate(data):
        store.put(content, links=[(DATASET, version_ref(f"bucket/{number}", "v1"))])
    items = [Item(DATASET, f"bucket/{number}", "v1", BLOCK_SIZE) for number in range(8)]
    credentials = Credentials(tmp_path / "pki")
    with (
        network(1) as (_, (host,)),
        served(home, credentials.server(kind), prefix=tuple(host.prefix), host=host.address) as owner,
    ):
        host.slow("200mbit")  # so that it is cut in the middle: 64 MiB take two seconds and a half
        async with asking(credentials.client(kind)) as peers:
            waits = [asyncio.create_task(peers.get(owner.node, item)) for item in items]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            host.cut()
            came = await all_of(list(waits))
            lost = [what for what in came if isinstance(what, BaseException)]
            assert lost
            assert all(isinstance(error, PeerError) for error in lost)
            for number, what in enumerate(came):
                assert isinstance(what, BaseException) or bytes(what.data) == data[number]
            for _ in range(health.MOST_FAILURES):
                with pytest.raises(PeerError):
                    await peers.get(owner.node, items[0], deadline=2.0)
            assert peers.status()[0].state != "closed"
            host.mend()
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert bytes((await peers.get(owner.node, items[0], deadline=10.0)).data) == data[0]
                        break
                    except PeerError:
                        await asyncio.sleep(0.1)

"""What nodes say of themselves comes from outside, and whatever it is harms nobody; without trust nobody hears it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cli.cluster_report import ClusterReport, report_of
from cachefs.cli.cluster_status import lines
from cachefs.cli.cluster_verdict import judged
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import account as accounts
from cachefs.cluster.peers.account import (
    INQUIRY,
    MOST_ACCOUNT,
    Account,
    Counts,
    Given,
    Lately,
    Seen,
    Served,
    View,
    decode_account,
    encode_account,
    view_of,
)
from cachefs.cluster.peers.channel import Channel
from cachefs.cluster.peers.link import dial
from cachefs.cluster.peers.recent import Recent
from cachefs.cluster.peers.survey import ask, survey
from cachefs.cluster.peers.trust import SecretTrust, Session
from cachefs.cluster.peers.wire import LENGTH, encode
from cachefs.errors import PeerError, PeerRefused, PeerTimeout, PeerWrong
from tests.peers import KINDS, Credentials, served

SECRET = b"0123456789abcdef" * 4
TRUST = SecretTrust("asker", SECRET)


def built(**accounts_by_node: Account | str) -> ClusterReport:
    """The report of the node that is named first. A text: why that node does not answer."""
    rows = [
        {
            "node": name,
            "address": f"{name}:7070",
            "weight": 1,
            "share": 1 / len(accounts_by_node),
            "why": said if isinstance(said, str) else "",
            "account": None if isinstance(said, str) else msgspec.to_builtins(said, builtin_types=(bytes,)),
        }
        for name, said in accounts_by_node.items()
    ]
    return judged(report_of("/cache", [*rows, {"me": next(iter(accounts_by_node)), "trouble": ""}]))


def node(name: str, *others: Seen, everyone: str = "abc") -> Account:
    return Account(name=name, counted=True, view=view_of(list(everyone)), peers=list(others))


def seen(name: str, milliseconds: float, **more: Any) -> Seen:
    p50 = int(milliseconds * 1000)
    return msgspec.structs.replace(Seen(name, objects=100, lately=100, p50=p50, p99=3 * p50), **more)


# --- who is slow ------------------------------------------------------------------------------------------------


def test_when_all_are_well_that_is_said():
    report = built(
        a=node("a", seen("b", 9), seen("c", 10)),
        b=node("b", seen("a", 8), seen("c", 12)),
        c=node("c", seen("a", 9), seen("b", 11)),
    )
    assert report.verdict == "all 3 nodes answer"
    assert report.well


def test_a_slow_node_is_named_with_what_the_others_saw():
    report = built(
        a=node("a", seen("b", 10), seen("c", 800, late=100)),
        b=node("b", seen("a", 10), seen("c", 900, late=90)),
        c=node("c", seen("a", 12), seen("b", 10)),
    )
    assert report.verdict == (
        "node c: answers take 0.8 s, those of the others 10 ms, the origin was faster 190 times in the last minute, "
        "it gave 200 objects in all; all 3 nodes answer"
    )
    assert report.well


def test_one_that_sees_all_others_slow_sits_behind_a_slow_line_itself():
    report = built(
        a=node("a", seen("b", 10), seen("c", 800)),
        b=node("b", seen("a", 10), seen("c", 800)),
        c=node("c", seen("a", 800), seen("b", 800)),
    )
    assert "node c: answers take 0.8 s" in report.verdict
    assert "node a" not in report.verdict
    assert "node b" not in report.verdict


def test_of_few_answers_and_few_milliseconds_nothing_is_concluded():
    report = built(
        a=node("a", seen("b", 1), seen("c", 5)),
        b=node("b", seen("a", 1), seen("c", 900, lately=2)),
        c=node("c", seen("a", 1), seen("b", 1)),
    )
    assert report.verdict == "all 3 nodes answer"


def test_one_that_is_left_alone_is_named_with_its_last_failure():
    failing = seen("c", 10, state="open", failures=3, last_failure="stopped in the middle")
    report = built(a=node("a", failing), b=node("b", seen("c", 10)), c=node("c"))
    assert report.verdict.startswith("node c: a leaves it alone for a while (stopped in the middle)")
    assert report.nodes[2].answers.left_alone_by == ["a"]


def test_one_that_does_not_answer_is_named_first():
    failing = seen("c", 10, state="open", last_failure="no connection in 3 s")
    report = built(a=node("a", failing), b=node("b", failing), c="no connection in 2 s")
    assert report.verdict == "node c does not answer: no connection in 2 s, and a and b leave it alone"
    assert not report.well


def test_views_that_differ_are_told_even_where_names_are_too_many():
    names = [f"node-{n}" for n in range(accounts.MOST_NAMES + 1)]
    other = msgspec.structs.replace(node("b"), view=view_of(names))
    assert other.view.names == []
    (said,) = (line for line in lines(built(a=node("a", everyone="ab"), b=other)) if "sees" in line)
    assert said == f"node b sees {len(names)} nodes, this one 2"


# --- what comes from outside -----------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\n[bold]node[/bold]"


def assert_harmless(report: ClusterReport) -> None:
    for line in lines(report):
        assert not {unicodedata.category(c) for c in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}, line


def test_escape_sequences_are_shown_and_not_sent_to_the_terminal():
    evil = Account(
        name=EVIL, trouble=EVIL, view=View(2, b"", [EVIL]), peers=[seen("a", 900, state="open", last_failure=EVIL)],
        datasets=[Served("d" * 32, EVIL, EVIL[:20])],
    )  # fmt: skip
    report = built(a=node("a"), b=evil, c=EVIL)
    assert_harmless(report)
    assert "\\x1b[2J" in "\n".join(lines(report))


_counts = st.integers(0, 2**62)
_short = st.text(max_size=30)
_accounts = st.builds(
    Account,
    name=_short,
    fetcher=_short,
    trouble=_short,
    age=_counts,
    used=_counts,
    size=st.integers(-1, 2**62),
    counted=st.booleans(),
    total=st.builds(Counts, from_peers=_counts, from_origin=_counts, from_peers_bytes=_counts, for_peers=_counts),
    last_10s=st.builds(Lately, milliseconds=_counts, counts=st.builds(Counts, from_peers_bytes=_counts)),
    given=st.builds(Given, objects=_counts, bytes=_counts),
    view=st.builds(View, count=_counts, digest=st.binary(max_size=16), names=st.lists(_short, max_size=4)),
    peers=st.lists(
        st.builds(
            Seen,
            node=st.sampled_from(["a", "b", "c", "\x1b[0m"]),
            state=st.sampled_from(["closed", "open", "half open"]),
            objects=_counts,
            late=_counts,
            lately=_counts,
            p50=_counts,
            p99=_counts,
            last_failure=_short,
        ),
        max_size=4,
    ),
    datasets=st.lists(st.builds(Served, dataset=_short, root=_short, snapshot=_short), max_size=4),
)


@given(_accounts, _accounts)
def test_whatever_nodes_say_can_be_shown(one, other):
    """Also what contradicts itself and the others."""
    assert_harmless(built(a=decode_account(encode_account(one)), b=other, c="does not answer"))


@given(_accounts, st.data())
def test_a_changed_account_is_another_one_or_none(one, data):
    encoded = bytearray(encode_account(one))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PeerWrong):
        assert_harmless(built(a=decode_account(bytes(encoded)), b=one))


@given(st.binary(max_size=300))
def test_random_bytes_are_no_account(data):
    with contextlib.suppress(PeerWrong):
        decode_account(data)


@pytest.mark.parametrize(
    "beyond",
    [
        {"name": "n" * 254},
        {"name": 7},
        {"trouble": "t" * 301},
        {"used": -1},
        {"used": 2**63},
        {"used": float("nan")},
        {"size": -2},
        {"total": {"asked": -1}},
        {"total": []},
        {"view": {"count": 1, "digest": b"d" * 17}},
        {"view": {"names": [""] * (accounts.MOST_NAMES + 1)}},
        {"peers": [{"node": "a"}] * (accounts.MOST_PEERS + 1)},
        {"peers": [{"state": "open"}]},
        {"peers": [{"node": "a", "state": "\x1b"}]},
        {"datasets": [{"dataset": "d" * 65}]},
        {"datasets": [{"dataset": "d"}] * (accounts.MOST_DATASETS + 1)},
        [1, 2, 3],
        "account",
    ],
    ids=range(18),
)
def test_an_account_beyond_the_limits_is_refused(beyond):
    with pytest.raises(PeerWrong):
        decode_account(encode(beyond))


def test_fields_of_later_versions_are_ignored():
    assert decode_account(encode({"name": "a", "moon": ["full"]})) == Account(name="a")


def test_the_longest_account_that_a_node_could_give_travels():
    wide = "\U0001f600" * 253
    longest = Account(
        name=wide,
        view=View(256, b"", [wide] * accounts.MOST_NAMES),
        peers=[Seen(wide, last_failure=wide) for _ in range(accounts.MOST_PEERS)],
        datasets=[Served("d" * 32, wide, "s" * 32) for _ in range(accounts.MOST_DATASETS)],
    )
    data = encode_account(longest)
    assert len(data) <= MOST_ACCOUNT
    assert decode_account(data).name == wide


Behaviour = Callable[[Channel, Session], Awaitable[None]]


@contextlib.asynccontextmanager
async def node_that(behave: Behaviour, name: str = "b") -> AsyncIterator[Node]:
    """One that shakes hands as it should, and then does what `behave` does."""
    tasks: set[asyncio.Task[None]] = set()

    async def connection(sock) -> None:
        channel = Channel(sock)
        try:
            with contextlib.suppress(OSError, PeerError):
                session = await SecretTrust(name, SECRET).answer(channel)
                await session.receive(channel, 100)
                await behave(channel, session)
        finally:
            channel.close()

    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def accept() -> None:
            while True:
                tasks.add(loop.create_task(connection((await loop.sock_accept(listener))[0])))

        tasks.add(loop.create_task(accept()))
        try:
            yield Node(name, "127.0.0.1", listener.getsockname()[1])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def too_long(channel: Channel, session: Session) -> None:
    await session.send(channel, bytes(MOST_ACCOUNT + 1))


async def far_too_long(channel: Channel, session: Session) -> None:
    await channel.send(LENGTH.pack(0xFFFFFFFF))
    while True:
        await channel.send(bytes(65536))


async def nonsense(channel: Channel, session: Session) -> None:
    await session.send(channel, b"\xc1\x93" * 100)


async def unsealed(channel: Channel, session: Session) -> None:
    await channel.send_message(encode_account(Account(name="b")), bytes(16))


async def nested(channel: Channel, session: Session) -> None:
    await session.send(channel, b"\x81\xa5peers" + b"\x91" * 50_000)


async def hanging_up(channel: Channel, session: Session) -> None:
    await channel.send(LENGTH.pack(100) + b"half of")


async def silent(channel: Channel, session: Session) -> None:
    await channel.send(LENGTH.pack(100) + b"half of")
    await asyncio.Event().wait()


@pytest.mark.parametrize("behave", [too_long, far_too_long, nonsense, unsealed, nested])
async def test_what_is_no_account_is_refused(behave):
    async with node_that(behave) as wrong:
        with pytest.raises(PeerWrong):
            await ask(wrong, TRUST, seconds=20)


async def test_of_many_nodes_each_is_heard_whatever_the_others_do():
    async def well(channel: Channel, session: Session) -> None:
        await session.send(channel, encode_account(Account(name="well")))

    async with (
        node_that(silent, "silent") as first,
        node_that(hanging_up, "hanging up") as second,
        node_that(well, "well") as third,
        node_that(nonsense, "nonsense") as fourth,
    ):
        gone = Node("gone", "127.0.0.1", 1)
        told = {node.name: said async for node, said in survey([first, second, third, fourth, gone], TRUST, seconds=4)}
    assert told["well"] == Account(name="well")
    assert isinstance(told["silent"], PeerTimeout)
    assert "no answer in 4 s" in str(told["silent"])
    assert "closed the connection" in str(told["hanging up"])
    assert isinstance(told["nonsense"], PeerWrong)
    assert isinstance(told["gone"], PeerError)


@pytest.fixture(scope="session")
def credentials(tmp_path_factory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("pki") / "pki")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_tells_what_it_knows_without_a_fetcher_and_to_nobody_without_trust(tmp_path, credentials, kind):
    with served(tmp_path, credentials.server(kind)) as owner:
        for _ in range(3):  # over one connection as over several
            said = await ask(owner.node, credentials.client(kind), seconds=20)
        assert said.name == "owner"
        assert said.fetcher == "no fetcher runs"
        with pytest.raises(PeerError if kind == "tls" else PeerRefused):
            await ask(owner.node, SecretTrust("reader", SECRET), seconds=20)


async def test_a_connection_may_be_asked_again(tmp_path, credentials):
    trust = credentials.client("all")
    with served(tmp_path, credentials.server("all")) as owner:
        channel = await dial(owner.node)
        try:
            async with asyncio.timeout(20):
                session = await trust.call(channel, "owner")
                for _ in range(2):
                    await session.send(channel, INQUIRY)
                    assert decode_account(await session.receive(channel, MOST_ACCOUNT)).name == "owner"
        finally:
            channel.close()


# --- the last minute ---------------------------------------------------------------------------------------------


def test_the_last_seconds_are_those_between_two_samples():
    now, counted = [0.0], [0]
    recent = Recent(lambda: (counted[0],), clock=lambda: now[0])
    for second in range(1, 121):
        now[0] = second
        counted[0] += 100 if second <= 100 else 1
        recent.sample()
    assert recent.since(10) == (10_000, (10,))
    assert recent.since(60) == (60_000, (40 * 100 + 20,))


def test_a_node_that_has_just_begun_says_so():
    now, counted = [0.0], [0]
    recent = Recent(lambda: (counted[0],), clock=lambda: now[0])
    now[0], counted[0] = 2.5, 7
    assert recent.since(60) == (2_500, (7,))


def test_after_a_pause_the_time_is_that_which_passed():
    """The process was stopped: what was counted before is not taken for what was counted in the last seconds."""
    now, counted = [0.0], [0]
    recent = Recent(lambda: (counted[0],), clock=lambda: now[0])
    now[0], counted[0] = 1.0, 10
    recent.sample()
    now[0], counted[0] = 501.0, 20
    assert recent.since(10) == (500_000, (10,))

"""Real server processes give what a real fetcher stored from a real origin, and whatever goes wrong is found out."""

import asyncio
import gc
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.budget import Urgency
from cachefs.client import Connection
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import gathering, health, link
from cachefs.cluster.peers.receiving import Piece
from cachefs.cluster.peers.wire import MOST_BYTES, MOST_ITEMS, Item, Request, Status, encode
from cachefs.digest import BLOCK_SIZE, content_key
from cachefs.errors import PeerBusy, PeerError, PeerHasNot, PeerTimeout
from tests.peers import KINDS, Credentials, Stored, all_of, asking, corrupt, in_the_middle, served


@pytest.fixture(scope="session")
def credentials(tmp_path_factory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("pki") / "pki")


def photographs(bucket, count: int = 40, size: int = 30_000) -> dict[str, bytes]:
    return {bucket.put(f"{n:03d}.jpg", data): data for n in range(count) for data in [os.urandom(size + n)]}


def shard(bucket, blocks: int = 2, more: int = 100) -> dict[str, bytes]:
    data = os.urandom(blocks * BLOCK_SIZE + more)
    return {bucket.put("shard.tar", data): data}


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def needs(connection: Connection) -> int:
    """How much was asked of the fetcher so far."""
    return int(connection.status().status["counters"]["needs"])


def bytes_of(pieces) -> list[bytes]:
    return [bytes(piece.data) for piece in pieces]


@pytest.mark.parametrize("kind", KINDS)
async def test_many_objects_come_whole_in_few_requests(bucket, cache_dir, credentials, kind):
    stored = Stored(bucket, cache_dir, photographs(bucket))
    with served(cache_dir, credentials.server(kind)) as owner:
        async with asking(credentials.client(kind)) as peers:
            pieces = await asyncio.gather(*(peers.get(owner.node, stored.item(path)) for path in stored.objects))
            assert bytes_of(pieces) == list(stored.objects.values())
            assert all(piece.key == content_key(piece.data) for piece in pieces)
            (state,) = peers.status()
            assert state.requests < 5
            assert (state.objects, state.bytes) == (40, sum(map(len, stored.objects.values())))
            assert state.state == "closed"
            by_key = await peers.get(owner.node, Item(key=pieces[3].key))
            assert bytes(by_key.data) == bytes(pieces[3].data)


@pytest.mark.parametrize("kind", KINDS)
async def test_blocks_and_other_parts_of_a_large_object(bucket, cache_dir, credentials, kind):
    stored = Stored(bucket, cache_dir, shard(bucket))
    ((path, data),) = stored.objects.items()
    with served(cache_dir, credentials.server(kind)) as owner:
        async with asking(credentials.client(kind)) as peers:

            async def part(offset: int, length: int) -> bytes:
                return bytes((await peers.get(owner.node, stored.item(path, offset=offset, length=length))).data)

            assert await part(0, BLOCK_SIZE) == data[:BLOCK_SIZE]
            assert await part(BLOCK_SIZE, BLOCK_SIZE) == data[BLOCK_SIZE : 2 * BLOCK_SIZE]
            assert await part(2 * BLOCK_SIZE, BLOCK_SIZE) == data[2 * BLOCK_SIZE :]
            assert await part(BLOCK_SIZE - 7, 4096) == data[BLOCK_SIZE - 7 :][:4096]
            assert await part(len(data) + 5, 10) == b""
            whole = await peers.get(owner.node, stored.item(path))
            assert whole.large
            assert whole.size == len(data)
            assert whole.key == content_key(data)


async def test_what_is_not_stored_is_said_at_once_and_costs_the_origin_nothing(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, photographs(throttled, 3), fetched=False)
    names = [*map(stored.item, stored.objects), Item("../../etc", "passwd", "v"), Item(key=b"short"), Item("d" * 32)]
    with served(cache_dir, credentials.secret(), **stored.settings(throttled)) as owner:
        async with asking(credentials.client("all")) as peers:
            came = await all_of([peers.get(owner.node, item) for item in names])
            assert [type(what) for what in came] == [PeerHasNot] * len(names), (came, owner.log.read_text())
            unknown = await all_of([peers.get(owner.node, Item("d" * 32, "p", "v"), fetch=True)])
            assert isinstance(unknown[0], PeerHasNot)
            assert peers.status()[0].state == "closed"
    assert not throttled.reads


@pytest.mark.parametrize("kind", ["tls", "headers"])
async def test_the_owner_fetches_once_for_all_who_ask(throttled, cache_dir, credentials, kind):
    stored = Stored(throttled, cache_dir, photographs(throttled), fetched=False)
    throttled.throttle.set(latency=0.05)
    with served(cache_dir, credentials.server(kind), **stored.settings(throttled)) as owner:
        async with asking(credentials.client(kind)) as one, asking(credentials.client(kind)) as other:
            waits = [p.get(owner.node, stored.item(path), fetch=True) for p in (one, other) for path in stored.objects]
            pieces = await asyncio.gather(*waits)
            assert bytes_of(pieces) == 2 * list(stored.objects.values())
            assert set(throttled.reads.values()) == {1}
            open_version = Item(stored.dataset, next(iter(stored.objects)))
            piece = await one.get(owner.node, open_version, fetch=True)
            assert piece.version == stored.versions[open_version.path]
    assert len(throttled.reads) == 40


async def test_who_is_in_no_cluster_keeps_nothing_for_others(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, photographs(throttled, 3), fetched=False)
    path = next(iter(stored.objects))
    odd = [
        Item(stored.dataset, path, "", 10),  # of which version
        Item(stored.dataset, path, stored.versions[path], -1),  # of which size
        Item(stored.dataset, path, stored.versions[path], BLOCK_SIZE + 1),
        Item("d" * 32, path, stored.versions[path], 10),
        Item(key=bytes(16)),
    ]
    for settings in ({}, stored.settings(throttled)):
        with served(cache_dir, credentials.tls(), **settings) as node:
            async with asking(credentials.client("tls")) as peers:
                items = [*map(stored.item, stored.objects), *odd]
                answers = await peers.offer(node.node, items)
                assert answers == dict.fromkeys(range(len(items)), Status.MISSING)
                assert peers.status()[0].failures == 0
    assert not throttled.reads


async def test_nor_does_it_keep_blocks_and_what_is_no_block_nobody_does(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, shard(throttled), fetched=False)
    ((path, data),) = stored.objects.items()
    size, version = len(data), stored.versions[path]
    items = [
        Item(stored.dataset, path, version, size, offset, length, keep=True)
        for offset, length in ((0, BLOCK_SIZE), (1, BLOCK_SIZE), (0, -1), (0, 0), (size, 1), (2**62, 5), (size - 1, 2))
    ]
    items += [
        Item(stored.dataset, path, "", size, 0, 1, keep=True),
        Item(stored.dataset, path, version, BLOCK_SIZE, 0, 1, keep=True),
        Item(stored.dataset, path, version, -1, 0, 1, keep=True),
        Item("d" * 32, path, version, size, 0, 1, keep=True),
        Item(key=bytes(16), keep=True),
    ]
    for settings in ({}, stored.settings(throttled)):
        with served(cache_dir, credentials.tls(), **settings) as node:
            async with asking(credentials.client("tls")) as peers:
                came = await all_of([peers.get(node.node, item, fetch=True) for item in items])
                assert [type(what) for what in came] == [PeerHasNot] * len(items), (came, node.log.read_text())
                assert peers.status()[0].state == "closed"
    assert not throttled.reads


async def test_what_somebody_waits_for_overtakes_what_any_node_fetches_ahead(throttled, cache_dir, credentials):
    """At the owner, in the link to it, and when it was asked for ahead and is waited for since."""
    stored = Stored(throttled, cache_dir, photographs(throttled, 181), fetched=False)
    ahead = [stored.item(path) for path in stored.objects]
    waited = ahead.pop()
    throttled.throttle.set(latency=60.0)  # all of it must be asked for before any is answered
    with served(cache_dir, credentials.secret(), **stored.settings(throttled)) as owner, stored.connection() as fetcher:
        async with asking(credentials.client("all")) as one, asking(credentials.client("all")) as other:
            urgencies = [Urgency(1) for _ in ahead]
            tasks = [
                asyncio.create_task(one.get(owner.node, item, fetch=True, urgency=urgency))
                for item, urgency in zip(ahead, urgencies, strict=True)
            ]
            # As many as there are lanes are on their way to the origin, as many more are asked of the owner's fetcher.
            await until(lambda: needs(fetcher) == 128 and len(throttled.reads) == 64)
            read = {f"{throttled.name}/{key}" for key in throttled.reads}
            # Either of the two requests for the first 128 may have come to the owner first: one that waits for a lane.
            in_the_link, asked = 170, max(n for n in range(128) if ahead[n].path not in read)
            urgencies[in_the_link].lift(0)
            urgencies[asked].lift(0)
            tasks.append(asyncio.create_task(other.get(owner.node, waited, fetch=True)))
            await until(lambda: needs(fetcher) >= 131)
            before = 0
            while before < (before := needs(fetcher)):  # until all have been told, and look for room
                await asyncio.sleep(3.0)
            assert len(throttled.reads) == 64, "the machine was too slow for this test"
            throttled.throttle.let_pass(3)  # and no more: requests sent at about the same time overtake each other
            await until(lambda: len(throttled.reads) == 67)
            order = [f"{throttled.name}/{key}" for key in throttled.reads]
            assert set(order[64:]) == {waited.path, ahead[in_the_link].path, ahead[asked].path}
            throttled.throttle.set(latency=0.0)
            throttled.throttle.let_pass()
            assert bytes_of(await asyncio.gather(*tasks)) == list(stored.objects.values())
    assert set(throttled.reads.values()) == {1}


async def test_what_lies_behind_others_on_the_way_is_asked_for_once_more_when_somebody_waits_for_it(
    throttled, cache_dir, credentials
):
    stored = Stored(throttled, cache_dir, photographs(throttled, 2), fetched=False)
    first, second = map(stored.item, stored.objects)
    throttled.throttle.hang(f"*/{first.path.rpartition('/')[2]}")
    limits = {"fetches": 1}  # of one request: the first is never there, so the second of it is never begun
    with served(cache_dir, credentials.secret(), limits=limits, **stored.settings(throttled)) as owner:
        async with asking(credentials.client("all")) as peers:
            urgency = Urgency(1)
            hangs = asyncio.create_task(peers.get(owner.node, first, fetch=True, urgency=Urgency(1)))
            waits = asyncio.create_task(peers.get(owner.node, second, fetch=True, urgency=urgency))
            await until(lambda: throttled.reads)
            urgency.lift(0)
            assert bytes((await waits).data) == stored.objects[second.path]
            hangs.cancel()
            await all_of([hangs])


async def test_a_large_object_is_passed_on_by_block_while_it_comes_in(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, shard(throttled, 4), fetched=False)
    ((path, data),) = stored.objects.items()
    with served(cache_dir, credentials.tls(), **stored.settings(throttled)) as owner:
        async with asking(credentials.client("tls")) as peers:
            whole = await peers.get(owner.node, stored.item(path), fetch=True)
            assert whole.large
            third = await peers.get(owner.node, stored.item(path, offset=2 * BLOCK_SIZE, length=BLOCK_SIZE), fetch=True)
            assert bytes(third.data) == data[2 * BLOCK_SIZE : 3 * BLOCK_SIZE]
            # It was not stored first: of five blocks the owner has read no more than what was asked for (twice, where
            # the first answer was cut off).
            assert throttled.throttle.traffic().bytes_down < 2.1 * BLOCK_SIZE
            rest = [stored.item(path, offset=block * BLOCK_SIZE, length=BLOCK_SIZE) for block in range(5)]
            pieces = await asyncio.gather(*(peers.get(owner.node, item, fetch=True) for item in rest))
            assert b"".join(bytes_of(pieces)) == data
    assert throttled.throttle.traffic().bytes_down < len(data) + 1.1 * BLOCK_SIZE


@pytest.mark.parametrize("kind", KINDS)
async def test_one_request_after_the_other_goes_over_the_same_connection(bucket, cache_dir, credentials, kind):
    stored = Stored(bucket, cache_dir, photographs(bucket, 2))
    path = next(iter(stored.objects))
    with served(cache_dir, credentials.server(kind)) as owner:
        passed = []

        def count(data: bytes) -> bytes:
            passed.append(len(data))
            return data

        async with in_the_middle(owner.node, up=count) as node, asking(credentials.client(kind)) as peers:
            await peers.get(node, stored.item(path))
            handshake = sum(passed)
            for _ in range(200):
                await peers.get(node, stored.item(path))
            assert sum(passed) < handshake * 201 / 1.5  # each further one is a request without a handshake


async def test_what_was_given_is_in_memory_no_longer_than_its_reader_keeps_it(bucket, cache_dir, credentials):
    stored = Stored(bucket, cache_dir, photographs(bucket, 40))

    def kept() -> list[Piece]:
        return [o for o in gc.get_objects() if isinstance(o, Piece)]

    with served(cache_dir, credentials.secret()) as owner:
        async with asking(credentials.client("headers")) as peers:
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    await asyncio.gather(*(peers.get(owner.node, stored.item(path)) for path in stored.objects))
                await until(lambda: len(kept()) <= 1)  # when the last END has come
            finally:
                gc.enable()


# --- what goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
@pytest.mark.parametrize("kind", ["tls", "all", "headers"])
async def test_bytes_that_rotted_at_the_owner_are_healed_there(throttled, cache_dir, credentials, kind, given):
    """Also where it sends files unread: who finds them wrong has it look, before it thinks that the owner lies."""
    stored = Stored(throttled, cache_dir, photographs(throttled, 3))
    path, data = next(iter(stored.objects.items()))
    with served(cache_dir, credentials.server(kind), **stored.settings(throttled)) as owner:
        async with asking(credentials.client(kind)) as peers:
            if given:
                assert bytes((await peers.get(owner.node, stored.item(path), fetch=True)).data) == data
            assert corrupt(cache_dir, len(data)) == 1
            with pytest.raises(PeerHasNot):
                await peers.get(owner.node, stored.item(path))
            assert bytes((await peers.get(owner.node, stored.item(path), fetch=True)).data) == data
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == data
            assert peers.status()[0].wrong == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_owner_that_dies_or_stops_in_the_middle(bucket, cache_dir, credentials, monkeypatch, how):
    monkeypatch.setattr(link, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(health, "LEAST_PAUSE", 60.0)  # it is not tried again before it was looked at here
    stored = Stored(bucket, cache_dir, shard(bucket))
    ((path, data),) = stored.objects.items()
    blocks = [stored.item(path, offset=n % 2 * BLOCK_SIZE, length=BLOCK_SIZE) for n in range(32)]
    with served(cache_dir, credentials.secret()) as owner:
        async with asking(credentials.client("all")) as peers:
            waits = [asyncio.create_task(peers.get(owner.node, item)) for item in blocks]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            owner.process.send_signal(how)
            came = await all_of(list(waits))
            right = [what for what in came if not isinstance(what, BaseException)]
            assert all(bytes(piece.data) in (data[:BLOCK_SIZE], data[BLOCK_SIZE : 2 * BLOCK_SIZE]) for piece in right)
            errors = [what for what in came if isinstance(what, BaseException)]
            assert errors
            assert all(isinstance(error, PeerError) for error in errors)
            if how == signal.SIGSTOP:
                assert isinstance(errors[0], PeerTimeout)
            for _ in range(gathering.CONNECTIONS):
                with pytest.raises(PeerError):
                    await peers.get(owner.node, blocks[0])
            assert peers.status()[0].state == "open"
        owner.process.send_signal(signal.SIGCONT)


async def test_an_owner_that_comes_back_is_asked_again(bucket, cache_dir, credentials, monkeypatch):
    monkeypatch.setattr("cachefs.cluster.peers.health.LEAST_PAUSE", 0.05)
    stored = Stored(bucket, cache_dir, photographs(bucket, 1))
    ((path, data),) = stored.objects.items()
    with served(cache_dir, credentials.secret()) as owner:
        async with asking(credentials.client("all")) as peers:
            await peers.get(owner.node, stored.item(path))
            owner.kill()
            for _ in range(5):
                with pytest.raises(PeerError):
                    await peers.get(owner.node, stored.item(path))
            assert peers.status()[0].state in ("open", "half open")
            with served(cache_dir, credentials.secret(), port=owner.node.port) as again:
                assert again.node == owner.node
                async with asyncio.timeout(20):
                    while True:
                        try:
                            piece = await peers.get(owner.node, stored.item(path))
                            break
                        except PeerBusy:
                            await asyncio.sleep(0.02)
                assert bytes(piece.data) == data
                await peers.get(owner.node, stored.item(path))
                assert peers.status()[0].state == "closed"


async def test_a_restarted_owner_costs_no_failed_request(bucket, cache_dir, credentials):
    stored = Stored(bucket, cache_dir, photographs(bucket, 1))
    ((path, data),) = stored.objects.items()
    async with asking(credentials.client("all")) as peers:
        with served(cache_dir, credentials.secret()) as owner:
            await peers.get(owner.node, stored.item(path))
        with served(cache_dir, credentials.secret(), port=owner.node.port):
            # The connection that was kept is closed; another one is made at once.
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == data
            assert peers.status()[0].failures == 0


async def test_a_node_that_nobody_is_at_fails_fast_and_then_faster(credentials, monkeypatch):
    monkeypatch.setattr(health, "LEAST_PAUSE", 60.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        node = Node("owner", "127.0.0.1", closed.getsockname()[1], 1)
        async with asking(credentials.client("all")) as peers:
            came = [await all_of([peers.get(node, Item("d" * 32, "p", "v"))]) for _ in range(5)]
            assert [isinstance(error, PeerBusy) for (error,) in came] == [False, False, False, True, True]


# --- limits ---------------------------------------------------------------------------------------------------


async def raw(owner, credentials, kind: str = "headers"):
    """(channel, session) of an admitted peer that will misbehave."""
    from cachefs.cluster.peers.channel import Channel

    sock = socket.create_connection((owner.node.host, owner.node.port))
    channel = Channel(sock)
    return channel, await credentials.client(kind).call(channel, owner.node.name)


async def closed_by_peer(channel, seconds: float = 60.0) -> bool:
    """Whether the other side hangs up, whatever it still sends before."""
    try:
        async with asyncio.timeout(seconds):
            while await asyncio.get_running_loop().sock_recv(channel.sock, 1 << 20):
                pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


async def test_overload_is_said_at_once_and_prefetch_is_refused_first(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, photographs(throttled, 3), fetched=False)
    items = [stored.item(path) for path in stored.objects]
    throttled.throttle.set(latency=60.0)  # nothing is answered before it is let pass
    limits = {"requests": 2, "per_peer": 2, "prefetch": 1, "retry": 60_000}
    with served(cache_dir, credentials.secret(), limits=limits, **stored.settings(throttled)) as owner:
        async with asking(credentials.client("all")) as peers:
            waiting = asyncio.create_task(peers.get(owner.node, items[0], fetch=True))
            while not peers.status() or not throttled.reads:
                await asyncio.sleep(0.01)
            with pytest.raises(PeerBusy, match="too much to do"):
                await peers.get(owner.node, items[1], fetch=True, urgency=Urgency(1))
            # What somebody waits for is asked at once: it was not that which was refused.
            second = asyncio.create_task(peers.get(owner.node, items[1], fetch=True))
            while len(throttled.reads) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(PeerBusy, match="too much to do"):
                await peers.get(owner.node, items[2], fetch=True)
            with pytest.raises(PeerBusy, match="is busy"):  # not even asked
                await peers.get(owner.node, items[2], fetch=True)
            assert not waiting.done()  # it was not kept waiting for those who were first
            assert not second.done()
            throttled.throttle.let_pass()
            assert bytes((await waiting).data) == stored.objects[items[0].path]
            assert bytes((await second).data) == stored.objects[items[1].path]
            assert peers.status()[0].state == "closed"
            assert peers.status()[0].busy == 2


@pytest.mark.parametrize(("kind", "together"), [("all", False), ("tls", True)])
async def test_machines_that_call_themselves_the_same_have_each_their_share(
    throttled, cache_dir, credentials, kind, together
):
    """As cloned ones do. A name that a certificate proves is one node, wherever it calls from."""
    stored = Stored(throttled, cache_dir, photographs(throttled, 2), fetched=False)
    first, second = (stored.item(path) for path in stored.objects)
    throttled.throttle.set(latency=60.0)
    with served(cache_dir, credentials.server(kind), limits={"per_peer": 1}, **stored.settings(throttled)) as owner:
        async with (
            asking(credentials.client(kind)) as one,
            asking(credentials.client(kind)) as other,
            in_the_middle(owner.node, address="127.0.0.2") as from_elsewhere,
        ):
            waiting = asyncio.create_task(one.get(owner.node, first, fetch=True))
            while not throttled.reads:
                await asyncio.sleep(0.01)
            asked = asyncio.create_task(other.get(from_elsewhere, second, fetch=True))
            if together:
                with pytest.raises(PeerBusy):
                    await asked
            else:
                await until(lambda: len(throttled.reads) == 2)
            assert not waiting.done()
            throttled.throttle.let_pass()
            if not together:
                assert bytes((await asked).data) == stored.objects[second.path]
            assert bytes((await waiting).data) == stored.objects[first.path]


async def test_where_few_files_may_be_open_fewer_connections_are_taken_and_the_log_says_why(
    bucket, cache_dir, credentials
):
    stored = Stored(bucket, cache_dir, photographs(bucket, 2))
    path = next(iter(stored.objects))
    few = ("prlimit", "--nofile=80:80")
    with served(cache_dir, credentials.secret(), prefix=few, name="few") as owner:
        assert "at most 20 connections" in owner.log.read_text()
        assert "ulimit" in owner.log.read_text()
        held = [await raw(owner, credentials) for _ in range(20)]
        with socket.create_connection((owner.node.host, owner.node.port)) as more:
            more.settimeout(60)
            assert more.recv(1) == b""
        await until(lambda: "turned away" in owner.log.read_text())
        for channel, _ in held:
            channel.close()
        await until(lambda: len(os.listdir(f"/proc/{owner.process.pid}/fd")) < 30)
        async with asking(credentials.client("all")) as peers:
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == stored.objects[path]


async def test_without_a_descriptor_left_a_server_waits_and_goes_on(bucket, cache_dir, credentials):
    stored = Stored(bucket, cache_dir, photographs(bucket, 2))
    path = next(iter(stored.objects))
    with served(cache_dir, credentials.secret()) as owner:
        pid = owner.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), limits[1]))
        with socket.create_connection((owner.node.host, owner.node.port)):
            await until(lambda: "ulimit" in owner.log.read_text())
            began = time.monotonic()
            await asyncio.sleep(1.5)  # it looks again once a second, not all the time
            said = owner.log.read_text().count("ulimit")
            assert said <= 2 + (time.monotonic() - began)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        async with asking(credentials.client("all")) as peers:
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == stored.objects[path]


async def test_a_peer_that_takes_nothing_costs_no_memory_and_is_cut_off(bucket, cache_dir, credentials):
    stored = Stored(bucket, cache_dir, shard(bucket))
    ((path, data),) = stored.objects.items()
    with served(cache_dir, credentials.secret(), limits={"stall": 1.0, "senders": 1}) as owner:
        blocks = [stored.item(path, offset=0, length=BLOCK_SIZE)] * (MOST_BYTES // BLOCK_SIZE)
        stalled = [await raw(owner, credentials, "all") for _ in range(3)]
        for channel, session in stalled:
            await session.send(channel, encode(Request(blocks)))
        before = time.monotonic()
        async with asking(credentials.client("all")) as peers:
            # There is one thread, and three who take nothing: it serves who does.
            piece = await peers.get(owner.node, stored.item(path, offset=0, length=BLOCK_SIZE))
            assert bytes(piece.data) == data[:BLOCK_SIZE]
        resident = int(Path(f"/proc/{owner.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
        assert resident < 200 * 1024 * 1024, "a request of 256 MiB waits in the server's memory"
        await asyncio.sleep(max(0.0, before + 2.5 - time.monotonic()))
        for channel, _ in stalled:
            assert await closed_by_peer(channel)
            channel.close()
        assert "took nothing" in owner.log.read_text()


async def test_one_answer_has_a_bounded_size(bucket, cache_dir, credentials, monkeypatch):
    monkeypatch.setattr(gathering, "MOST_TOGETHER_BYTES", 2 * MOST_BYTES)
    stored = Stored(bucket, cache_dir, shard(bucket))
    ((path, _),) = stored.objects.items()
    block = stored.item(path, offset=0, length=BLOCK_SIZE)
    most = MOST_BYTES // BLOCK_SIZE
    with served(cache_dir, credentials.secret()) as owner:
        async with asking(credentials.client("headers")) as peers:
            came = await all_of([peers.get(owner.node, block) for _ in range(most + 2)])
            refused = [what for what in came if isinstance(what, PeerHasNot)]
            assert len(refused) == 2
            assert "less in one answer" in str(refused[0])


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<I", 2**31),
        encode([[["", "", "", -1, 0, 1, b""]] * (MOST_ITEMS + 1), False, False, 1]),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
    ids=["too long", "too many", "http", "empty"],
)
async def test_what_is_no_request_ends_the_connection_and_nothing_else(bucket, cache_dir, credentials, message):
    stored = Stored(bucket, cache_dir, photographs(bucket, 1))
    ((path, data),) = stored.objects.items()
    with served(cache_dir, credentials.secret()) as owner:
        channel, session = await raw(owner, credentials)
        if message[:4] == struct.pack("<I", 2**31):
            await channel.send(message)
        else:
            await session.send(channel, message)
        assert await closed_by_peer(channel)
        channel.close()
        async with asking(credentials.client("all")) as peers:
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == data


async def test_connections_are_bounded_and_strangers_leave(bucket, cache_dir, credentials):
    stored = Stored(bucket, cache_dir, photographs(bucket, 1))
    ((path, data),) = stored.objects.items()
    limits = {"strangers": 3, "handshake": 3.0, "idle": 1.0}
    with served(cache_dir, credentials.secret(), limits=limits) as owner:
        strangers = [await asyncio.open_connection(owner.node.host, owner.node.port) for _ in range(10)]
        async with asyncio.timeout(60):
            early = await asyncio.gather(*(reader.read() for reader, _ in strangers))
        assert early == [b""] * 10  # seven at once, three after three seconds; none got a byte
        async with asking(credentials.client("all")) as peers:
            assert bytes((await peers.get(owner.node, stored.item(path))).data) == data
        channel, _ = await raw(owner, credentials)
        assert await closed_by_peer(channel)  # nobody asks on it
        channel.close()
        for _, writer in strangers:
            writer.close()


async def test_who_hangs_up_takes_the_request_along(throttled, cache_dir, credentials):
    stored = Stored(throttled, cache_dir, photographs(throttled, 2), fetched=False)
    items = [stored.item(path) for path in stored.objects]
    throttled.throttle.set(latency=30.0)
    with served(cache_dir, credentials.secret(), limits={"per_peer": 1}, **stored.settings(throttled)) as owner:
        async with asking(credentials.client("all")) as peers:
            for item in items:
                with pytest.raises(PeerTimeout):
                    # The second one is admitted: the place of the first is free again.
                    await peers.get(owner.node, item, fetch=True, deadline=1.0)
            assert peers.status()[0].busy == 0


async def test_a_wrong_answer_is_reported_in_the_log(bucket, cache_dir, credentials, caplog):
    stored = Stored(bucket, cache_dir, photographs(bucket, 1))
    ((path, data),) = stored.objects.items()
    corrupt(cache_dir, len(data))
    with served(cache_dir, credentials.secret()) as owner:
        async with asking(credentials.client("headers")) as peers:
            with pytest.raises(PeerHasNot):
                await peers.get(owner.node, stored.item(path))
            assert f"owner: {path}: came with bytes that do not match their digest" in caplog.text
            peers.wrong(owner.node, "it lies")
            with pytest.raises(PeerBusy):
                await peers.get(owner.node, stored.item(path))
    assert "left alone" in caplog.text

"""What a server sends: small objects of a batch together, and what is in memory without a thread."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from cachefs.budget import Urgency
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import channel
from cachefs.cluster.peers.server import blobs, framing
from cachefs.cluster.peers.server.blobs import Blobs
from cachefs.cluster.peers.server.resident import open_resident, read_resident
from cachefs.cluster.peers.server.serving import Server
from cachefs.cluster.peers.wire import Item
from cachefs.config import CacheConfig
from cachefs.digest import version_ref
from cachefs.errors import PeerError, PeerHasNot, PeerRefused
from cachefs.store import Store
from tests.peers import KINDS, Credentials, all_of, asking, corrupt, in_the_middle, served

DATASET = "d5" * 16


@pytest.fixture(scope="session")
def credentials(tmp_path_factory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("pki") / "pki")


class Shelf:
    """A cache with objects of somewhat different sizes in it, and no fetcher."""

    def __init__(self, home: Path, count: int, size: int) -> None:
        self.home = home
        store = Store.open(CacheConfig.make(home, min_free=0))
        self.objects = [os.urandom(size + n) for n in range(count)]
        self.paths = [
            store.path(store.put(data, links=[(DATASET, version_ref(f"p/{n}", "v"))]))
            for n, data in enumerate(self.objects)
        ]

    @property
    def items(self) -> list[Item]:
        return [Item(DATASET, f"p/{n}", "v", len(data)) for n, data in enumerate(self.objects)]

    def lose(self, n: int) -> None:
        ref = version_ref(f"p/{n}", "v")
        (self.home / "refs" / DATASET / ref[:2] / ref).unlink()


@pytest.fixture
def shelf(cache_dir) -> Shelf:
    return Shelf(cache_dir, 60, 50_000)


@contextlib.asynccontextmanager
async def server_here(shelf: Shelf, credentials: Credentials, kind: str, monkeypatch):
    """(its node, how often a thread was needed so far) of a server in this process."""
    threads: list[object] = []
    in_thread = Server._in_thread

    async def counted(self, outbox, work):
        threads.append(work)
        return await in_thread(self, outbox, work)

    monkeypatch.setattr(Server, "_in_thread", counted)
    server = Server(Blobs((shelf.home,)), credentials.client(kind, "owner"))
    try:
        yield Node("owner", "127.0.0.1", server.listen("127.0.0.1", 0), 1), threads
        if not threads:  # else a client that has the last byte may hang up before that is counted
            assert (server.objects, server.bytes) == (len(shelf.objects), sum(map(len, shelf.objects)))
    finally:
        await server.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_small_object_that_is_in_memory_needs_no_thread(shelf, credentials, kind, monkeypatch):
    async with (
        server_here(shelf, credentials, kind, monkeypatch) as (node, threads),
        asking(credentials.client(kind)) as peers,
    ):
        for item, data in zip(shelf.items, shelf.objects, strict=True):
            assert bytes((await peers.get(node, item)).data) == data
    assert threads == []


@pytest.mark.parametrize("what", ["open_resident", "read_resident"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_would_have_to_come_from_the_disk_is_for_a_thread(shelf, credentials, kind, what, monkeypatch):
    def not_there(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(framing if what == "read_resident" else blobs, what, not_there)
    async with (
        server_here(shelf, credentials, kind, monkeypatch) as (node, threads),
        asking(credentials.client(kind)) as peers,
    ):
        for item, data in zip(shelf.items, shelf.objects, strict=True):
            assert bytes((await peers.get(node, item)).data) == data
    assert len(threads) >= len(shelf.objects)  # more, where the socket did not take all


async def test_what_nobody_waits_for_goes_behind(shelf, credentials, monkeypatch):
    async with (
        server_here(shelf, credentials, "all", monkeypatch) as (node, threads),
        asking(credentials.client("all")) as peers,
    ):
        for item, data in zip(shelf.items, shelf.objects, strict=True):
            assert bytes((await peers.get(node, item, urgency=Urgency(1))).data) == data
    assert len(threads) >= len(shelf.objects)  # more, where the socket did not take all


async def test_a_batch_is_read_by_a_thread(shelf, credentials, monkeypatch):
    async with (
        server_here(shelf, credentials, "all", monkeypatch) as (node, threads),
        asking(credentials.client("all")) as peers,
    ):
        pieces = await asyncio.gather(*(peers.get(node, item) for item in shelf.items))
        assert [bytes(piece.data) for piece in pieces] == shelf.objects
        # Together means that several are parts of the same memory.
        assert len({id(piece.data.obj) for piece in pieces}) < len(pieces) / 10
    assert threads


def test_pages_that_are_not_in_memory_are_not_waited_for(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(300_000))
    fd = open_resident(str(file), os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = memoryview(bytearray(300_000))
        read_resident(fd, view, 0)
        assert bytes(view) == file.read_bytes()
        with pytest.raises(BlockingIOError):
            read_resident(fd, view, 1)  # it ends before
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not _on_disk(tmp_path):
            pytest.skip("files of this file system are always in memory")
        with pytest.raises(BlockingIOError):
            read_resident(fd, view, 0)
    finally:
        os.close(fd)


def _on_disk(folder: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [(len(m[1]), m[2]) for m in mounts if folder.is_relative_to(m[1])]
    return max(inside)[1] in ("ext4", "xfs", "btrfs")


def test_names_that_the_kernel_does_not_know_are_not_looked_up(tmp_path):
    (tmp_path / "known").write_bytes(b"")
    os.close(open_resident(str(tmp_path / "known"), os.O_RDONLY | os.O_CLOEXEC))
    with pytest.raises(OSError):  # not known, or known not to be there
        open_resident(str(tmp_path / "unknown"), os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_gone_or_damaged_costs_the_rest_of_a_batch_nothing(shelf, credentials, kind):
    shelf.lose(7)
    if kind != "headers":  # there the receiver finds it
        assert corrupt(shelf.home, len(shelf.objects[23])) == 1
    missing = {7} if kind == "headers" else {7, 23}
    with served(shelf.home, credentials.server(kind)) as owner:
        async with asking(credentials.client(kind)) as peers:
            came = await all_of([peers.get(owner.node, item) for item in shelf.items])
            for n, (what, data) in enumerate(zip(came, shelf.objects, strict=True)):
                if n in missing:
                    assert isinstance(what, PeerHasNot)
                else:
                    assert bytes(what.data) == data
            assert peers.status()[0].failures == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_of_a_batch_that_is_cut_off_what_came_whole_is_given_and_the_rest_fails(shelf, credentials, kind):
    passed = 0

    def cut(data: bytes) -> bytes:
        nonlocal passed
        passed += len(data)
        if passed > 2_000_000:
            raise ConnectionAbortedError
        return data

    with served(shelf.home, credentials.server(kind)) as owner:
        async with in_the_middle(owner.node, down=cut) as node, asking(credentials.client(kind)) as peers:
            came = await all_of([peers.get(node, item) for item in shelf.items])
    right = [n for n, what in enumerate(came) if not isinstance(what, BaseException)]
    assert 0 < len(right) < len(came)
    assert all(bytes(came[n].data) == shelf.objects[n] for n in right)
    assert all(isinstance(what, PeerError) for n, what in enumerate(came) if n not in right)


@pytest.mark.parametrize("wake", [1, 1000, 40_000, 10**9])
async def test_however_many_bytes_wake_the_receiver_all_come(shelf, credentials, wake, monkeypatch):
    monkeypatch.setattr(channel, "WAKE_BYTES", wake)
    with served(shelf.home, credentials.secret()) as owner:
        async with asking(credentials.client("all")) as peers:
            async with asyncio.timeout(30):
                for _ in range(3):
                    pieces = await asyncio.gather(*(peers.get(owner.node, item) for item in shelf.items))
                    assert [bytes(piece.data) for piece in pieces] == shelf.objects
                one = await peers.get(owner.node, shelf.items[0])
                assert bytes(one.data) == shelf.objects[0]


@pytest.mark.parametrize("kind", ["tls", "all"])
async def test_a_node_of_another_version_is_refused_and_says_why(shelf, credentials, kind, monkeypatch):
    with served(shelf.home, credentials.server(kind)) as owner:
        monkeypatch.setattr("cachefs.cluster.peers.trust.PROTOCOL", 1)
        async with asking(credentials.client(kind)) as peers:
            with pytest.raises(PeerRefused, match="speaks protocol 2, not 1"):
                await peers.get(owner.node, shelf.items[0])

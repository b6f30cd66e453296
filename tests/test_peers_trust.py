"""No anonymous peer gets a byte, and nobody in the middle can make one: with certificates and with a secret."""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import pki, wire
from cachefs.cluster.peers.channel import Channel
from cachefs.cluster.peers.trust import Hello, SecretTrust, TlsTrust, open_trust
from cachefs.config import CacheConfig
from cachefs.digest import version_ref
from cachefs.errors import ConfigError, PeerError, PeerRefused, PeerWrong
from cachefs.store import Store
from tests.command_line import CommandLine
from tests.peers import KINDS, Credentials, asking, in_the_middle, served

DATASET = "d5" * 16
CONTENT = b"what nobody else shall read " * 4000
ITEM = wire.Item(DATASET, "bucket/a", "v1", len(CONTENT))


@pytest.fixture(scope="session")
def credentials(tmp_path_factory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture(scope="session")
def strangers(tmp_path_factory) -> Credentials:
    """Another cluster's."""
    return Credentials(tmp_path_factory.mktemp("pki") / "strangers")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    Store.open(CacheConfig.make(cache, min_free=0)).put(CONTENT, links=[(DATASET, version_ref("bucket/a", "v1"))])
    return cache


async def everything_sent(node: Node, data: bytes, seconds: float = 10.0) -> bytes:
    """What a server answers to these bytes until it hangs up."""
    reader, writer = await asyncio.open_connection(node.host, node.port)
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("kind", ["tls", "all"])
async def test_who_trusts_each_other_gets_the_bytes(home, credentials, kind):
    with served(home, credentials.server(kind)) as owner:
        async with asking(credentials.client(kind)) as peers:
            assert bytes((await peers.get(owner.node, ITEM)).data) == CONTENT


@pytest.mark.parametrize("kind", ["tls", "all", "headers"])
async def test_another_cluster_is_refused_by_both_sides(home, credentials, strangers, kind):
    with served(home, credentials.server(kind)) as owner:
        async with asking(strangers.client(kind)) as peers:
            with pytest.raises(PeerRefused):
                await peers.get(owner.node, ITEM)
    with served(home, strangers.server(kind)) as owner:
        async with asking(credentials.client(kind)) as peers:
            with pytest.raises(PeerRefused):
                await peers.get(owner.node, ITEM)


async def test_a_client_that_does_not_check_is_refused_by_the_server(home, credentials, strangers, tmp_path):
    """Believing the server is the client's own affair; what it gets is the server's."""
    mixed = tmp_path / "both.pem"
    mixed.write_bytes((credentials.folder / "ca.pem").read_bytes())
    files = strangers.tls("reader")
    with served(home, credentials.tls()) as owner:
        async with asking(TlsTrust("reader", mixed, files["certificate"], files["key"])) as peers:
            with pytest.raises(PeerError):
                await peers.get(owner.node, ITEM)
        assert "was cut off" in owner.log.read_text()


async def test_without_a_certificate_there_is_no_connection(home, credentials):
    import ssl

    context = ssl.create_default_context(cafile=str(credentials.folder / "ca.pem"))
    hello = wire.encode(Hello(wire.PROTOCOL, "reader", "owner", bytes(32)))

    async def ask(node: Node) -> bytes:
        reader, writer = await asyncio.open_connection(node.host, node.port, ssl=context, server_hostname="owner")
        writer.write(struct.pack("<I", len(hello)) + hello)
        return await reader.readexactly(1)

    refused = (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)
    with served(home, credentials.tls()) as owner, pytest.raises(refused):
        await ask(owner.node)


async def test_tls_is_1_3(home, credentials):
    import ssl

    files = credentials.tls("reader")
    context = ssl.create_default_context(cafile=files["ca"])
    context.load_cert_chain(files["certificate"], files["key"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with served(home, credentials.tls()) as owner, pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(owner.node.host, owner.node.port, ssl=context, server_hostname="owner")


async def test_a_node_cannot_call_itself_by_another_name(home, credentials):
    files = credentials.tls("reader")
    liar = TlsTrust("owner", files["ca"], files["certificate"], files["key"])
    with served(home, credentials.tls()) as owner:
        async with asking(liar) as peers:
            with pytest.raises(PeerRefused, match="refuses this node"):
                await peers.get(owner.node, ITEM)


async def test_a_node_that_is_not_who_was_called_is_not_believed(home, credentials):
    """The address belongs to another node by now. (With a secret, names are claims, and bytes are right anyway.)"""
    with served(home, credentials.tls()) as owner:
        elsewhere = Node("other", owner.node.host, owner.node.port, 1)
        async with asking(credentials.client("tls")) as peers:
            with pytest.raises(PeerRefused):
                await peers.get(elsewhere, ITEM)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_node_says_what_it_can_store_to_whoever_connects(credentials, tmp_path, kind):
    told = []
    async with saying(credentials, kind, 1 << 40, tmp_path) as node, asking(credentials.client(kind)) as peers:
        peers._told = lambda *what: told.append(what)
        assert await peers.greet(node) == 1 << 40
        assert await peers.greet(node) == 1 << 40  # it is not asked twice
    assert told == [("owner", 1 << 40)]


async def test_what_it_can_store_is_changed_by_nobody_in_the_middle(credentials, tmp_path):
    def larger(data: bytes) -> bytes:
        return data.replace((1 << 40).to_bytes(8, "big"), (1 << 50).to_bytes(8, "big"))

    async with (
        saying(credentials, "all", 1 << 40, tmp_path) as node,
        in_the_middle(node, down=larger) as between,
        asking(credentials.client("all")) as peers,
    ):
        with pytest.raises(PeerRefused):
            await peers.greet(between)


@contextlib.asynccontextmanager
async def saying(credentials: Credentials, kind: str, capacity: int, folder: Path) -> AsyncIterator[Node]:
    """A server in this process that says what it can store."""
    from cachefs.cluster.peers.server.blobs import Blobs
    from cachefs.cluster.peers.server.serving import Server

    trust = credentials.client(kind, "owner")
    trust.capacity = capacity
    server = Server(Blobs((folder,)), trust)
    try:
        yield Node("owner", "127.0.0.1", server.listen("127.0.0.1", 0), 1)
    finally:
        await server.close()


async def test_names_that_are_not_admitted_get_nothing(home, credentials):
    from cachefs.cluster.peers.server.blobs import Blobs
    from cachefs.cluster.peers.server.serving import Server

    files = credentials.tls()
    trust = TlsTrust("owner", files["ca"], files["certificate"], files["key"], admit="somebody else".__eq__)
    server = Server(Blobs((home,)), trust)
    node = Node("owner", "127.0.0.1", server.listen("127.0.0.1", 0), 1)
    try:
        async with asking(credentials.client("tls")) as peers:
            with pytest.raises(PeerRefused, match="is admitted"):
                await peers.get(node, ITEM)
    finally:
        await server.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: owner\r\n\r\n",
        struct.pack("<I", 2**31),
        struct.pack("<I", 5) + b"hello",
        struct.pack("<I", 4096) + bytes(4096),
        b"\x16\x03\x01" + bytes(200),
    ],
    ids=["http", "long", "short", "zeros", "tls"],
)
@pytest.mark.parametrize("kind", ["tls", "all"])
async def test_strangers_hear_nothing_of_objects(home, credentials, kind, said):
    with served(home, credentials.server(kind), limits={"handshake": 1.0}) as owner:
        heard = await everything_sent(owner.node, said)
        assert len(heard) < 100  # TLS says goodbye in a few bytes
        assert CONTENT[:20] not in heard


async def test_a_request_in_place_of_the_proof_gets_nothing(home, credentials):
    hello = wire.encode(Hello(wire.PROTOCOL, "reader", "owner", os.urandom(32)))
    request = wire.encode(wire.Request([ITEM]))
    said = b"".join(struct.pack("<I", len(part)) + part for part in (hello, request, request)) + bytes(16)
    with served(home, credentials.secret()) as owner:
        heard = await everything_sent(owner.node, said)
        assert len(heard) < 300
        assert CONTENT[:20] not in heard


async def test_what_was_overheard_cannot_be_replayed(home, credentials):
    overheard = []

    def listen(data: bytes) -> bytes:
        overheard.append(data)
        return data

    with served(home, credentials.secret()) as owner:
        async with in_the_middle(owner.node, up=listen) as node, asking(credentials.client("all")) as peers:
            assert bytes((await peers.get(node, ITEM)).data) == CONTENT
        heard = await everything_sent(owner.node, b"".join(overheard))
        assert len(heard) < 300
        assert CONTENT[:20] not in heard
        assert "does not know this cluster's secret" in owner.log.read_text()


async def test_a_server_cannot_be_played_by_an_echo(credentials):
    """Who sends everything back, proof included, proves nothing."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        node = Node("owner", "127.0.0.1", server.sockets[0].getsockname()[1], 1)
        async with asking(credentials.client("all")) as peers:
            with pytest.raises((PeerRefused, PeerWrong)):
                await peers.get(node, ITEM)
    finally:
        server.close()


def flip(*places: int):
    """Changes one bit of what passes at each of these places."""
    passed = 0

    def change(data: bytes) -> bytes:
        nonlocal passed
        changed = bytearray(data)
        for place in places:
            if 0 <= place - passed < len(data):
                changed[place - passed] ^= 4
        passed += len(data)
        return bytes(changed)

    return change


# Beyond all handshakes, which are shorter, and before the end of the object.
WITHIN = 50_000


@pytest.mark.parametrize("kind", KINDS)
async def test_bytes_that_are_changed_on_the_way_are_found(home, credentials, kind):
    with served(home, credentials.server(kind)) as owner:
        change = flip(WITHIN, WITHIN + len(CONTENT))  # of the first answer, and of the second
        async with in_the_middle(owner.node, down=change) as node, asking(credentials.client(kind)) as peers:
            with pytest.raises(PeerError):
                await peers.get(node, ITEM)
            (state,) = peers.status()
            assert state.failures == 1
            assert state.objects == 0


@pytest.mark.parametrize("kind", ["all", "headers"])
async def test_bytes_that_are_changed_once_are_asked_for_again(home, credentials, kind, caplog):
    with served(home, credentials.server(kind)) as owner:
        async with in_the_middle(owner.node, down=flip(WITHIN)) as node, asking(credentials.client(kind)) as peers:
            assert bytes((await peers.get(node, ITEM)).data) == CONTENT
            (state,) = peers.status()
            assert (state.failures, state.objects) == (0, 1)
    assert "do not match their digest" in caplog.text


@pytest.mark.parametrize("at", [10, 50, 80, 110, 140, 165])
async def test_a_request_that_is_changed_on_the_way_is_not_answered(home, credentials, at):
    with served(home, credentials.secret()) as owner:
        async with in_the_middle(owner.node, up=flip(at)) as node, asking(credentials.client("all")) as peers:
            with pytest.raises(PeerError):
                await peers.get(node, ITEM, deadline=15.0)  # a length that was changed may only be waited out


async def test_secrets_are_told_nobody(home, credentials, caplog):
    caplog.set_level(logging.DEBUG)
    secret = (credentials.folder / "secret").read_text().strip()
    with served(home, credentials.secret()) as owner:
        trust = credentials.client("all")
        async with asking(trust) as peers:
            await peers.get(owner.node, ITEM)
            told = f"{peers.status()} {trust!r} {vars(peers)} {caplog.text} {owner.log.read_text()}"
        for name in ("cmdline", "environ"):
            told += Path(f"/proc/{owner.process.pid}/{name}").read_bytes().decode(errors="replace")
    assert secret not in told


# --- files ----------------------------------------------------------------------------------------------------


def test_keys_and_secrets_are_for_their_owner_alone(credentials, tmp_path):
    for name in ("ca.key", "owner.key", "secret"):
        assert stat.S_IMODE((credentials.folder / name).stat().st_mode) == 0o600
    loose = tmp_path / "secret"
    loose.write_bytes(b"x" * 64)
    loose.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        SecretTrust.load("reader", loose)
    loose.chmod(0o600)
    assert repr(SecretTrust.load("reader", loose)) == "SecretTrust('reader')"
    loose.write_bytes(b"guess me\n")
    with pytest.raises(ConfigError, match="shorter than"):
        SecretTrust.load("reader", loose)
    with pytest.raises(ConfigError, match="cannot be read"):
        SecretTrust.load("reader", tmp_path / "nowhere")


def test_an_authority_is_made_once_and_issues_for_names_that_can_be(tmp_path):
    folder = tmp_path / "pki"
    with pytest.raises(ConfigError, match="has no authority"):
        pki.issue(folder, "node-1")
    pki.make_authority(folder)
    with pytest.raises(ConfigError, match="has an authority already"):
        pki.make_authority(folder)
    for name in ("", "../node", "a b", "-a", "a" * 64, "ca", "a..b"):
        with pytest.raises(ConfigError, match="node name"):
            pki.issue(folder, name)
    certificate, key = pki.issue(folder, "node-1.rack-2")
    TlsTrust("node-1.rack-2", folder / "ca.pem", certificate, key)
    other, _ = pki.issue(folder, "node-2")
    with pytest.raises(ConfigError, match="cannot be used"):
        TlsTrust("node-2", folder / "ca.pem", other, key)
    pki.make_secret(folder / "secret")
    with pytest.raises(ConfigError, match="is there already"):
        pki.make_secret(folder / "secret")


def test_the_command_makes_what_nodes_need(tmp_path, capsys):
    cachefs = CommandLine(capsys)
    folder = tmp_path / "pki"
    assert "ca.pem: goes to every node" in cachefs("pki", "init", folder).ok().said
    assert "node-2.key: go to node-2" in cachefs("pki", "issue", folder, "node-1", "node-2").ok().said
    TlsTrust("node-1", folder / "ca.pem", folder / "node-1.pem", folder / "node-1.key")
    cachefs("pki", "secret", tmp_path / "secret").ok()
    SecretTrust.load("node-1", tmp_path / "secret")
    secret = (tmp_path / "secret").read_text().strip()
    assert secret not in cachefs("pki", "secret", tmp_path / "secret").said
    cachefs("pki", "init", folder).failed(2, "has an authority already")
    cachefs("pki", "issue", folder, "../x").failed(2, "node name")
    cachefs("pki", "issue", tmp_path, "node-1").failed(2, "cachefs pki init")
    cachefs("pki", "init", "/proc/none").failed(2, "cannot be written")


def test_nothing_is_served_without_trust(home):
    with pytest.raises(AssertionError, match="never without"), served(home, {}):
        pass


async def test_a_channel_takes_no_message_beyond_its_limit():
    one, other = socket.socketpair()
    with one:
        channel = Channel(other)
        one.send(struct.pack("<I", 1000))
        with pytest.raises(PeerWrong, match="1000 bytes"):
            await channel.receive_message(999)
        channel.close()


def test_what_is_signed_is_one_of_two(tmp_path):
    pki.make_secret(tmp_path / "secret")
    with pytest.raises(ConfigError, match="all or headers"):
        open_trust("node", str(tmp_path / "secret"), sign="nothing")
    with pytest.raises(ConfigError, match="TLS protects every byte"):
        open_trust("node", ca="ca", certificate="certificate", key="key", sign="headers")

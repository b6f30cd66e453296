"""Catalogs between two processes, one of which may be wrong, or die: what is put in place is right, or nothing is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import datasets
from cachefs.catalog import Builder, Catalog
from cachefs.catalog.keys import add_keys
from cachefs.cluster.membership import Alone
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers import catalogs, wire
from cachefs.cluster.peers.catalogs import Ask, Block, Edition, Renew, State, Take, edition_of, packed, state_of
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.wire import Item
from cachefs.cluster.placement import Placement, catalog_key
from cachefs.config import CacheConfig
from cachefs.datasets import DatasetRecord
from cachefs.digest import BLOCK_SIZE, block_count, content_key
from cachefs.errors import CacheFull, PeerError, PeerHasNot, PeerWrong
from cachefs.fetcher import arriving
from cachefs.fetcher import editions as module
from cachefs.fetcher.editions import Editions
from cachefs.fetcher.tally import Tally
from cachefs.messages import Entry
from cachefs.origin import OriginSpec
from cachefs_sidecar.testbed.fetchers import stop_fetcher
from tests.peers import Credentials, Served, asking, served

# Nobody listens there: nothing of these tests asks the origin.
OPTIONS = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}
IDENTITY = OriginSpec("s3", OPTIONS, {}).identity
RECORD = DatasetRecord(IDENTITY, "b")


@pytest.fixture(scope="module")
def credentials(tmp_path_factory) -> Credentials:
    return Credentials(tmp_path_factory.mktemp("credentials"))


def build(file: Path, names: list[str], *, root: str = "b", previous: Catalog | None = None) -> str:
    builder = Builder(file, identity=IDENTITY, root=root, previous=previous, resume=False)
    for number, name in enumerate(names):
        builder.add(Entry(f"{root}/{name}", number, number, f"v{number}"))
    with builder.seal() as catalog:
        return catalog.summary.snapshot


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A catalog of several blocks."""
    file: Path = tmp_path_factory.mktemp("large") / "c.sqlite"
    build(file, [f"{n % 7}/{n:05d}{'x' * 200}" for n in range(50_000)])
    assert block_count(file.stat().st_size) >= 3
    return file


@pytest.fixture
def small(tmp_path) -> Path:
    file: Path = tmp_path / "small.sqlite"
    build(file, [f"{n % 7}/{n}" for n in range(500)])
    return file


def serve(credentials: Credentials, home: Path, catalog: Path) -> contextlib.AbstractContextManager[Served]:
    """A node that has this catalog."""
    put(home, catalog)
    dataset = {"protocol": "s3", "root": "b", "options": OPTIONS, "redacted": False}
    return served(home, credentials.secret(), datasets=[dataset])


def put(home: Path, catalog: Path, snapshot: str = "") -> None:
    with Catalog.open(catalog) as opened:
        snapshot = snapshot or opened.summary.snapshot
    (home / "datasets").mkdir(parents=True, exist_ok=True)
    folder = home / "catalogs" / RECORD.id
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(catalog, folder / f"{snapshot}.sqlite")
    datasets.save(home, replace(RECORD, snapshot=snapshot, catalog=f"{snapshot}.sqlite", edition=7))


async def ask(peers: Peers, node: Served, word: catalogs.Word, **item: Any) -> State:
    piece = await peers.get(node.node, Item(RECORD.id, word=packed(word), **item), fetch=True)
    return state_of(piece.data)


async def offered(peers: Peers, node: Served) -> Edition:
    state = await ended(peers, node, Ask())
    assert state.edition is not None
    return state.edition


async def ended(peers: Peers, node: Served, word: catalogs.Word) -> State:
    while (state := await ask(peers, node, word)).is_ == catalogs.WORKS:
        await asyncio.sleep(0.01)
    return state


@pytest.fixture
def config(tmp_path) -> CacheConfig:
    config = CacheConfig.make(tmp_path / "here", min_free=0)
    config.home.mkdir()
    return config


async def bring(peers: Peers, node: Served, edition: Edition, config: CacheConfig, tally: Tally | None = None) -> int:
    return await arriving.bring(peers, node.node, edition, RECORD, config.home, 0, tally or Tally(""))


def sealed(file: Path, catalog: Path) -> dict[str, bytes]:
    """The same catalog with content keys, as `file`; its keys by path."""
    with Catalog.open(catalog) as plain:
        keys = {path: content_key(path.encode()) for path, _ in plain.files()}
        add_keys(plain, ((row.id, keys[path]) for path, row in plain.files()), file)
    return keys


def keys_of(file: Path) -> dict[str, bytes | None]:
    with Catalog.open(file) as catalog:
        return {path: catalog.key(row.id) for path, row in catalog.files()}


def arrived(config: CacheConfig) -> list[str]:
    return sorted(path.name for path in (config.home / "catalogs" / RECORD.id).iterdir())


async def test_a_catalog_of_several_blocks_comes_as_it_is(credentials, tmp_path, large, config):
    with serve(credentials, tmp_path / "owner", large) as node:
        async with asking(credentials.client("headers")) as peers:
            edition = await offered(peers, node)
            assert edition == edition_of(7, edition.snapshot, large)
            tally = Tally("")
            with Catalog.open(large) as catalog:
                assert await bring(peers, node, edition, config, tally) == catalog.summary.last_id
    assert arrived(config) == [f"{edition.snapshot}.arrived"]
    assert (config.home / "catalogs" / RECORD.id / arrived(config)[0]).read_bytes() == large.read_bytes()
    assert tally.what == "names checked"
    assert tally.done >= 50_000


async def test_numbers_that_mean_other_things_here_are_given_anew(credentials, tmp_path, small, config):
    with serve(credentials, tmp_path / "owner", small) as node:
        async with asking(credentials.client("headers")) as peers:
            edition = await offered(peers, node)
            build(tmp_path / "ours.sqlite", [f"other/{n}" for n in range(20)])
            put(config.home, tmp_path / "ours.sqlite")
            record = datasets.load(config.home, IDENTITY, "b")
            assert record is not None
            with Catalog.open(tmp_path / "ours.sqlite") as ours:
                last_id = ours.summary.last_id
            new_last = await arriving.bring(peers, node.node, edition, record, config.home, last_id, Tally(""))
    with Catalog.open(arriving.arrived(config.home, RECORD.id, edition.snapshot)) as catalog:
        assert catalog.summary.snapshot == edition.snapshot
        assert min(row.id for _, row in catalog.files()) > last_id
        assert new_last == catalog.summary.last_id


@pytest.mark.parametrize("ours", [False, True])
async def test_content_keys_come_along(credentials, tmp_path, small, config, ours):
    """Also where the numbers are given anew."""
    keys = sealed(tmp_path / "sealed.sqlite", small)
    with serve(credentials, tmp_path / "owner", tmp_path / "sealed.sqlite") as node:
        async with asking(credentials.client("headers")) as peers:
            edition = await offered(peers, node)
            assert edition.keys == len(keys) == 500
            record, last_id = RECORD, 0
            if ours:
                build(tmp_path / "ours.sqlite", [f"other/{n}" for n in range(20)])
                put(config.home, tmp_path / "ours.sqlite")
                record, last_id = datasets.load(config.home, IDENTITY, "b") or RECORD, 28
            await arriving.bring(peers, node.node, edition, record, config.home, last_id, Tally(""))
    assert keys_of(arriving.arrived(config.home, RECORD.id, edition.snapshot)) == keys


async def test_what_stays_the_same_keeps_its_key_when_a_node_lists_that_has_none(credentials, tmp_path, small, config):
    keys = sealed(tmp_path / "sealed.sqlite", small)
    put(config.home, tmp_path / "sealed.sqlite")
    with Catalog.open(small) as previous:
        build(tmp_path / "newer.sqlite", [f"{n % 7}/{n + (n == 3) * 1000}" for n in range(500)], previous=previous)
        last_id = previous.summary.last_id
    with serve(credentials, tmp_path / "owner", tmp_path / "newer.sqlite") as node:
        async with asking(credentials.client("headers")) as peers:
            edition, record = await offered(peers, node), datasets.load(config.home, IDENTITY, "b")
            assert record is not None
            await arriving.bring(peers, node.node, edition, record, config.home, last_id, Tally(""))
    del keys["b/3/3"]
    assert keys_of(arriving.arrived(config.home, RECORD.id, edition.snapshot)) == {**keys, "b/3/1003": None}


async def test_content_keys_that_were_not_named_are_not_taken(credentials, tmp_path, small, config):
    """Else a node that says it has more would be brought from again and again."""
    sealed(tmp_path / "sealed.sqlite", small)
    with serve(credentials, tmp_path / "owner", tmp_path / "sealed.sqlite") as node:
        async with asking(credentials.client("headers")) as peers:
            edition = msgspec.structs.replace(await offered(peers, node), keys=501)
            with pytest.raises(PeerWrong, match="content keys"):
                await bring(peers, node, edition, config)
    assert arrived(config) == []


async def test_a_catalog_that_was_sealed_meanwhile_is_given_at_once(credentials, tmp_path, small, config):
    """Under the same name, before anybody has asked the server which it has now."""
    with serve(credentials, tmp_path / "owner", small) as node:
        async with asking(credentials.client("headers")) as peers:
            before = await offered(peers, node)
            keys = sealed(tmp_path / "sealed.sqlite", small)
            (file,) = (tmp_path / "owner/catalogs" / RECORD.id).iterdir()
            os.replace(tmp_path / "sealed.sqlite", file)
            await bring(peers, node, edition_of(8, before.snapshot, file), config)
    assert keys_of(arriving.arrived(config.home, RECORD.id, before.snapshot)) == keys


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


def _rename(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("UPDATE entries SET name = x'2e2e' WHERE id = (SELECT max(id) FROM entries)")
    database.close()


def _swap(file: Path) -> None:
    """A right catalog of other names, under this snapshot's name."""
    file.unlink()
    build(file, ["another/name"])


def _another_dataset(file: Path) -> None:
    file.unlink()
    build(file, [f"{n % 7}/{n}" for n in range(500)], root="other")


def _no_catalog(file: Path) -> None:
    file.write_bytes(b"SQLite format 3\0" + os.urandom(5000))


def _gone(file: Path) -> None:
    file.unlink()


# What is done to the owner's file, and whether before it names it: a node that lies, or one that changes under way.
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", [_flip, _cut, _rename, _swap, _another_dataset, _no_catalog])
async def test_a_wrong_catalog_is_found_and_its_node_left_alone(credentials, tmp_path, small, config, change, before):
    with serve(credentials, tmp_path / "owner", small) as node:
        (file,) = (tmp_path / "owner/catalogs" / RECORD.id).iterdir()
        async with asking(credentials.client("headers")) as peers:
            if before:
                change(file)
            edition = await offered(peers, node)
            if not before:
                change(file)
            with pytest.raises(PeerWrong):
                await bring(peers, node, edition, config)
            (row,) = peers.status()
            assert row.wrong == 1
            assert row.state == "open"
    assert arrived(config) == []


async def test_what_the_owner_does_not_have_any_more_is_no_wrong(credentials, tmp_path, small, config):
    with serve(credentials, tmp_path / "owner", small) as node:
        (file,) = (tmp_path / "owner/catalogs" / RECORD.id).iterdir()
        async with asking(credentials.client("headers")) as peers:
            edition = await offered(peers, node)
            _gone(file)
            with pytest.raises(PeerHasNot):
                await bring(peers, node, edition, config)
            assert peers.status()[0].wrong == 0
    assert arrived(config) == []


async def test_an_owner_that_dies_in_the_middle_leaves_nothing(credentials, tmp_path, large, config, monkeypatch):
    monkeypatch.setattr(arriving, "AT_ONCE", 1)

    class Killing(Tally):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if (name, value) == ("done", 2):
                node.kill()

    with serve(credentials, tmp_path / "owner", large) as node:
        async with asking(credentials.client("headers")) as peers:
            edition = await offered(peers, node)
            with pytest.raises(PeerError) as caught:
                await bring(peers, node, edition, config, Killing(""))
            assert not isinstance(caught.value, PeerWrong)
    assert arrived(config) == []


async def test_no_more_is_taken_than_there_is_room_for(credentials, tmp_path, small, config):
    with serve(credentials, tmp_path / "owner", small) as node:
        async with asking(credentials.client("headers")) as peers:
            edition = msgspec.structs.replace(await offered(peers, node), size=catalogs.MOST_SIZE)
            with pytest.raises(CacheFull):
                await bring(peers, node, edition, config)
    assert arrived(config) == []


# --- what is said ---


async def test_a_node_speaks_of_what_it_shares_and_of_nothing_else(credentials, tmp_path, small):
    with serve(credentials, tmp_path / "owner", small) as node:
        async with asking(credentials.client("all")) as peers:
            edition = await offered(peers, node)
            for dataset in ("0" * 32, "../" + "a" * 29, ""):
                with pytest.raises(PeerHasNot):
                    await peers.get(node.node, Item(dataset, word=packed(Ask())), fetch=True)
                for start in (0, 2**62):
                    item = Item(dataset, offset=start, length=10, word=packed(Block(edition.snapshot, edition.key)))
                    with pytest.raises(PeerHasNot):
                        await peers.get(node.node, item, fetch=True)
            # A length that is none, a part beyond the end, another key: what there is of it, or nothing.
            for item in (
                Item(RECORD.id, word=packed(Block(edition.snapshot, edition.key))),
                Item(RECORD.id, length=10, word=packed(Block(edition.snapshot, bytes(16)))),
                Item(RECORD.id, length=10, word=packed(Block("0" * 32, edition.key))),
            ):
                with pytest.raises(PeerHasNot):
                    await peers.get(node.node, item, fetch=True)
            beyond = Item(RECORD.id, offset=2**62, length=BLOCK_SIZE, word=packed(Block(edition.snapshot, edition.key)))
            assert not (await peers.get(node.node, beyond, fetch=True)).data
            newer = msgspec.structs.replace(edition, number=8)
            assert (await ended(peers, node, Take("nobody", newer, switch=True))).is_ == catalogs.FAILED
            assert peers.status()[0].wrong == 0
    stop_fetcher(tmp_path / "owner")


NO_WORDS = [
    b"\xc1",
    b"x" * wire.MOST_WORD,
    wire.encode(["ask", True, "more"]),
    wire.encode(["renew", b"short"]),
    wire.encode(["block", "../../../../etc/passwd", bytes(16)]),
    wire.encode(["block", "A" * 32, bytes(16)]),
    wire.encode(["take", "", [1, "0" * 32, 1, bytes(16)], True]),
    wire.encode(["take", "n", [-1, "0" * 32, 1, bytes(16)], True]),
    wire.encode(["take", "n", [catalogs.MOST_NUMBER + 1, "0" * 32, 1, bytes(16)], True]),
    wire.encode(["take", "n", [1, "0" * 33, 1, bytes(16)], True]),
    wire.encode(["take", "n", [1, "0" * 32 + "\n", 1, bytes(16)], True]),
    wire.encode(["take", "n", [1, "0" * 32, 0, bytes(16)], True]),
    wire.encode(["take", "n", [1, "0" * 32, catalogs.MOST_SIZE + 1, bytes(16)], True]),
    wire.encode(["take", "n", [1, "0" * 32, 1, bytes(17)], True]),
    wire.encode(["take", "n", [1, "0" * 32, 1, bytes(16), -1], True]),
    wire.encode(["drop", "everything"]),
]


@pytest.mark.parametrize("word", NO_WORDS, ids=range(len(NO_WORDS)))
def test_what_is_no_word_is_refused(word):
    with pytest.raises(PeerWrong):
        catalogs.word_of(word)


async def test_what_is_no_word_gets_nothing_and_the_node_serves_on(credentials, tmp_path, small):
    with serve(credentials, tmp_path / "owner", small) as node:
        for word in NO_WORDS:
            async with asking(credentials.client("headers")) as peers:
                with pytest.raises(PeerError):
                    await peers.get(node.node, Item(RECORD.id, word=word), fetch=True)
        async with asking(credentials.client("headers")) as peers:
            assert (await offered(peers, node)).number == 7
            assert node.process.poll() is None


_editions = st.builds(
    Edition,
    number=st.integers(0, catalogs.MOST_NUMBER),
    snapshot=st.text("0123456789abcdef", min_size=32, max_size=32),
    size=st.integers(1, catalogs.MOST_SIZE),
    key=st.binary(min_size=16, max_size=16),
    keys=st.integers(0, 2**62),
)
_words = st.one_of(
    st.builds(Ask, make=st.booleans()),
    st.builds(Renew, ticket=st.binary(min_size=16, max_size=16)),
    st.builds(Take, node=st.text(min_size=1, max_size=50), edition=_editions, switch=st.booleans()),
    st.builds(Block, snapshot=st.just("0" * 32), key=st.binary(min_size=16, max_size=16)),
)
_states = st.builds(
    State,
    is_=st.sampled_from([catalogs.NONE, catalogs.WORKS, catalogs.FAILED]),
    edition=st.none() | _editions,
    done=st.integers(0, 2**62),
    what=st.text(max_size=40),
    why=st.text(max_size=400),
    behind=st.lists(st.tuples(st.text(min_size=1, max_size=253), st.text(max_size=400)), max_size=3),
)


@given(_words)
def test_a_word_arrives_as_it_was_meant(word):
    assert catalogs.word_of(packed(word)) == word
    assert len(packed(word)) <= wire.MOST_WORD
    item = Item("d" * 32, word=packed(word))
    assert wire.decode_request(wire.encode(wire.Request([item], fetch=True))).items == [item]


@given(_states)
def test_a_state_arrives_as_it_was_meant(state):
    assert state_of(packed(state)) == state


@given(st.one_of(st.binary(max_size=200), _words.map(packed), _states.map(packed)), st.data())
def test_random_and_changed_bytes_are_a_bounded_word_or_none(data, draw):
    changed = bytearray(data)
    if changed:
        changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(PeerWrong):
        word = catalogs.word_of(bytes(changed))
        if isinstance(word, Take):
            assert 1 <= word.edition.size <= catalogs.MOST_SIZE
    with contextlib.suppress(PeerWrong):
        state = state_of(bytes(changed))
        assert len(state.behind) <= catalogs.MOST_BEHIND
        assert state.done >= 0


def test_an_answer_larger_than_answers_are_is_none():
    with pytest.raises(PeerWrong):
        state_of(bytes(catalogs.MOST_ANSWER + 1))
    with pytest.raises(PeerWrong):
        state_of(packed(State(catalogs.HAS)))


# --- who is asked ---


def editions(config: CacheConfig, peers: Peers, *others: Node) -> Editions:
    """As a node sees it whose turn it is never: the others come before it in the order of this dataset."""
    for number in range(1000):
        me = Node(f"me-{number}", "127.0.0.1", 1, 1)
        ranking = Placement([me, *others]).ranking(catalog_key(RECORD.identity, RECORD.root), len(others) + 1)
        if ranking[-1] == me:
            members = Alone(me)
            members.view = frozenset({me, *others})
            return Editions(config.home, members, peers)
    raise AssertionError("by chance")


async def test_a_node_that_stands_still_is_passed_over(credentials, tmp_path, small, config, monkeypatch):
    """A process that is stopped answers nothing and refuses nothing: the slowest way to be gone."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
    with serve(credentials, tmp_path / "owner", small) as node:
        async with asking(credentials.client("headers")) as peers:
            ask = editions(config, peers, node.node)
            found = await ask.found(RECORD, False, Tally(""))
            assert found is not None
            assert found.edition.number == 7
            os.kill(node.process.pid, signal.SIGSTOP)
            try:
                for refresh in (False, True):
                    assert await ask.found(RECORD, refresh, Tally("")) is None
                assert await ask.newest(RECORD) is None
                ready, behind = await ask.hand_out(RECORD, found.edition, Tally(""))
                assert (ready, [name for name, _ in behind]) == ([], ["owner"])
            finally:
                os.kill(node.process.pid, signal.SIGCONT)


async def test_a_node_whose_listing_fails_says_why(credentials, tmp_path, config, caplog):
    """Its origin cannot be reached: this node may reach it, and lists by itself."""
    (tmp_path / "owner").mkdir()
    dataset = {"protocol": "s3", "root": "b", "options": {**OPTIONS, "no_such_option": 1}, "redacted": False}
    with served(tmp_path / "owner", credentials.secret(), datasets=[dataset]) as node:
        async with asking(credentials.client("headers")) as peers:
            ask = editions(config, peers, node.node)
            assert await ask.found(RECORD, False, Tally("")) is None
            assert peers.status()[0].wrong == 0
    stop_fetcher(tmp_path / "owner")

"""One node lists for all, and all serve the same: real processes, one S3 origin behind a proxy that counts listings."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.client.aio import AsyncConnection
from cachefs.cluster.nodes import Node as Member
from cachefs.cluster.placement import Placement, catalog_key
from cachefs.digest import content_key
from cachefs.errors import CatalogError, ConfigError, PeerError
from cachefs.messages import Adopt
from cachefs.origin import OriginSpec
from cachefs_sidecar.testbed.nodes import SECONDS, STARTING_SECONDS
from tests.command_line import CommandLine, credentials, s3
from tests.nodes import Node, cluster, fill

# A cluster may take two minutes to start (testbed/nodes).
pytestmark = pytest.mark.timeout(300)

COUNT = 30


@pytest.fixture
def objects(throttled):
    return fill(throttled, COUNT)


def listings(bucket) -> int:
    count: int = bucket.throttle.reset().requests.get("LIST", 0)
    return count


def catalog_of(node: Node) -> Path:
    """What a reader that starts now is shown, found out as such a reader does: without asking anybody."""
    file = datasets.catalog_file(node.home, next(datasets.load_all(node.home)))
    assert file is not None
    return file


def names(node: Node) -> list[str]:
    with Catalog.open(catalog_of(node)) as catalog:
        return sorted(path for path, _ in catalog.files())


def wait_for_names(node: Node, expected: list[str]) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while names(node) != expected:
        assert time.monotonic() < deadline, (names(node), node.log.read_text())
        time.sleep(0.05)


def in_order(nodes: list[Node]) -> list[Node]:
    """The nodes as they come for this dataset: the first lists."""
    members = {node.name: node for node in nodes}
    placement = Placement([Member(node.name, node.address, node.port) for node in nodes])
    identity = OriginSpec("s3", nodes[0].options, {}).identity
    key = catalog_key(identity, nodes[0].session.root)
    return [members[each.name] for each in placement.ranking(key, len(nodes))]


def serve_again(node: Node, nodes: list[Node], folder: Path) -> None:
    node.serve("static:" + ",".join(each.name for each in nodes), ["--secret", str(folder / "secret")])
    node.wait_until_it_serves()


def test_one_lists_and_the_others_receive_the_snapshot(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 3) as nodes:
        throttled.throttle.reset()
        with ThreadPoolExecutor(3) as pool:  # all at once, as the pods of one job start
            made = list(pool.map(lambda node: node.connection.make_catalog(), nodes))
        once = listings(throttled)
        assert {(each.snapshot, each.edition) for each in made} == {(made[0].snapshot, made[0].edition)}
        assert all(names(node) == sorted(objects) for node in nodes)

        for number, node in enumerate(nodes):
            added = throttled.put(f"set/new-{number}.jpg", b"new")
            objects[added] = b"new"
            again = node.connection.make_catalog(refresh=True)
            assert listings(throttled) == once  # as many as the first time: those of one node
            assert (again.changed, again.behind) == (True, [])
            assert all(names(each) == sorted(objects) for each in nodes)

        # One line of inode numbers: what was brought is what was made, bit for bit.
        assert len({catalog_of(node).read_bytes() for node in nodes}) == 1

        same = nodes[0].connection.make_catalog(refresh=True)
        assert not same.changed
        records = [next(datasets.load_all(node.home)) for node in nodes]
        assert {(each.snapshot, each.edition) for each in records} == {(same.snapshot, same.edition)}


def test_a_node_that_was_away_is_named_and_follows(throttled, objects, tmp_path):
    """Also the one whose turn it is to list: it must not list again when somebody new asks it."""
    with cluster(tmp_path, throttled, 3) as nodes:
        owner, second, third = in_order(nodes)
        for node in (owner, second):
            node.connection.make_catalog()
        for number, (away, here) in enumerate(((second, owner), (owner, second))):
            away.kill()
            before, added = sorted(objects), throttled.put(f"set/new-{number}.jpg", b"new")
            objects[added] = b"new"
            made = here.connection.make_catalog(refresh=True)
            assert made.changed
            assert [name for name, _ in made.behind] == [away.name]
            assert names(away) == before
            listings(throttled)
            serve_again(away, nodes, tmp_path)
            wait_for_names(away, sorted(objects))
        assert third.connection.make_catalog().snapshot == made.snapshot
        assert listings(throttled) == 0


def test_an_owner_that_has_lost_its_cache_brings_the_catalog_from_the_others(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 3) as nodes:
        owner, second, third = in_order(nodes)
        made = second.connection.make_catalog()
        throttled.put("set/new.jpg", b"not listed yet")
        listings(throttled)
        owner.leave()
        assert owner.connection.shutdown()
        owner.connection.close()
        for file in (owner.home / "datasets").iterdir():
            file.unlink()
        serve_again(owner, nodes, tmp_path)
        owner.wait_for(3)
        assert third.connection.make_catalog().snapshot == made.snapshot
        assert listings(throttled) == 0


def test_when_the_owner_dies_while_it_lists_whoever_waits_lists(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 2) as nodes:
        owner, asker = in_order(nodes)
        throttled.throttle.hang("", times=1)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(asker.connection.make_catalog)
            deadline = time.monotonic() + STARTING_SECONDS
            while not throttled.throttle.traffic().requests.get("LIST", 0):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            owner.kill()
            assert waiting.result(3 * SECONDS).files == COUNT
        assert names(asker) == sorted(objects)


def test_a_node_that_listed_by_itself_joins_and_no_inode_number_changes_its_meaning(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 2) as nodes:
        _, joining = in_order(nodes)
        joining.leave()
        joining.wait_for(0)
        throttled.put("set/0000.jpg", b"other")
        alone = joining.connection.make_catalog()
        with Catalog.open(Path(alone.file)) as catalog:
            before = {row.id: (path, row.version) for path, row in catalog.files()}
        # What the cluster has is newer, has other numbers, and another name among those that both know.
        added = throttled.put("set/0000a.jpg", b"new")
        in_order(nodes)[0].connection.make_catalog()
        serve_again(joining, nodes, tmp_path)
        wait_for_names(joining, sorted([*objects, added]))
        with Catalog.open(catalog_of(joining)) as catalog:
            after = {row.id: (path, row.version) for path, row in catalog.files()}
        assert all(after[id] == before[id] for id in after.keys() & before.keys())
        assert len(after.keys() & before.keys()) == COUNT


async def test_a_node_that_lists_takes_no_other_catalog_meanwhile(throttled, objects, tmp_path):
    """Both would give out the inode numbers that come next."""
    with cluster(tmp_path, throttled, 2) as nodes:
        owner, other = in_order(nodes)
        owner.connection.make_catalog()
        throttled.put("set/new.jpg", b"new")
        throttled.throttle.delay(60.0, "")
        record = next(datasets.load_all(owner.home))
        newer = partial(
            Adopt,
            dataset=record.id,
            node=other.name,
            edition=record.edition + 10**9,
            snapshot="0" * 32,
            size=1,
            key=bytes(16),
            switch=True,
        )
        fetcher = AsyncConnection(owner.config, None)
        try:
            throttled.throttle.reset()
            listing = asyncio.create_task(asyncio.to_thread(owner.connection.make_catalog, refresh=True))
            while not throttled.throttle.traffic().requests.get("LIST", 0):
                await asyncio.sleep(0.02)
            with pytest.raises(PeerError, match="being listed"):
                await fetcher.work(lambda _, id: newer(id=id), lambda progress: None)
            throttled.throttle.heal()
            throttled.throttle.let_pass()
            made = await listing
            assert made.changed
            assert made.edition > record.edition
        finally:
            throttled.throttle.heal()
            throttled.throttle.let_pass()
            await fetcher.close()


def keys(node: Node) -> dict[str, bytes | None]:
    with Catalog.open(catalog_of(node)) as catalog:
        return {path: catalog.key(row.id) for path, row in catalog.files()}


def test_what_one_node_sealed_all_have(throttled, objects, tmp_path, monkeypatch, capsys):
    """A newer edition of the same snapshot: told as a refresh is, and followed by who was away."""
    run = CommandLine(capsys)
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    with cluster(tmp_path, throttled, 3) as nodes:
        owner, sealing, away = in_order(nodes)
        made = [node.connection.make_catalog() for node in nodes].pop()
        away.kill()
        done = run("seal", throttled.url, "--cache-dir", sealing.home, *s3(throttled.options), "--json")
        assert done.code == 1
        assert done.json["sealed"] == COUNT
        assert [each["node"] for each in done.json["behind"]] == [away.name]
        right = {path: content_key(data) for path, data in objects.items()}
        assert keys(owner) == keys(sealing) == right
        assert set(keys(away).values()) == {None}
        serve_again(away, nodes, tmp_path)
        now = next(datasets.load_all(sealing.home))
        deadline = time.monotonic() + STARTING_SECONDS
        while next(datasets.load_all(away.home)).edition != now.edition:
            assert time.monotonic() < deadline, away.log.read_text()
            time.sleep(0.05)
        assert keys(away) == right
        assert {next(datasets.load_all(node.home)).edition for node in nodes} == {now.edition}
        assert now.snapshot == made.snapshot
        assert now.edition > made.edition

        # The keys of what stays the same outlive a refresh, whichever node lists.
        added = throttled.put("set/new.jpg", b"new")
        assert away.connection.make_catalog(refresh=True).changed
        assert [keys(node) for node in nodes] == [{**right, added: None}] * 3
        assert not [file for node in nodes for file in node.home.glob("catalogs/*/*") if file.suffix != ".sqlite"]


def test_a_catalog_that_follows_another_one_than_there_is_now_is_refused(throttled, objects, tmp_path):
    """What a command has made meanwhile would give numbers that were given away."""
    with cluster(tmp_path, throttled, 2) as nodes:
        for node in nodes:
            node.connection.make_catalog()
        before = next(datasets.load_all(nodes[0].home))
        file = catalog_of(nodes[0])
        shutil.copy(file, file.with_name("made.sqlite"))
        throttled.put("set/new.jpg", b"new")
        assert nodes[1].connection.make_catalog(refresh=True).changed
        with pytest.raises(ConfigError, match="run it again"):
            nodes[0].connection.take_catalog("made.sqlite", before.snapshot, before.last_id)
        now = next(datasets.load_all(nodes[0].home))
        # From here on it is what somebody listed: the others go over to it, too.
        taken = nodes[0].connection.take_catalog("made.sqlite", now.snapshot, now.last_id)
        assert taken.changed
        assert taken.edition > now.edition
        assert names(nodes[0]) == names(nodes[1]) == sorted(objects)
        # Its fetcher might have died before it answered, and then the next one is asked.
        os.link(catalog_of(nodes[0]), file.with_name("made.sqlite"))
        again = nodes[0].connection.take_catalog("made.sqlite", now.snapshot, now.last_id)
        assert (again.changed, again.snapshot, again.edition) == (True, taken.snapshot, taken.edition)
        # Or before the record named what it had put in place: then it is done once more.
        os.link(catalog_of(nodes[0]), file.with_name("made.sqlite"))
        last = next(datasets.load_all(nodes[0].home))
        assert nodes[0].connection.take_catalog("made.sqlite", last.snapshot, last.last_id).edition > taken.edition
        assert names(nodes[0]) == names(nodes[1]) == sorted(objects)
        assert {each.name for each in file.parent.iterdir()} <= {f"{n}.sqlite" for n in (before.snapshot, now.snapshot)}
        for wrong in ("made.sqlite", "../made.sqlite", "made"):
            with pytest.raises((CatalogError, ConfigError)):
                nodes[0].connection.take_catalog(wrong, taken.snapshot, now.last_id)


@pytest.mark.needs_fuse
def test_the_mounts_of_all_nodes_switch(throttled, objects, tmp_path, monkeypatch, capsys):
    run = CommandLine(capsys)
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    with cluster(tmp_path, throttled, 2) as nodes:
        points = []
        for number, node in enumerate(nodes):
            points.append(tmp_path / f"data-{number}")
            points[-1].mkdir()
            run(
                "mount", throttled.url, points[-1], "--cache-dir", node.home, "--min-free", "0", *s3(throttled.options)
            ).ok()
        try:
            old = {point: os.stat(point / "set/0001.jpg").st_ino for point in points}
            throttled.put("set/0000.jpg", b"another one")
            throttled.put("set/new.jpg", b"new")
            refreshed = run("refresh", points[0], "--json").ok().json
            assert refreshed[0]["behind"] == []
            assert [mount["changed"] for mount in refreshed[0]["mounts"]] == [2]
            for point in points:
                assert (point / "set/0000.jpg").read_bytes() == b"another one"
                assert (point / "set/new.jpg").read_bytes() == b"new"
                assert os.stat(point / "set/0001.jpg").st_ino == old[point]
        finally:
            for point in points:
                run("umount", point).ok()

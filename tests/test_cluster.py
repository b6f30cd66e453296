"""Several nodes, real processes, one S3 origin behind a counting proxy: each object is read from it once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cachefs.digest import BLOCK_SIZE
from cachefs.fetcher.service import FLUSH_SECONDS
from cachefs_sidecar.testbed.nodes import STARTING_SECONDS
from tests.nodes import Node, cluster, fill, slow_reads, stranger

# A cluster may take two minutes to start (testbed/nodes).
pytestmark = pytest.mark.timeout(300)

COUNT = 200


@pytest.fixture
def objects(throttled):
    return fill(throttled, COUNT)


def versions(node: Node, paths) -> dict[str, str]:
    return {path: node.connection.info(path).version for path in paths}


def read_all(node: Node, objects, known, order) -> None:
    for path in order:
        assert node.read(path, known[path], len(objects[path])) == objects[path]


def epoch(nodes, objects, known, seed: int) -> None:
    """Each object is read on one node, as the ranks of one job do it; in an order of its own each time."""
    order = random.Random(seed).sample(sorted(objects), len(objects))
    parts = [order[n :: len(nodes)] for n in range(len(nodes))]
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(lambda pair: read_all(pair[0], objects, known, pair[1]), zip(nodes, parts, strict=True)))


def origin_reads(bucket) -> int:
    return sum(bucket.throttle.reset().objects.values())


@pytest.mark.slow
def test_four_nodes_read_each_object_from_the_origin_once(throttled, objects, tmp_path):
    """All of them read everything, each in its own order: four jobs at once."""
    with cluster(tmp_path, throttled, 4) as nodes:
        known = versions(nodes[0], objects)
        throttled.throttle.reset()
        orders = [random.Random(n).sample(sorted(objects), COUNT) for n in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda pair: read_all(pair[0], objects, known, pair[1]), zip(nodes, orders, strict=True)))
        assert origin_reads(throttled) <= 1.01 * COUNT + 2 * len(slow_reads(nodes))
        assert all(node.counters()["peer_reads"] > COUNT / 2 for node in nodes)


class Epochs:
    """Of a cluster whose caches have room for `rooms` objects."""

    def __init__(self, bucket, nodes: list[Node], objects, rooms) -> None:
        self.bucket, self.nodes, self.objects, self.rooms = bucket, nodes, objects, rooms
        self.known = versions(nodes[0], objects)
        self.filler = random.Random(8).randbytes(3 * BLOCK_SIZE)
        self.large = bucket.put("filler", self.filler)
        self.version = nodes[0].connection.info(self.large).version

    def forget(self) -> None:
        """Drive out what is in memory, so that nothing but caches keeps anything from one epoch to the next: by a large
        object, when none has room for it.
        """
        for node in self.nodes:
            assert node.read_through(self.large, self.version, len(self.filler)) == self.filler

    def read(self, seed: int) -> tuple[int, int]:
        """(reads of the origin, at most so many of them because a node was slow)"""
        self.bucket.throttle.reset()
        slow_reads(self.nodes)
        epoch(self.nodes, self.objects, self.known, seed)
        traffic = self.bucket.throttle.reset()
        reads = sum(times for path, times in traffic.objects.items() if path in self.objects)
        return reads, 2 * len(slow_reads(self.nodes))

    def wait_for_all(self) -> None:
        """Until each knows what all can store."""
        sizes = sorted(node.config.size or 0 for node in self.nodes)
        for node in self.nodes:
            node.wait_until(lambda part: sorted(row["weight"] for row in part.get("nodes", ())) == sizes)

    def fill_up(self) -> None:
        """Until all rooms are taken by different objects: what is offered to others is on its way for a moment."""
        deadline = time.monotonic() + STARTING_SECONDS
        while len(set.union(*(node.held() for node in self.nodes))) < min(sum(self.rooms), len(self.objects)):
            assert time.monotonic() < deadline, [len(node.held()) for node in self.nodes]
            time.sleep(0.05)


@contextmanager
def with_rooms(rooms, bucket, count: int, folder, monkeypatch) -> Iterator[Epochs]:
    monkeypatch.setenv("CACHEFS_MEMORY", "1G")  # at most two blocks are kept in memory
    objects = fill(bucket, count)
    # Of 30 KB: whole pages, as file systems store them; and one for what is noted of the large object.
    sizes = [32 * 1024 * room + 4096 for room in rooms]
    with cluster(folder, bucket, len(rooms), sizes=sizes, named=False) as nodes:
        epochs = Epochs(bucket, nodes, objects, rooms)
        epochs.wait_for_all()
        yield epochs


@pytest.mark.slow
@pytest.mark.parametrize("rooms", [(60, 60, 60, 60), (74, 74, 74, 18)], ids=["even", "one has a quarter"])
def test_a_cluster_that_holds_half_reads_the_other_half_in_each_epoch(rooms, throttled, tmp_path, monkeypatch):
    """K * C = N / 2: what one node keeps, no other keeps, although each reads other objects in each epoch."""
    with with_rooms(rooms, throttled, 480, tmp_path, monkeypatch) as epochs:
        reads, slow = epochs.read(0)
        assert reads <= 1.01 * 480 + slow
        epochs.fill_up()
        for number in (1, 2):
            epochs.forget()
            reads, slow = epochs.read(number)
            assert reads <= 1.01 * 240 + slow
        epochs.fill_up()
        assert [len(node.held()) for node in epochs.nodes] == list(rooms)


@pytest.mark.slow
def test_a_cluster_that_just_holds_a_dataset_reads_it_once_whoever_is_killed(throttled, tmp_path, monkeypatch):
    """K * C = N: what the shares of some have too much, others keep, and both know it when they come back."""
    with with_rooms((32, 32, 32), throttled, 96, tmp_path, monkeypatch) as epochs:
        reads, slow = epochs.read(0)
        assert reads <= 96 + slow
        epochs.fill_up()
        epochs.forget()
        reads, slow = epochs.read(1)
        assert reads <= slow
        time.sleep(2 * FLUSH_SECONDS)  # what an owner learnt just now, kill -9 may make it forget
        for node in epochs.nodes:
            node.kill()
            node.begin_again()
        epochs.wait_for_all()
        epochs.forget()
        reads, slow = epochs.read(2)
        assert reads <= slow
        # What one kept is gone, its own and others': it is read again, and kept again.
        epochs.nodes[1].connection.evict(throttled.name)
        assert not epochs.nodes[1].held()
        epochs.forget()
        reads, slow = epochs.read(3)
        assert reads <= 32 + slow
        epochs.fill_up()
        epochs.forget()
        reads, slow = epochs.read(4)
        assert reads <= slow


@pytest.mark.slow
def test_nodes_own_what_they_have_room_for_though_nobody_named_their_sizes(throttled, tmp_path):
    sizes = [400 << 20, 400 << 20, 400 << 20, 100 << 20]
    with cluster(tmp_path, throttled, 4, sizes=sizes, named=False) as nodes:
        for node in nodes:
            node.wait_until(lambda part: sorted(row["weight"] for row in part["nodes"]) == sorted(sizes))
        shares = {row["name"]: row["share"] for row in nodes[0].status()["cluster"]["nodes"]}
        assert shares[nodes[3].name] == pytest.approx(1 / 13)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_of_an_epoch_fails_no_read(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 4) as nodes:
        known = versions(nodes[0], objects)
        epoch(nodes, objects, known, 0)
        throttled.throttle.reset()
        lost = nodes[3].counters()["origin_bytes"]
        order = random.Random(1).sample(sorted(objects), COUNT)
        for path in order[: COUNT // 3]:
            read_all(nodes[0], objects, known, [path])
        nodes[3].kill()
        slowest = 0.0
        for path in order[COUNT // 3 :]:
            began = time.monotonic()
            read_all(nodes[0], objects, known, [path])
            slowest = max(slowest, time.monotonic() - began)
        traffic = throttled.throttle.reset()
        extra = sum(len(objects[path]) * times for path, times in traffic.objects.items() if path in objects)
        print(f"{extra} bytes more from the origin, where {lost} were lost; slowest read: {slowest:.2f} s")
        slow = slow_reads(nodes)
        assert extra <= lost + sum(2 * len(objects[path]) for path in slow)
        # no read waited for the origin twice
        assert {times for path, times in traffic.objects.items() if path not in slow} == {1}
        peers = {row["node"]: row for row in nodes[0].status()["cluster"]["peers"]}
        assert peers[nodes[3].name]["failures"] > 0
        assert peers[nodes[1].name]["failures"] == 0


@pytest.mark.slow
def test_large_objects_come_from_peers_by_block(throttled, tmp_path):
    data = random.Random(9).randbytes(3 * BLOCK_SIZE + 12345)
    path = throttled.put("shard.tar", data)
    with cluster(tmp_path, throttled, 3) as nodes:
        version = nodes[0].connection.info(path).version
        throttled.throttle.reset()
        for node in nodes:
            assert node.read_through(path, version, len(data)) == data
        traffic = throttled.throttle.reset()
        # One more where the first answer was cut off.
        assert traffic.bytes_down < len(data) + (1.1 + 2 * len(slow_reads(nodes))) * BLOCK_SIZE


@pytest.mark.slow
def test_a_large_object_streams_through_its_owner(throttled, tmp_path):
    """Its first blocks reach a reader on another node when most of it has not been asked of the origin yet."""
    blocks = 12
    path = throttled.put("shard.tar", bytes(blocks * BLOCK_SIZE))
    with cluster(tmp_path, throttled, 2) as nodes:
        version = nodes[0].connection.info(path).version
        nodes[0].read_part(path, version, blocks * BLOCK_SIZE, blocks - 1)
        reader = nodes[0] if nodes[0].counters()["peer_reads"] else nodes[1]  # the other one owns it
        throttled.throttle.reset()
        for block in range(2):
            reader.read_part(path, version, blocks * BLOCK_SIZE, block)
        # Four blocks are read ahead; one more where the first answer was cut off.
        assert throttled.throttle.traffic().objects[path] <= 2 + 4 + 1 + 2 * len(slow_reads(nodes))
        assert reader.counters()["peer_reads"] >= 2


def test_without_the_secret_a_node_gets_nothing_and_reads_from_the_origin(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 2) as nodes, stranger(tmp_path, throttled, nodes) as other:
        known = versions(nodes[0], objects)
        for node in nodes:
            read_all(node, objects, known, sorted(objects))
        read_all(other, objects, known, sorted(objects))
        assert other.counters()["peer_reads"] == 0
        assert all("secret" in row["last_failure"] for row in other.status()["cluster"]["peers"] if row["failures"])


@pytest.mark.parametrize("trust", [{"tls": True}, {"sign": "headers"}], ids=["certificates", "headers"])
def test_with_other_trust_it_is_the_same(trust, throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 2, **trust) as nodes:
        known = versions(nodes[0], objects)
        throttled.throttle.reset()
        for node in nodes:
            read_all(node, objects, known, sorted(objects))
        assert origin_reads(throttled) <= 1.01 * COUNT + 2 * len(slow_reads(nodes))
        assert all(node.counters()["peer_failures"] == 0 for node in nodes)


def test_a_reader_needs_no_cluster_and_notices_neither_joining_nor_leaving(throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 2) as nodes:
        known = versions(nodes[0], objects)
        order = sorted(objects)
        read_all(nodes[0], objects, known, order[:50])
        nodes[0].leave()
        nodes[0].wait_for(0)
        read_all(nodes[0], objects, known, order[50:])
        assert nodes[0].status()["cluster"] is None

"""Large objects in a cluster that has just room for them, or for half: each block is read once, and kept once.

Real processes, and an S3 origin behind a counting proxy, as in test_cluster.py.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cachefs import datasets
from cachefs.cluster.peers.health import LEAST_HEDGE
from cachefs.digest import BLOCK_SIZE, block_count, block_range, version_ref
from cachefs.fetcher.attachments import part_name
from cachefs.fetcher.lodging import CLOSED_SECONDS
from cachefs.fetcher.service import FLUSH_SECONDS
from cachefs.store.blockmap import BlockMap
from tests.nodes import Node, cluster

# Nodes that were full for a moment are asked again after half a minute.
pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
SIZE = 20 * MIB
BLOCKS = block_count(SIZE)
COUNT = 16

# What is noted of incomplete and large objects: some pages for each.
NOTES = MIB

# The first ranges that a fetcher asks for: its client refuses how this server answers, and asks anew.
REFUSED = 4 * BLOCK_SIZE

# As much as a node keeps in memory with the memory that it is given here; and one more drives that out.
MEMORY, IN_MEMORY = "2G", 4


class Shards:
    """Of a cluster."""

    def __init__(self, bucket, nodes: list[Node], contents: dict[str, bytes]) -> None:
        self.bucket, self.nodes, self.contents = bucket, nodes, contents
        self.filler = random.Random(8).randbytes((IN_MEMORY + 1) * BLOCK_SIZE)
        self.large = bucket.put("filler", self.filler)
        connection = nodes[0].connection
        self.versions = {path: connection.info(path).version for path in (*contents, self.large)}

    def forget(self) -> None:
        """Drive out what is in memory: by an object for which none has room."""
        for node in self.nodes:
            assert node.read_through(self.large, self.versions[self.large], len(self.filler)) == self.filler

    def epoch(self, seed: int, nodes: Sequence[Node] = (), blocks: Sequence[int] = range(BLOCKS)) -> tuple[int, int]:
        """Each shard is read on one node: (bytes from the origin, at most so many of them because a node was slow). A
        fetcher that waited so long asks the origin, too, and the owner that it asked may do the same."""
        nodes = nodes or self.nodes
        self.bucket.throttle.reset()
        order = random.Random(seed).sample(sorted(self.contents), len(self.contents))
        slow = []

        def read(node: Node, part: list[str]) -> None:
            for path, block in itertools.product(part, blocks):
                start, stop = block_range(block, SIZE)
                began = time.monotonic()
                located = node.connection.need(
                    path, version=self.versions[path], size=SIZE, offset=start, length=stop - start
                )
                if time.monotonic() - began >= LEAST_HEDGE:
                    slow.append((path, block))
                try:
                    assert os.pread(located.fd, stop - start, start - located.base) == self.contents[path][start:stop]
                finally:
                    os.close(located.fd)

        with ThreadPoolExecutor(len(nodes)) as pool:
            list(pool.map(lambda n: read(nodes[n], order[n :: len(nodes)]), range(len(nodes))))
        return self.bucket.throttle.reset().bytes_down, 2 * BLOCK_SIZE * len(slow)

    def kept(self) -> int:
        """Bytes of different blocks of shards that the nodes have, all together."""
        found = set()
        for node, (path, version) in itertools.product(self.nodes, self.versions.items()):
            if path == self.large:
                continue
            whole = next((node.home / "refs").glob(f"*/*/{version_ref(path, version)}"), None)
            found |= {(path, block) for block in range(BLOCKS) if whole or block in self._blocks(node, path)}
        return sum(stop - start for _, block in found for start, stop in (block_range(block, SIZE),))

    def _blocks(self, node: Node, path: str) -> set[int]:
        """Which are here of an incomplete object."""
        record = next(iter(datasets.load_all(node.home)), None)
        if record is None:  # it has stored nothing yet
            return set()
        file = node.home / "parts" / f"{part_name(record.identity, path, self.versions[path])}.map"
        try:
            with file.open("rb") as opened:
                blocks = BlockMap(opened.fileno(), SIZE, 0)
                blocks.load()
        except FileNotFoundError:
            return set()
        return {block for block, found in enumerate(blocks.digests) if found is not None}

    def fill(self, room: int, **how) -> None:
        """Until each node has taken that much of what no other has: a block whose owner was too slow is kept in a later
        epoch, and a node that had no room for a moment is asked again after CLOSED_SECONDS."""
        deadline = time.monotonic() + 4 * CLOSED_SECONDS
        for number in itertools.count(100):
            if (kept := self.kept()) >= room * len(self.nodes):
                return
            assert time.monotonic() < deadline, kept
            self.epoch(number, **how)

    def settled(self, **how) -> bool:
        """Whether nothing is read from the origin any more, after some epochs at most: a node that was gone is not
        asked for a while."""
        for number in range(200, 220):
            self.forget()
            reads, _ = self.epoch(number, **how)
            if reads < MIB:
                return True
        return False

    @property
    def from_origin(self) -> int:
        """Bytes of blocks; the proxy also counts those of answers that a client refuses, and asks for anew."""
        return sum(node.counters()["origin_bytes"] for node in self.nodes)


@contextmanager
def shards(bucket, folder, monkeypatch, room: int, *, nodes: int = 4) -> Iterator[Shards]:
    """room: bytes, of each node."""
    monkeypatch.setenv("CACHEFS_MEMORY", MEMORY)
    contents = {}
    for number in range(COUNT):
        data = random.Random(number).randbytes(SIZE)
        contents[bucket.put(f"set/{number:03d}.tar", data)] = data
    with cluster(folder, bucket, nodes, size=room + NOTES) as found:
        yield Shards(bucket, found, contents)


@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 4], ids=["half", "all"])
def test_a_cluster_reads_in_each_epoch_what_it_cannot_hold_and_nothing_else(room, throttled, tmp_path, monkeypatch):
    with shards(throttled, tmp_path, monkeypatch, room * SIZE) as cluster:
        _, slow = cluster.epoch(0)
        print(f"first epoch: {cluster.from_origin // MIB} of {COUNT * SIZE // MIB} MiB")
        assert cluster.from_origin <= 1.01 * COUNT * SIZE + slow
        cluster.fill(room * SIZE)
        for number in (1, 2):
            cluster.forget()
            before = cluster.from_origin
            reads, slow = cluster.epoch(number)
            blocks = cluster.from_origin - before
            print(f"later epoch: {blocks // MIB} MiB; {slow // MIB} MiB may be of slow nodes")
            assert blocks <= 1.01 * (COUNT - 4 * room) * SIZE + slow
            assert reads <= 1.01 * (COUNT - 4 * room) * SIZE + slow + REFUSED  # what came in vain, too


@pytest.mark.slow
def test_what_others_keep_of_large_objects_is_known_whoever_is_killed(throttled, tmp_path, monkeypatch):
    """K * C = N."""
    with shards(throttled, tmp_path, monkeypatch, 4 * SIZE) as cluster:
        cluster.fill(4 * SIZE)
        assert cluster.settled()
        assert sum(node.counters()["guests"] for node in cluster.nodes) > 0
        time.sleep(2 * FLUSH_SECONDS)  # what an owner learnt just now, kill -9 may make it forget
        for node in cluster.nodes:
            node.kill()
            node.begin_again()
        assert cluster.settled()
        # One is gone, with what is its own and what is others': read, and nothing fails.
        gone, *others = sorted(cluster.nodes, key=lambda node: node.counters()["asked_by_peers"], reverse=True)
        gone.kill()
        reads, slow = cluster.epoch(1, others)
        assert reads <= 4 * SIZE + slow + REFUSED
        gone.begin_again()
        assert cluster.settled()
        # It lost all that it kept: read again once, and kept again.
        gone.connection.evict(throttled.name)
        reads, slow = cluster.epoch(2)
        assert reads <= 4 * SIZE + slow + REFUSED
        assert cluster.settled()


@pytest.mark.slow
def test_of_large_objects_those_blocks_are_lodged_that_are_read(throttled, tmp_path, monkeypatch):
    with shards(throttled, tmp_path, monkeypatch, COUNT // 4 * BLOCK_SIZE) as cluster:
        cluster.fill(COUNT // 4 * BLOCK_SIZE, blocks=[1])
        assert cluster.settled(blocks=[1])
        assert sum(node.counters()["guests"] for node in cluster.nodes) > 0
        used = [node.status()["used"] for node in cluster.nodes]
        assert all(each <= COUNT // 4 * BLOCK_SIZE + NOTES for each in used)


@pytest.mark.slow
def test_a_node_keeps_no_more_for_others_than_a_quota_allows(throttled, tmp_path, monkeypatch):
    with shards(throttled, tmp_path, monkeypatch, 4 * SIZE, nodes=2) as cluster:
        cluster.epoch(0)
        bounded = cluster.nodes[1]
        quota = 3 * BLOCK_SIZE
        (dataset,) = (record.id for record in datasets.load_all(bounded.home))
        bounded.connection.quota(quota, dataset=dataset)
        for number in (1, 2):
            cluster.epoch(number)
            assert bounded.status()["quotas"]["datasets"][dataset] <= quota
        assert bounded.status()["used"] <= quota + NOTES
        assert cluster.nodes[0].status()["used"] >= 4 * SIZE

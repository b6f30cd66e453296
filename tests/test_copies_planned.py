"""A node of a real cluster whose cache is full keeps the copies that its consumer reads next, and no others' room."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cachefs import datasets
from cachefs.cluster.nodes import Node as Member
from cachefs.cluster.placement import Placement, object_key
from cachefs.digest import content_key
from cachefs.fetcher.service import FLUSH_SECONDS
from cachefs.hints.consumer import Consumer
from tests.nodes import Node, cluster, fill
from tests.test_fetcher import wait_until

# A cluster may take two minutes to start (testbed/nodes).
pytestmark = pytest.mark.timeout(300)

COUNT = 420

# Of 30 KB, in pages as file systems store them.
ON_DISK = 32 * 1024

# Room for what either node owns (half of all, and some ten more), and for some copies.
ROOM = 260

# First come, while the consumer has yet to show that it reads what it says.
BEGINNING = 130

AGAIN = 20


class Reading:
    """The first of two nodes, which reads what the second one owns."""

    def __init__(self, nodes: list[Node], objects: dict[str, bytes]) -> None:
        self.node, other = nodes
        self.objects = objects
        for node in nodes:
            node.connection.make_catalog()
        self.known = {path: self.node.connection.info(path).version for path in objects}
        (record,) = datasets.load_all(self.node.home)
        placement = Placement([Member(node.name, "", 0, node.config.size or 0) for node in nodes])
        owners = {path: placement.owner(object_key(record.identity, path, self.known[path])).name for path in objects}
        self.own = [path for path in objects if owners[path] == self.node.name]
        self.others = [path for path in objects if owners[path] == other.name]
        for path in self.own:
            self.read(self.node, path)
        for path in self.others:
            self.read(other, path)

    def read(self, node: Node, path: str) -> None:
        assert node.read(path, self.known[path], len(self.objects[path])) == self.objects[path]

    def held(self) -> set[str]:
        """Paths of what lies on the node."""
        keys = self.node.held()
        return {path for path, data in self.objects.items() if content_key(data).hex() in keys}

    def consume(self, consumer: Consumer, paths: list[str], number: int) -> int:
        for path in paths:
            number += 1
            consumer.at(number)
            self.read(self.node, path)
        return number

    def consumer(self) -> dict[str, Any]:
        (found,) = self.node.status()["consumers"]
        return dict(found)


@pytest.fixture
def reading(throttled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    monkeypatch.setenv("CACHEFS_MEMORY", "1G")
    objects = fill(throttled, COUNT)
    with cluster(tmp_path, throttled, 2, sizes=[ROOM * ON_DISK] * 2) as nodes:
        yield Reading(nodes, objects)


@pytest.mark.slow
def test_the_copies_that_come_next_stay_and_without_a_plan_those_that_came_first(reading: Reading):
    node, others = reading.node, reading.others
    again = others[-AGAIN:]
    names = sorted(reading.objects)
    number = {name: n for n, name in enumerate(names)}
    with closing(Consumer(node.config, node.session, names, label="rank 0")) as consumer:
        # What is read again comes last in this epoch, and then in another order.
        consumer.plan(array("I", [number[path] for path in others]))
        consumer.plan(array("I", [number[path] for path in again[::-1]]))
        position = reading.consume(consumer, others[:BEGINNING], 0)
        # Where this took long, some that are read again have been fetched ahead and are among these.
        first = reading.held()
        assert len(first) == ROOM
        time.sleep(2 * FLUSH_SECONDS)  # its plan is looked through by a thread
        position = reading.consume(consumer, others[BEGINNING:], position)
        held = reading.held()
        # On a busy machine what was freed for one may go to another that comes at the same time.
        missing = {*again} - held
        assert len(missing) <= AGAIN // 10
        assert held >= {*reading.own}
        assert len(held) >= ROOM - len(missing)
        assert held <= first | {*again}, "nothing came that is not read again"
        before = node.counters()["peer_reads"]
        reading.consume(consumer, again[::-1], position)
        assert node.counters()["peer_reads"] - before <= len(missing)
        assert reading.consumer()["unknown"] == 0
    # Withdrawn: nobody says what is read next, so what is here stays.
    wait_until(lambda: not node.status()["consumers"])
    for path in others:
        reading.read(node, path)
    assert reading.held() >= held


@pytest.mark.slow
def test_a_plan_that_is_not_what_is_read_moves_nothing(reading: Reading):
    node, others = reading.node, reading.others
    names = sorted(reading.objects)
    number = {name: n for n, name in enumerate(names)}
    planned, read = others[: len(others) // 2], others[len(others) // 2 :]
    for path in read:
        reading.read(node, path)
    held = reading.held()
    assert len(held) == ROOM
    wrong = [number[path] for path in planned]
    with closing(Consumer(node.config, node.session, names, label="wrong")) as consumer:
        consumer.plan(array("I", wrong))
        consumer.plan(array("I", wrong[::-1]))
        for at, path in enumerate(read + read[::-1]):
            consumer.at(at)
            reading.read(node, path)
        assert reading.consumer()["prefetched"] > 0
        assert reading.held() == held

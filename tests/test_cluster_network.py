"""Nodes on hosts of their own (network namespaces), one S3 origin behind a counting proxy, and faults."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs_sidecar.testbed.network import Host, network, why_no_network
from tests.network import forwarded
from tests.nodes import Node, cluster, fill, owner_of, slow_reads
from tests.test_cluster import origin_reads, read_all, versions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_root,
    pytest.mark.skipif(bool(why_no_network()), reason=why_no_network()),
]

COUNT = 240


@pytest.fixture
def objects(throttled):
    return fill(throttled, COUNT)


@contextmanager
def apart(count: int, throttled, folder: Path, **more) -> Iterator[tuple[list[Host], list[Node]]]:
    with (
        network(count) as (here, hosts),
        forwarded(here, throttled.throttle.port) as port,
        cluster(folder, throttled, count, hosts=hosts, endpoint=f"http://{here}:{port}", **more) as nodes,
    ):
        yield hosts, nodes


def run_jobs(jobs: int, nodes: list[Node], objects, known, seed: int) -> None:
    """So many jobs at once, each reading every object once in an order of its own, a part on each node."""
    work = []
    for job in range(jobs):
        order = random.Random(100 * seed + job).sample(sorted(objects), len(objects))
        work += [(node, order[number :: len(nodes)]) for number, node in enumerate(nodes)]
    with ThreadPoolExecutor(len(work)) as pool:
        list(pool.map(lambda pair: read_all(pair[0], objects, known, pair[1]), work))


@pytest.mark.parametrize(("count", "jobs"), [(1, 1), (1, 3), (4, 1), (4, 3), (8, 1), (8, 3)])
@pytest.mark.timeout(300)
def test_each_object_is_read_from_the_origin_once(count, jobs, throttled, objects, tmp_path):
    with apart(count, throttled, tmp_path) as (_, nodes):
        known = versions(nodes[0], objects)
        throttled.throttle.reset()
        run_jobs(jobs, nodes, objects, known, 0)
        assert origin_reads(throttled) <= 1.01 * COUNT + 2 * len(slow_reads(nodes))


@pytest.mark.parametrize("misfortune", ["cut", "1% of its rate"])
@pytest.mark.timeout(300)
def test_a_link_that_fails_in_the_middle_of_an_epoch_fails_no_read(misfortune, throttled, objects, tmp_path):
    with apart(4, throttled, tmp_path) as (hosts, nodes):
        known = versions(nodes[0], objects)
        run_jobs(1, nodes, objects, known, 0)
        lost = nodes[3].counters()["origin_requests"]
        slow = slow_reads(nodes)
        throttled.throttle.reset()
        order = random.Random(1).sample(sorted(objects), COUNT)
        slowest = 0.0
        for number, path in enumerate(order):
            if number == COUNT // 3:
                hosts[3].cut() if misfortune == "cut" else hosts[3].slow("10mbit")
            began = time.monotonic()
            read_all(nodes[0], objects, known, [path])
            slowest = max(slowest, time.monotonic() - began)
        print(f"slowest read: {slowest:.2f} s")
        # That reads are slow of which the lost one is the owner is what happens here.
        slow += [path for path in slow_reads(nodes) if owner_of(nodes, path, known[path]) != nodes[3].name]
        assert origin_reads(throttled) <= lost + 2 * len(slow)
        assert slowest < 20  # a hedge delay and an origin read; a machine that is busy takes some seconds for either

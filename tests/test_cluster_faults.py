"""Nodes that lie, stop in the middle, or have another time: real processes, and no read fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cachefs.cluster.peers.gathering import CONNECTIONS
from tests.command_line import script
from tests.nodes import cluster, fill, why_no_other_clock
from tests.test_cluster import read_all, versions

# A cluster may take two minutes to start (testbed/nodes).
pytestmark = pytest.mark.timeout(300)

COUNT = 120  # of which each of three nodes owns some forty, more than it takes for one to be found out


@pytest.fixture
def objects(throttled):
    return fill(throttled, COUNT)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_other_clock()), reason=why_no_other_clock())
@pytest.mark.parametrize("tls", [False, True], ids=["secret", "certificates"])
def test_clocks_that_are_off_by_an_hour_fail_no_read(tls, throttled, objects, tmp_path):
    with cluster(tmp_path, throttled, 3, tls=tls, clocks=["", "-1h", "+1h"]) as nodes:
        started = [node.status()["started"] for node in nodes]
        assert started[0] - started[1] > 3000
        assert started[2] - started[0] > 3000
        known = versions(nodes[0], objects)
        throttled.throttle.reset()
        for node in nodes:
            read_all(node, objects, known, sorted(objects))
        # The origin takes no signature of another hour (the requests are counted, the bytes are not sent), so all of it
        # came through the node whose clock is right.
        total = sum(map(len, objects.values()))
        print(f"{(came := throttled.throttle.reset().bytes_down) / total:.3f} of the dataset came from the origin")
        assert came < 1.1 * total
        assert all(node.counters()["origin_bytes"] == 0 for node in nodes[1:])
        assert all(node.counters()["peer_reads"] == COUNT for node in nodes[1:])
        # The nodes believe each other all the same.
        failures = [row["last_failure"] for node in nodes for row in node.status()["cluster"]["peers"]]
        assert all(why in ("", "could not get what the origin gives others") for why in failures)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("wrong", ["do not match"]),
        ("stops", ["the origin was faster", "stopped in the middle"]),  # whichever comes first on a busy machine
        ("cuts", ["the connection was closed"]),
    ],
)
def test_a_node_that_lies_is_found_out_and_reported_and_its_objects_come_from_elsewhere(
    lie, words, throttled, objects, tmp_path
):
    with cluster(tmp_path, throttled, 3, lies=["", "", lie]) as nodes:
        known = versions(nodes[0], objects)
        read_all(nodes[2], objects, known, sorted(objects))  # what it serves, it has
        order = sorted(objects)
        with ThreadPoolExecutor(CONNECTIONS) as pool:  # so that none waits behind another and is never sent
            list(
                pool.map(
                    lambda start: read_all(nodes[0], objects, known, order[start::CONNECTIONS]), range(CONNECTIONS)
                )
            )
        peers = {row["node"]: row for row in nodes[0].status()["cluster"]["peers"]}
        why = peers[nodes[2].name]["last_failure"]
        assert any(word in why for word in words), why
        assert peers[nodes[2].name]["state"] != "closed"
        assert peers[nodes[1].name]["failures"] == 0
        said = script("cluster", "status", "--cache-dir", nodes[0].home).out
        assert "left alone" in said or "tried again" in said
        log = (nodes[0].home / "run" / "fetcher.log").read_text()
        assert log.count(f"{nodes[2].name}: is left alone") == 1, log

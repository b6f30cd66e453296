"""Rows of the table about clusters: a node dies in the middle of an epoch, its link is cut, or hardly carries anything.

The cluster has read everything once. Then one job reads it again on the nodes that are left, and it strikes while they
read: do reads fail, what is read from the origin again, and how long does the unluckiest reader wait?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.clusters.ground import Cluster, Ground, shares, shuffled
from bench.outcome import Goal, Series
from cachefs.cluster.peers.health import FIRST_HEDGE, LEAST_HEDGE, ORIGIN_TIMES
from cachefs_sidecar.testbed.network import Host
from cachefs_sidecar.testbed.nodes import ClusterNode

# So few answers of a node say nothing of how long it takes.
FEW_ANSWERS = 16


def _kill(node: ClusterNode, host: Host) -> None:
    node.kill()


def _cut(node: ClusterNode, host: Host) -> None:
    host.cut()


def _slow(node: ClusterNode, host: Host) -> None:
    host.slow("10mbit")


MISFORTUNES: dict[str, tuple[str, Callable[[ClusterNode, Host], None]]] = {
    "kill": ("kill -9", _kill),
    "cut": ("link cut", _cut),
    "slow": ("link at 1%", _slow),
}


def strike(name: str) -> Callable[[Ground], None]:
    """The row of one misfortune."""
    title, act = MISFORTUNES[name]
    return lambda ground: _row(ground, title, act)


def _row(ground: Ground, title: str, act: Callable[[ClusterNode, Host], None]) -> None:
    nodes, objects = ground.plan.shared_nodes, range(2 * ground.part)
    hosts = ground.hosts[:nodes]
    ground.stage.step(f"{title}: the first epoch")
    try:
        with ground.cluster(hosts) as cluster:
            _measure(ground, title, lambda: act(cluster.nodes[-1], hosts[-1]), cluster, objects)
    finally:
        hosts[-1].mend()


def _measure(ground: Ground, title: str, act: Callable[[], None], cluster: Cluster, objects: Sequence[int]) -> None:
    *left, unlucky = cluster.nodes
    first = cluster.read([[share] for share in shares(shuffled(objects, 0), len(cluster.nodes))])
    lost = unlucky.counters()["origin_bytes"]
    delay = max(ORIGIN_TIMES * first.p50, *(_hedge(node, unlucky.name) for node in left))
    ground.asked()
    ground.stage.step(f"{title} in the middle of an epoch")
    again = shares(shuffled(objects, 1), len(left))
    reading = cluster.read([[share] for share in again], meanwhile=(max(1, min(map(len, again)) // 3), act))
    reads, extra = ground.asked()
    what = f"{title}, one node of {len(cluster.nodes)}"
    ground.outcome.series += [
        Series(f"{what}: origin reads again", "reads", [float(reads)]),
        Series(f"{what}: slowest read", "s", [reading.slowest]),
        Series(f"{what}: hedge delay, at most", "s", [delay]),
        Series(f"{what}: an origin read, p99 of epoch 1", "s", [first.p99]),
    ]
    failed = Series(f"{what}: failed reads", "reads", [float(first.failed + reading.failed)])
    again_of_lost = Series(f"{what}: extra bytes from the origin / bytes lost", "x", [extra / lost])
    slowest = Series(
        f"{what}: slowest read / (hedge delay + an origin read)", "x", [reading.slowest / (delay + first.p99)]
    )
    ground.outcome.goals += [
        Goal(failed, 0, at_least=False),
        Goal(again_of_lost, 1, at_least=False),
        Goal(slowest, 1, at_least=False),
    ]


def _hedge(node: ClusterNode, peer: str) -> float:
    """After how many seconds a node would ask the origin beside this peer, at least."""
    for row in node.status()["cluster"]["peers"]:
        if row["node"] == peer and row["objects"] >= FEW_ANSWERS:
            return LEAST_HEDGE
    return FIRST_HEDGE

"""Nodes that share their caches: how often is the origin read, how fast are they together, what when one fails?

Every node is real (`cachefs cluster serve`, its fetcher, a reader) and on a host of its own, a network namespace with a
link of 1 Gbit/s; the origin is one S3 server behind a counting line. Rows that count read no more than they must; rows
that take time compare two clusters, in turns, so that what one machine has for all of them is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.clusters import alone
from bench.clusters.ground import LATENCY, MEAN, REMEMBERED, Cluster, Ground, ground, shares, shuffled
from bench.clusters.misfortune import MISFORTUNES, strike
from bench.clusters.ranks import Reading
from bench.outcome import Goal, Outcome, Series, in_turns
from bench.plan import Plan
from bench.stage import Stage
from cachefs_sidecar.testbed.network import why_no_network

QUESTION = "Does a cluster read each object from the origin once, as fast as its nodes together, whoever fails?"

# Of what must be read at least. One in a hundred may be read twice: the owner was slow once, or its view was another.
MOST_READS = 1.01

# An epoch that is bound by the origin takes at least this, for one node. Four jobs that end it read mostly what others
# have fetched, as fast as they can: that must be short beside it, or it is the CPU that is measured.
BOUND_SECONDS = 7.0
BOUND_PART = 8
# So many connections fill the line, and a rank has twice as many reads under way, or it would wait for answers.
BOUND_CONNECTIONS = 4
BOUND_AT_ONCE = 8
LEAST_GAIN = 3.5

LEAST_UNEVEN = 0.95

# Epochs of one turn: with fewer the figure is noise. And reads that a loader of some workers has under way.
UNEVEN_EPOCHS = 3
UNEVEN_AT_ONCE = 4


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    wanted = plan.rows or ROWS
    for name, row in ALONE.items():
        if name in wanted:
            stage.step(name)
            row(stage, plan, outcome)
    others = [name for name in SHARED if name in wanted]
    if not others:
        return
    if why := why_no_network():
        outcome.notes.append(f"Left out, because this {why}: {', '.join(others)}.")
        return
    outcome.conditions.append(
        f"each node a host of its own, 1 Gbit/s; objects of {MEAN / 1024:.0f} KB by URL; S3 behind a line of "
        f"{LATENCY * 1000:.0f} ms; reads at the origin as that line counted them"
    )
    with ground(stage, plan, outcome) as whole:
        for name in others:
            SHARED[name](whole)


# --- what the origin is asked ------------------------------------------------------------------------------------


def once(ground: Ground) -> None:
    """The first epoch, of one job and then, of other objects, of three at once, each with an order of its own."""
    nodes = ground.plan.shared_nodes
    for count in (1, nodes, 2 * nodes):
        with ground.cluster(ground.hosts[:count]) as cluster:
            for number, jobs in enumerate((1, 3)):
                title = f"epoch 1, {count} node{'s' * (count > 1)}, {jobs} job{'s' * (jobs > 1)}"
                ground.stage.step(title)
                objects = range(number * ground.part, (number + 1) * ground.part)
                orders = [shares(shuffled(objects, seed), count) for seed in range(jobs)]
                ground.asked()
                cluster.read([[order[rank] for order in orders] for rank in range(count)])
                read, _ = ground.asked()
                series = Series(f"{title}: origin reads / N", "x", [read / ground.part])
                ground.outcome.goals.append(Goal(series, MOST_READS, at_least=False))


def later(ground: Ground) -> None:
    """Epochs after the first, of one job. Each in the same order, with other ranks: so an object is asked for again
    when a whole epoch has passed, and what nodes remember of what they could not store counts for nothing."""
    count, nodes = ground.plan.shared, ground.plan.shared_nodes
    order = shuffled(range(count), 0)
    for title, times in (("N/2", 0.5), ("N", 1.0), ("2N", 2.0)):
        each = int(times * count) // nodes
        with ground.cluster(ground.hosts[:nodes], [each] * nodes) as cluster:
            reads = []
            for epoch in range(1 + ground.plan.shared_rounds):
                ground.stage.step(f"K*C = {title}, epoch {1 + epoch}")
                ground.asked()
                cluster.read([[share] for share in shares(order, nodes, turn=epoch)])
                reads.append(float(ground.asked()[0]))
        lacking = max(0, count - each * nodes)
        if 0 < lacking / nodes * MEAN < REMEMBERED:
            ground.outcome.notes.append(
                f"K*C = {title}: a node lacks less than the {REMEMBERED >> 20} MiB that it remembers; more --shared"
            )
        first = Series(f"{nodes} nodes, K*C = {title}: epoch 1, origin reads", "reads", reads[:1])
        series = Series(f"{nodes} nodes, K*C = {title}: a later epoch, origin reads", "reads", reads[1:])
        ground.outcome.series.append(first)
        ground.outcome.goals.append(Goal(series, float(round(MOST_READS * lacking, 1)), at_least=False))
    ground.outcome.conditions.append(
        f"K*C: N = {count:,}, one job, each epoch in the same order and by other ranks; the goal is {MOST_READS:g} x "
        "what the caches lack"
    )


# --- how fast they are -------------------------------------------------------------------------------------------


def bound(ground: Ground) -> None:
    """The first epoch of a job on each node, all of all objects, where the origin gives the same to 1 node and to 4."""
    nodes, part = ground.plan.shared_nodes, max(2, ground.plan.shared // BOUND_PART)
    bandwidth = part * MEAN / BOUND_SECONDS
    asked: list[float] = []

    def turn(cluster: Cluster) -> Callable[[int], float]:
        def read(number: int) -> float:
            objects = range(number * part, (number + 1) * part)
            orders = [[shuffled(objects, rank)] for rank in range(len(cluster.nodes))]
            ground.asked()
            rate = cluster.read(orders, BOUND_AT_ONCE).rate
            asked.append(ground.asked()[0] / part)
            return rate

        return read

    with (
        ground.cluster(ground.hosts[nodes : nodes + 1]) as one,
        ground.cluster(ground.hosts[:nodes]) as several,
        _line(ground, total_bandwidth=bandwidth, bandwidth_per_connection=bandwidth / BOUND_CONNECTIONS),
    ):
        contenders = {"epoch 1, 1 node": turn(one), f"epoch 1, {nodes} nodes": turn(several)}
        rates = in_turns(contenders, ground.plan.shared_rounds, "objects/s", ground.stage.step)
    by_one, by_all = rates.values()
    reads = Series(f"bound by the origin, 1 and {nodes} nodes: origin reads / N", "x", asked)
    ground.outcome.series += [by_one, by_all, reads]
    gain = by_all.over(by_one, f"epoch 1 bound by the origin, {nodes} nodes / 1: objects that reach readers")
    ground.outcome.goals.append(Goal(gain, LEAST_GAIN * nodes / 4, at_least=True))
    ground.outcome.conditions.append(
        f"bound by the origin: a job on each node, each reading all of {part} objects in an order of its own, "
        f"{BOUND_AT_ONCE} at a time; the line carries {bandwidth / 2**20:.1f} MiB/s in all, a connection a "
        f"{BOUND_CONNECTIONS}th of it; the rate is that of all jobs together"
    )


def uneven(ground: Ground) -> None:
    """Later epochs of one job over a cache that just holds the dataset: in equal pieces, and with one of a quarter."""
    nodes, count = ground.plan.shared_nodes, 2 * ground.part
    quarter = count // (4 * (nodes - 1) + 1)
    pieces = {"evenly spread": [count // nodes] * nodes, "a quarter on one": [quarter] + [4 * quarter] * (nodes - 1)}

    def turn(cluster: Cluster) -> Callable[[int], float]:
        def read(number: int) -> float:
            readings = [epoch(cluster, UNEVEN_EPOCHS * number + more) for more in range(UNEVEN_EPOCHS)]
            return sum(each.files for each in readings) / sum(each.seconds for each in readings)

        return read

    def epoch(cluster: Cluster, seed: int) -> Reading:
        return cluster.read([[share] for share in shares(shuffled(range(count), seed), nodes)], UNEVEN_AT_ONCE)

    halves = (ground.hosts[:nodes], ground.hosts[nodes:])
    (even, equal), (other, unequal) = pieces.items()
    with ground.cluster(halves[0], equal) as first, ground.cluster(halves[1], unequal) as second:
        for cluster in (first, second):
            ground.stage.step("filling the caches")
            for seed in (1000, 1001):  # the second time copies give way to what a node owns
                epoch(cluster, seed)
        contenders = {f"later epochs, {even}": turn(first), f"later epochs, {other}": turn(second)}
        rates = in_turns(contenders, 1 + ground.plan.shared_rounds, "objects/s", ground.stage.step)
    evenly, quartered = rates.values()
    ground.outcome.series += [evenly, quartered]
    ratio = quartered.over(evenly, f"one node of {nodes} with a quarter of the cache / the same total, evenly spread")
    ground.outcome.goals.append(Goal(ratio, LEAST_UNEVEN, at_least=True))


@contextmanager
def _line(ground: Ground, **settings: float) -> Iterator[None]:
    """The line to the origin is as narrow as that while the block runs."""
    ground.origin.set(**settings)
    try:
        yield
    finally:
        ground.origin.set(**dict.fromkeys(settings))


# Rows by the name that --row takes: those for which no host is needed, and the others.
ALONE: dict[str, Callable[[Stage, Plan, Outcome], None]] = {"balance": alone.balance, "transfer": alone.transfer}
SHARED: dict[str, Callable[[Ground], None]] = {
    "once": once,
    "later": later,
    "bound": bound,
    "uneven": uneven,
    **{name: strike(name) for name in MISFORTUNES},
}
ROWS = (*ALONE, *SHARED)

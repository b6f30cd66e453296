"""What a cluster reads from its origin, by the decisions that its nodes make, for jobs on paper only.

K nodes of C each, N objects of one size, epochs in fresh orders that are split over the ranks as DistributedSampler
does. The least that any choice of K*C objects leaves to be read is N - K*C per epoch of one job.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cluster.nodes import Node
from cachefs.cluster.placement import Placement, object_key
from tests.keeping import NEVER, NO, Keeping, Verdict, lodgings

N = 2000


class Read(NamedTuple):
    job: int
    item: int
    rank: int


class Cluster:
    """Nodes that do what the peers do, with no time between asking and having: owner, lodging, origin, copies.

    passing: objects that an owner has in memory for a moment after it read them and could not keep them.
    """

    def __init__(self, capacities: list[int], items: int = N, passing: int = 0, sizes: list[int] | None = None) -> None:
        self.nodes = [Node(f"node-{number}", "host", 7070, capacity) for number, capacity in enumerate(capacities)]
        self.keeping = {node.name: Keeping(node.weight) for node in self.nodes}
        self.sizes = sizes or [1] * items
        self.keys = [object_key("s3", f"bucket/{item}", "v") for item in range(items)]
        self.origin = self.peers = self.local = 0
        self._lodged: dict[bytes, str] = {}  # each owner's own, in one
        self._passing: dict[str, dict[bytes, None]] = {node.name: {} for node in self.nodes}
        self._most_passing = passing
        self._see(self.nodes)

    def _see(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        placement = Placement(nodes)
        self._rankings = [placement.ranking(key, len(nodes)) for key in self.keys]

    def leave(self, name: str) -> int:
        """A node is gone with what it had. How many objects the cluster counted on there."""
        gone = self.keeping.pop(name)
        lost = sum(gone.counts_on(key) for key in self.keys)
        self._lodged = {key: lodger for key, lodger in self._lodged.items() if lodger != name}
        self._see([node for node in self.nodes if node.name != name])
        return lost

    def join(self, node: Node) -> None:
        self.keeping[node.name] = Keeping(node.weight)
        self._passing[node.name] = {}
        self._see([*self.nodes, node])

    def read(self, item: int, rank: int, next_use: float = NEVER, next_here: float = NEVER) -> None:
        """next_use: by anybody; next_here: by this rank."""
        key, size, owner = self.keys[item], self.sizes[item], self._rankings[item][0].name
        here = self.keeping[self.nodes[rank].name]
        holder = next((n for n in (owner, self._lodged.get(key, "")) if n and self.keeping[n].counts_on(key)), "")
        holder = holder or self._found_after_a_change(item)
        if holder and next_use < NEVER:
            self.keeping[holder].use(key, next_use)
        if key in here:
            self.local += 1
        elif holder or key in self._passing[owner]:
            self.peers += 1
        else:
            self.origin += 1
            holder = self._settle(item, next_use)
        if not here.counts_on(key):
            if holder:
                here.keep_copy(key, size, next_here)
            else:
                self._pass(owner, key)
        assert all(keeping.used <= keeping.capacity for keeping in self.keeping.values())

    def _found_after_a_change(self, item: int) -> str:
        """Who has what its owner does not count on yet: the owner itself, as a copy, or who owned it before."""
        key, size, (owner, *others) = self.keys[item], self.sizes[item], self._rankings[item]
        if key in self.keeping[owner.name]:
            assert self.keeping[owner.name].keep_counted(key, size).keep
            return owner.name
        before = next((node.name for node in others[:1] if self.keeping[node.name].counts_on(key)), "")
        if before and self.keeping[owner.name].keep_counted(key, size).keep:
            self.keeping[before].hand_over(key)
            return owner.name
        if before:
            self._lodged[key] = before
        return before

    def _settle(self, item: int, next_use: float) -> str:
        """Where the object is kept from now on; "" for nowhere."""
        key, size, ranking = self.keys[item], self.sizes[item], self._rankings[item]
        owner = self.keeping[ranking[0].name]
        if owner.keep_counted(key, size, next_use).keep:
            return ranking[0].name
        rooms = {name: keeping.room for name, keeping in self.keeping.items()}
        for node in lodgings(ranking[1:], rooms, size):
            assert self.keeping[node.name].keep_counted(key, size, next_use).keep
            self._lodged[key] = node.name
            return node.name
        if next_use < NEVER and owner.keep_instead(key, size, next_use).keep:
            return ranking[0].name
        return ""

    def _pass(self, owner: str, key: bytes) -> None:
        passing = self._passing[owner]
        passing[key] = None
        while len(passing) > self._most_passing:
            del passing[next(iter(passing))]


def order(seed: str, items: int = N) -> list[int]:
    shuffled = list(range(items))
    random.Random(seed).shuffle(shuffled)
    return shuffled


def at_once(nodes: int, jobs: int, epochs: int, apart: int, *, same_order: bool = False) -> list[Read]:
    """The reads of jobs that run at once, each `apart` items behind the one before, on all nodes each."""

    def of(job: int) -> Iterator[Read]:
        for epoch in range(epochs):
            for position, item in enumerate(order(f"{0 if same_order else job} {epoch}")):
                yield Read(job, item, position % nodes)

    lines = [list(of(job)) for job in range(jobs)]
    steps = range(epochs * N + (jobs - 1) * apart)
    return [line[at] for step in steps for job, line in enumerate(lines) if 0 <= (at := step - job * apart) < len(line)]


def next_uses(reads: list[Read]) -> tuple[list[float], list[float]]:
    """Of each read, when its item is read next by anybody, and by the same rank."""
    anybody: dict[int, float] = {}
    same: dict[tuple[int, int], float] = {}
    by_all, here = [NEVER] * len(reads), [NEVER] * len(reads)
    for at in range(len(reads) - 1, -1, -1):
        _, item, rank = reads[at]
        by_all[at], here[at] = anybody.get(item, NEVER), same.get((item, rank), NEVER)
        anybody[item] = same[item, rank] = at
    return by_all, here


def origin_reads(cluster: Cluster, reads: list[Read], every: int, *, plan: str = "none") -> list[float]:
    """Per `every` reads, in datasets. plan: "none", "of each node" (what it reads again, for copies), "of all"."""
    by_all, here = next_uses(reads)
    nothing = [NEVER] * len(reads)
    by_all, here = by_all if plan == "of all" else nothing, here if plan != "none" else nothing
    found = []
    for start in range(0, len(reads) - every + 1, every):
        before = cluster.origin
        for at in range(start, start + every):
            cluster.read(reads[at].item, reads[at].rank, by_all[at], here[at])
        found.append((cluster.origin - before) / N)
    return found


def belady(reads: list[Read], capacity: int, every: int) -> list[float]:
    """The fewest reads that one cache of this size can do with, knowing everything (and free to keep nothing)."""
    by_all, _ = next_uses(reads)
    kept: dict[int, float] = {}
    heap: list[tuple[float, int]] = []
    found = [0.0] * (len(reads) // every)
    for at, read in enumerate(reads[: len(found) * every]):
        found[at // every] += (read.item not in kept) / N
        kept[read.item] = by_all[at]
        heapq.heappush(heap, (-by_all[at], read.item))
        while len(kept) > capacity:
            use, item = heapq.heappop(heap)
            if kept.get(item) == -use:
                del kept[item]
    return found


# --- goals of the cluster


@pytest.mark.parametrize("plan", ["none", "of each node"])
@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_one_job_reads_each_object_once_and_later_what_the_cluster_cannot_hold(nodes: int, share: float, plan: str):
    cluster = Cluster([int(share * N) // nodes] * nodes)
    first, *later = origin_reads(cluster, at_once(nodes, 1, 4, 0), N, plan=plan)
    assert first <= 1.01
    assert all(reads <= 1.01 * max(0.0, 1 - share) for reads in later), later


@pytest.mark.parametrize("same_order", [False, True])
@pytest.mark.parametrize("share", [1.0, 2.0])
@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_three_jobs_read_each_object_once_where_the_cluster_holds_them(nodes: int, share: float, same_order: bool):
    cluster = Cluster([int(share * N) // nodes] * nodes)
    reads = at_once(nodes, 3, 3, apart=N // 3, same_order=same_order)
    first, *later = origin_reads(cluster, reads, 3 * N)
    assert first <= 1.01
    assert later
    assert max(later) == 0


@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_three_jobs_near_each_other_share_what_the_cluster_cannot_hold(nodes: int):
    """In one order, as jobs of one seed are, at most 40 objects behind each other; an owner has 64 in memory."""
    cluster = Cluster([N // 2 // nodes] * nodes, passing=64)
    first, *later = origin_reads(cluster, at_once(nodes, 3, 4, apart=20, same_order=True), 3 * N)
    assert first <= 1.02  # with what the first job has begun of its second epoch
    assert max(later) <= 1.01 * 0.5


@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_three_jobs_in_orders_of_their_own_read_for_themselves_what_is_kept_nowhere(nodes: int):
    cluster = Cluster([N // 2 // nodes] * nodes)
    _, *later = origin_reads(cluster, at_once(nodes, 3, 5, apart=N // 3), 3 * N)
    assert max(later) <= 1.01 * 3 * 0.5


@pytest.mark.parametrize("nodes", [1, 4, 8])
@pytest.mark.parametrize("apart", [0, N // 3])
def test_with_their_plans_known_three_jobs_read_hardly_more_than_clairvoyance_would(nodes: int, apart: int):
    reads = at_once(nodes, 3, 6, apart)
    least = belady(reads, N // 2, 3 * N)[1:-1]  # the last epoch has nothing after it
    cluster = Cluster([N // 2 // nodes] * nodes)
    found = origin_reads(cluster, reads, 3 * N, plan="of all")[1 : 1 + len(least)]
    # Each owner decides for its share only; of 2,000 objects on 8 nodes that is few (with 16,000 it is within 1.01).
    assert sum(found) <= 1.06 * sum(least)
    assert sum(found) < 0.6 * 1.5 * len(found)  # without plans it is 1.5
    # One job's bound cannot be met by three in orders of their own: not even by who knows all of them in advance.
    assert sum(least) > 1.3 * 0.5 * len(least)


def test_what_fits_on_every_node_ends_up_on_every_node():
    cluster = Cluster([N] * 4)
    peers = []
    for epoch in range(40):
        before = cluster.peers
        for position, item in enumerate(order(f"job {epoch}")):
            cluster.read(item, position % 4)
        peers.append(cluster.peers - before)
    assert cluster.origin == N
    assert peers == sorted(peers, reverse=True) or peers[-1] == 0
    assert peers[-1] == 0
    assert all(key in keeping for keeping in cluster.keeping.values() for key in cluster.keys)


@pytest.mark.parametrize("share", [1.5, 2.5])
def test_a_node_that_is_gone_costs_what_it_had_and_one_that_comes_costs_nothing(share: float):
    capacity = int(share * N) // 4
    cluster = Cluster([capacity] * 4)
    origin_reads(cluster, at_once(4, 1, 2, 0), N)
    lost = cluster.leave("node-2")
    assert 0 < lost <= capacity
    # Not all at once: what is read where a copy of it lies is not asked for, and the new owner gets it later.
    first, *later = origin_reads(cluster, at_once(3, 1, 12, 0), N)
    assert 0 < round(N * (first + sum(later))) <= lost
    assert later[-1] == 0
    cluster.join(Node("node-2", "host", 7070, capacity))
    assert origin_reads(cluster, at_once(4, 1, 2, 0), N) == [0, 0]
    owned = {name: sum(map(keeping.counts_on, cluster.keys)) for name, keeping in cluster.keeping.items()}
    assert sum(owned.values()) <= N  # each once: it was handed over, not doubled
    assert owned["node-2"] > 0.9 * N / 4


def test_nodes_of_unequal_size_hold_what_equal_ones_would():
    cluster = Cluster([N // 16, 5 * N // 16, 5 * N // 16, 5 * N // 16])
    first, *later = origin_reads(cluster, at_once(4, 1, 3, 0), N)
    assert first == 1
    assert max(later) == 0


def test_objects_of_all_sizes_fill_the_cluster_to_less_than_a_large_one_per_node():
    dice = random.Random(0)
    sizes = [dice.randint(1, 100) for _ in range(N)]
    cluster = Cluster([sum(sizes) // 8] * 4, sizes=sizes)
    for epoch in range(3):
        for position, item in enumerate(order(f"job {epoch}")):
            cluster.read(item, position % 4)
    assert all(keeping.room < 100 for keeping in cluster.keeping.values())


# --- the rules, one by one


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_what_is_counted_on_displaces_copies_and_copies_displace_nothing_of_it():
    keeping = Keeping(10)
    assert keeping.keep_copy(key(1), 6) == Verdict(True)
    assert keeping.keep_counted(key(2), 4) == Verdict(True)
    assert keeping.keep_copy(key(3), 1) == NO
    assert keeping.keep_counted(key(4), 5) == Verdict(True, (key(1),))
    assert keeping.keep_counted(key(5), 2) == NO
    assert keeping.keep_copy(key(6), 1) == Verdict(True)
    assert (keeping.used, keeping.copies, keeping.room) == (10, 1, 1)


def test_copies_give_way_in_the_order_of_their_next_use_and_unplanned_ones_first():
    keeping = Keeping(4)
    for number, use in ((1, 50.0), (2, NEVER), (3, 10.0), (4, NEVER)):
        keeping.keep_copy(key(number), 1, use)
    assert keeping.keep_copy(key(5), 1, NEVER) == NO
    assert keeping.keep_copy(key(6), 1, 20.0) == Verdict(True, (key(2),))
    keeping.use(key(3), 90.0)
    assert keeping.keep_counted(key(7), 3) == Verdict(True, (key(4), key(3), key(1)))
    assert key(6) in keeping


def test_a_copy_that_is_counted_on_from_now_on_does_not_give_way_to_itself():
    keeping = Keeping(10)
    keeping.keep_copy(key(1), 10)
    assert keeping.keep_counted(key(1), 10) == Verdict(True)
    assert (keeping.used, keeping.copies, keeping.room) == (10, 0, 0)


def test_what_another_node_counts_on_now_becomes_a_copy():
    keeping = Keeping(10)
    keeping.keep_counted(key(1), 10)
    keeping.hand_over(key(1))
    keeping.hand_over(key(9))
    assert (keeping.copies, keeping.room) == (10, 10)
    assert keeping.keep_counted(key(2), 1) == Verdict(True, (key(1),))


def test_instead_of_is_only_for_what_is_used_sooner():
    keeping = Keeping(2)
    keeping.keep_counted(key(1), 1, 10.0)
    keeping.keep_counted(key(2), 1, 20.0)
    assert keeping.keep_instead(key(3), 1, 20.0) == NO
    assert keeping.keep_instead(key(3), 1, 15.0) == Verdict(True, (key(2),))
    keeping.forget(key(1))
    assert keeping.keep_instead(key(4), 1, 99.0) == Verdict(True)


def test_an_object_lodges_in_the_order_of_the_ranking_where_there_is_room():
    nodes = [Node(name, "host", 7070) for name in "abcd"]
    assert [node.name for node in lodgings(nodes, {"a": 4, "b": 5, "d": 9}, 5)] == ["b", "d"]


operations = st.tuples(
    st.sampled_from(["keep_counted", "keep_copy", "keep_instead", "forget", "hand_over", "use"]),
    st.integers(0, 12),
    st.one_of(st.integers(0, 50).map(float), st.just(NEVER)),
)


@given(st.integers(0, 60), st.lists(operations, max_size=60))
def test_verdicts_carried_out_give_exactly_what_is_kept_and_never_more_than_fits(capacity: int, steps):
    """Against a set that does what the verdicts say. Sizes are fixed per key, 1 to 13."""
    keeping, stored, counted = Keeping(capacity), dict[int, int](), set[int]()
    for name, number, use in steps:
        size = number + 1
        if name in ("forget", "hand_over"):
            getattr(keeping, name)(key(number))
            counted.discard(number)
            if name == "forget":
                stored.pop(number, None)
        elif name == "use":
            keeping.use(key(number), use)
        else:
            verdict = getattr(keeping, name)(key(number), size, use)
            dropped = {int.from_bytes(dropped, "big") for dropped in verdict.drop}
            assert len(dropped) == len(verdict.drop)
            assert dropped <= stored.keys() - {number}
            assert name == "keep_instead" or not dropped & counted
            assert verdict.keep or not dropped
            for victim in dropped:
                del stored[victim]
                counted.discard(victim)
            if verdict.keep:
                stored[number] = size
            if verdict.keep and name != "keep_copy":
                counted.add(number)
        assert sum(stored.values()) == keeping.used <= capacity
        assert {n for n in range(13) if key(n) in keeping} == stored.keys()
        assert {n for n in range(13) if keeping.counts_on(key(n))} == counted

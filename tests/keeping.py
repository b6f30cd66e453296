"""What the nodes of a cluster keep, as decisions over numbers: a model for `test_keeping`, which says what that makes a
cluster read from its origin. (The fetcher decides by clearing, copies and lodging.)

Two kinds of things lie on a node's SSD:
  * what the cluster counts on: the one copy that every node is sent to. What the node owns, and what it *lodges* for an
    owner that has no room. This is never dropped for the dataset's own sake, so after the first epoch the cluster
    reads no more than N - K*C from the origin (N: the dataset, K nodes of C each);
  * copies of what it has read and another counts as its own. They fill what is left, and give way to the first kind.

Of what the cluster counts on nothing should give way while one job reads: no choice hits more than C of N, and keeping
what is used soonest has all its hits early in the epoch.

Several jobs, each in an order of its own, ask for an object at different times, so what is kept nowhere is read by each
of them: J * (N - K*C) in an epoch of all J. Jobs that read in one order, so near each other that what passes through is
still in some owner's memory, read N - K*C together. Where the next uses of all are known, something should give way
(`keep_instead`, which no fetcher does): keeping what anybody uses soonest is Belady's choice for the jobs together, the
least that is possible (three jobs, K*C = N/2: 0.73 N instead of 1.5 N; no choice reaches 0.5 N).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cachefs.cluster.nodes import Node

# The next use of what no plan names.
NEVER = math.inf


class Verdict(NamedTuple):
    """Whether to keep the object, and what to drop for it first."""

    keep: bool
    drop: tuple[bytes, ...] = ()


NO = Verdict(False)


class _Shelf:
    """Sizes and next uses of one kind of thing, the one that is used last at hand."""

    __slots__ = ("_entries", "_heap", "_turn", "size")

    def __init__(self) -> None:
        self.size = 0
        self._entries: dict[bytes, tuple[int, int]] = {}  # size, turn
        self._heap: list[tuple[float, int, bytes]] = []  # (minus next use, turn, key); those of earlier turns are stale
        self._turn = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def put(self, key: bytes, size: int, next_use: float) -> None:
        self.take(key)
        self._turn += 1  # of equal ones the oldest goes first
        self._entries[key] = (size, self._turn)
        self.size += size
        heapq.heappush(self._heap, (-next_use, self._turn, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if self._current(entry)]
            heapq.heapify(self._heap)

    def take(self, key: bytes) -> int:
        """Forget it. Its size; 0 if it is not there."""
        size, _ = self._entries.pop(key, (0, 0))
        self.size -= size
        return size

    def size_of(self, key: bytes) -> int:
        return self._entries[key][0]

    def last_used(self, need: int, after: float) -> tuple[bytes, ...]:
        """Keys that free `need` bytes, the last used first, all used later than `after`; () if there is not enough."""
        popped: list[tuple[float, int, bytes]] = []
        freed = 0
        while freed < need and self._heap and -self._heap[0][0] > after:
            entry = heapq.heappop(self._heap)
            if self._current(entry):
                popped.append(entry)
                freed += self._entries[entry[2]][0]
        for entry in popped:  # a decision changes nothing yet
            heapq.heappush(self._heap, entry)
        return tuple(key for _, _, key in popped) if freed >= need else ()

    def _current(self, entry: tuple[float, int, bytes]) -> bool:
        known = self._entries.get(entry[2])
        return known is not None and known[1] == entry[1]


class Keeping:
    """What lies on one node, in bytes, and what may lie there. A verdict is carried out at once: the caller does it.

    next_use: any number that grows with time, the same for all (a position in the epochs, seconds); of counted
    things when anybody uses them next, of copies when this node does.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._counted = _Shelf()
        self._copies = _Shelf()

    @property
    def used(self) -> int:
        return self._counted.size + self._copies.size

    @property
    def copies(self) -> int:
        """Bytes of what others count on too."""
        return self._copies.size

    @property
    def room(self) -> int:
        """Bytes that may still be counted on: free, or held by copies. What a node tells those who want to lodge."""
        return self.capacity - self._counted.size

    def __contains__(self, key: bytes) -> bool:
        return key in self._counted or key in self._copies

    def counts_on(self, key: bytes) -> bool:
        return key in self._counted

    def keep_counted(self, key: bytes, size: int, next_use: float = NEVER) -> Verdict:
        """Of what this node owns, or lodges for its owner. Copies give way, the ones that are used last first."""
        if key not in self._counted and size > self.room:
            return NO
        self.forget(key)  # a copy becomes what is counted on: it does not give way to itself
        drop = self._copies.last_used(self.used + size - self.capacity, -math.inf)
        assert drop or self.used + size <= self.capacity, "room counts the copies"
        return self._done(self._counted, key, size, next_use, drop)

    def keep_instead(self, key: bytes, size: int, next_use: float) -> Verdict:
        """Where the cluster has no room left: instead of what is counted on here and used later, if such is known.

        For what several jobs read, each by a plan that is known. With one job it would only move the hits.
        """
        if key in self._counted or size <= self.room:
            return self.keep_counted(key, size, next_use)
        drop = self._counted.last_used(self.used + size - self.capacity, next_use)
        if not drop:
            return NO
        return self._done(self._counted, key, size, next_use, drop)

    def keep_copy(self, key: bytes, size: int, next_use: float = NEVER) -> Verdict:
        """Of what was read here and another node counts as its own: while there is room, or instead of copies that
        are used later. Never instead of what is counted on."""
        if key in self:
            if key in self._copies:
                self.use(key, next_use)
            return Verdict(True)
        need = self.used + size - self.capacity
        drop = self._copies.last_used(need, next_use) if need > 0 else ()
        if need > 0 and not drop:
            return NO
        return self._done(self._copies, key, size, next_use, drop)

    def use(self, key: bytes, next_use: float) -> None:
        """It was used; the plan says when again."""
        shelf = self._counted if key in self._counted else self._copies
        if key in shelf:
            shelf.put(key, shelf.size_of(key), next_use)

    def hand_over(self, key: bytes) -> None:
        """Another node counts on it now (it owns it since a view changed, and has fetched it): a copy from here on."""
        if size := self._counted.take(key):
            self._copies.put(key, size, NEVER)

    def forget(self, key: bytes) -> None:
        """It is gone from here: dropped, damaged, or its dataset was."""
        self._counted.take(key)
        self._copies.take(key)

    def _done(self, shelf: _Shelf, key: bytes, size: int, next_use: float, drop: tuple[bytes, ...]) -> Verdict:
        for dropped in drop:
            self.forget(dropped)
        shelf.put(key, size, next_use)
        return Verdict(True, drop)


def lodgings(ranking: Iterable[Node], rooms: Mapping[str, int], size: int) -> Iterable[Node]:
    """Where an owner without room may have an object kept, the best first: the order of the ranking, so that a node
    that becomes the owner later likely has it already. rooms: what each node last said of its `room`, by name."""
    return (node for node in ranking if rooms.get(node.name, 0) >= size)

"""Tables of items that take tens of bytes each, where objects in a dict take hundreds: a dataset has millions.

An item is named by 16 bytes that a cryptographic hash made, so any of its bits serve as its hash. Tables are in
SHARDS parts that grow one by one: one of ten million items would hold up the event loop for seconds when it grows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

NAME_BYTES = 16

SHARDS = 256  # the last byte of a name says which

_NONE = 0xFFFFFFFF

# Of an item's name, what a table of misses remembers it by. The bucket tells apart a few more bits, so of ten million
# looked up, a handful are taken for another.
_MARK_BYTES = 4

_WAYS = 8
MISSES = 4


class Queue:
    """Distinct items in a row, each with a moment, a credit and a size. The first is `first`, new ones go last.

    31 bytes an item: its name, its neighbours and what it carries; and 4 bytes for each slot of the hash tables.
    """

    def __init__(self) -> None:
        self._names = bytearray()
        self._before = array("I")
        self._after = array("I")
        self.since = array("I")
        self.credit = array("B")
        self.blocks = array("H")
        self._first = self._last = self._free = _NONE
        self._count = 0
        self._tables = [array("I", [_NONE]) * 4 for _ in range(SHARDS)]
        self._fill = array("I", [0]) * SHARDS

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: bytes) -> bool:
        return self.find(name) is not None

    def __iter__(self) -> Iterator[bytes]:
        at = self._first
        while at != _NONE:
            yield self.name(at)
            at = self._after[at]

    @property
    def first(self) -> int | None:
        """Place of the first item. A place stays an item's own until it is removed."""
        return None if self._first == _NONE else self._first

    def following(self, place: int) -> int | None:
        after = self._after[place]
        return None if after == _NONE else after

    def name(self, place: int) -> bytes:
        return bytes(self._names[place * NAME_BYTES : (place + 1) * NAME_BYTES])

    def find(self, name: bytes) -> int | None:
        table = self._tables[name[-1]]
        place = table[self._slot(table, name)]
        return None if place == _NONE else place

    def append(self, name: bytes, since: int, blocks: int, credit: int) -> None:
        """Raises ValueError when it is there already."""
        if name in self:
            raise ValueError("an item is in the queue once")
        shard = name[-1]
        self._fill[shard] += 1
        if 3 * self._fill[shard] > 2 * len(self._tables[shard]):
            self._grow(shard)
        place = self._free
        if place == _NONE:
            place = len(self.since)
            self._names += name
            for column in (self._before, self._after, self.since, self.credit, self.blocks):
                column.append(0)
        else:
            self._free = self._after[place]
            self._names[place * NAME_BYTES : (place + 1) * NAME_BYTES] = name
        self.since[place], self.credit[place], self.blocks[place] = since, credit, blocks
        table = self._tables[shard]
        table[self._slot(table, name)] = place
        self._count += 1
        self._link_last(place)

    def to_the_end(self, place: int) -> None:
        if place != self._last:
            self._unlink(place)
            self._link_last(place)

    def remove(self, name: bytes) -> bool:
        """Whether it was there."""
        table = self._tables[name[-1]]
        slot = self._slot(table, name)
        place = table[slot]
        if place == _NONE:
            return False
        self._close_gap(table, slot)
        self._fill[name[-1]] -= 1
        self._unlink(place)
        self._after[place], self._free = self._free, place
        self._count -= 1
        return True

    def restart(self) -> None:
        """All moments become 0, because the clock starts anew."""
        self.since = array("I", [0]) * len(self.since)

    def _link_last(self, place: int) -> None:
        self._before[place], self._after[place] = self._last, _NONE
        if self._last == _NONE:
            self._first = place
        else:
            self._after[self._last] = place
        self._last = place

    def _unlink(self, place: int) -> None:
        before, after = self._before[place], self._after[place]
        if before == _NONE:
            self._first = after
        else:
            self._after[before] = after
        if after == _NONE:
            self._last = before
        else:
            self._before[after] = before

    # --- the hash tables: linear probing, at most two thirds full ---

    @staticmethod
    def _home(table: array[int], name: bytes) -> int:
        return int.from_bytes(name[:8], "little") % len(table)

    def _slot(self, table: array[int], name: bytes) -> int:
        """Where it is, or the free slot where it would be."""
        slot = self._home(table, name)
        while (place := table[slot]) != _NONE and self.name(place) != name:
            slot = (slot + 1) % len(table)
        return slot

    def _close_gap(self, table: array[int], gap: int) -> None:
        """Free a slot, and move up what was put behind it because it was taken (Knuth, vol. 3, algorithm 6.4 R)."""
        slot, size = gap, len(table)
        while True:
            table[gap] = _NONE
            while True:
                slot = (slot + 1) % size
                place = table[slot]
                if place == _NONE:
                    return
                if (slot - self._home(table, self.name(place))) % size >= (slot - gap) % size:
                    break
            table[gap] = place
            gap = slot

    def _grow(self, shard: int) -> None:
        old = self._tables[shard]
        self._tables[shard] = new = array("I", [_NONE]) * (len(old) * 3 // 2)
        for place in old:
            if place != _NONE:
                new[self._slot(new, self.name(place))] = place


class Misses:
    """When items were missed, the last MISSES times of each; those not missed for longest are forgotten.

    20 bytes an item, and a third more for slots that are free.
    """

    def __init__(self) -> None:
        self._shards = [_Shard() for _ in range(SHARDS)]

    def __len__(self) -> int:
        return sum(shard.count for shard in self._shards)

    def clear(self) -> None:
        self._shards = [_Shard() for _ in range(SHARDS)]

    def of(self, name: bytes) -> array[int]:
        """Moments, the latest first; 0 for each that there was not."""
        shard = self._shards[name[-1]]
        slot = shard.find(_mark(name))
        return array("I", bytes(4 * MISSES)) if slot is None else shard.times[slot * MISSES : (slot + 1) * MISSES]

    def add(self, name: bytes, moment: int, room: int) -> None:
        """The item was missed at `moment`. room: how many items to remember, about, when there are so many."""
        shard, mark = self._shards[name[-1]], _mark(name)
        slot = shard.find(mark)
        if slot is None:
            if 8 * shard.count >= 7 * len(shard.marks) and len(shard.marks) * SHARDS < room:
                shard.grow()
            shard.put(mark, array("I", [moment]) + array("I", bytes(4 * (MISSES - 1))))
        else:
            start = slot * MISSES
            shard.times[start + 1 : start + MISSES] = shard.times[start : start + MISSES - 1]
            shard.times[start] = moment

    def forget(self, name: bytes) -> None:
        self._shards[name[-1]].forget(_mark(name))


def _mark(name: bytes) -> int:
    return int.from_bytes(name[:_MARK_BYTES], "little") or 1  # 0 marks a free slot


class _Shard:
    """Buckets of eight; an item goes into the emptier of two, so that nearly all slots fill before any is full.

    Of those in two full buckets the one not missed for longest goes.
    """

    def __init__(self) -> None:
        self._clear(1)

    def _clear(self, buckets: int) -> None:
        slots = buckets * _WAYS
        self.marks = array("I", bytes(_MARK_BYTES * slots))
        self.times = array("I", bytes(4 * MISSES * slots))
        self.count = 0

    def _buckets(self, mark: int) -> tuple[int, int]:
        more, one = divmod(mark, len(self.marks) // _WAYS)
        return one * _WAYS, more % (len(self.marks) // _WAYS) * _WAYS

    def find(self, mark: int) -> int | None:
        for start in self._buckets(mark):
            ways = self.marks[start : start + _WAYS]
            if mark in ways:
                return start + ways.index(mark)
        return None

    def put(self, mark: int, times: array[int]) -> None:
        one, other = self._buckets(mark)
        start = max(one, other, key=lambda start: self.marks[start : start + _WAYS].count(0))
        ways = self.marks[start : start + _WAYS]
        if 0 in ways:
            slot = start + ways.index(0)
            self.count += 1
        else:
            both = [*range(one, one + _WAYS), *range(other, other + _WAYS)]
            slot = min(both, key=lambda slot: self.times[slot * MISSES])
        self.marks[slot] = mark
        self.times[slot * MISSES : (slot + 1) * MISSES] = times

    def forget(self, mark: int) -> None:
        if (slot := self.find(mark)) is not None:
            self.marks[slot] = 0
            self.count -= 1

    def grow(self) -> None:
        marks, times = self.marks, self.times
        self._clear(len(marks) // _WAYS * 3 // 2 + 1)
        for slot, mark in enumerate(marks):
            if mark:
                self.put(mark, times[slot * MISSES : (slot + 1) * MISSES])

"""When is an object read next? A plan turned round: from names to their places in it.

A hash table in one array, four bytes a slot and two slots an entry, so that plans of millions can be kept. A
slot has 16 bits of the hash of a name and, in 16 more, where in the plan it is, to a 65,535th of its length. Nothing is
compared with the plan itself: it may be gone or changed by the time, and what a false answer costs (one in some
thousands) is that a copy of an object is kept that is of no use.

Hashes are Python's, of bytes: keyed anew in each process, so nobody can choose names that collide. As many entries as a
plan may have of one name, so many steps a look-up would take: both ends after `PROBES`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

SLOTS_PER_ENTRY = 2

# Each name has a way of its own through the slots, so that names which come often lie in the way of no others. What is
# further along it than that is left out.
PROBES = 64

_PLACES = 65535
_WORD = 2**64 - 1


def _slots(count: int) -> int:
    return count * SLOTS_PER_ENTRY + 1


def _onward(key: int) -> int:
    """To the next slot of a name. (Knuth's generator of 64 bits.)"""
    return key * 6364136223846793005 + 1442695040888963407 & _WORD


def memory_for(count: int) -> int:
    """Bytes that the timetable of so many entries takes."""
    return 4 * _slots(count)


class Timetable:
    """Of one part of a plan, whose entries are numbered from 0."""

    def __init__(self, count: int) -> None:
        self._slots = array("I", bytes(4)) * _slots(count)
        self._shift = max(0, (count // _PLACES).bit_length())  # so that count >> shift is less than _PLACES

    def fill(self, start: int, names: Iterable[bytes]) -> None:
        """Entry `start` and those after it, in their order; b"" is none. Before anybody looks anything up."""
        slots, size, shift = self._slots, len(self._slots), self._shift
        for number, name in enumerate(names, start):
            if not name:
                continue
            key = hash(name) & _WORD
            entry = key >> 48 << 16 | (number >> shift) + 1  # 0 is an empty slot
            for _ in range(PROBES):
                at = key % size
                if not slots[at]:
                    slots[at] = entry
                    break
                key = _onward(key)

    def next(self, key: int, number: int) -> int | None:
        """The first entry from `number` on of the name with this hash; None: there is none, as far as is known."""
        slots, size = self._slots, len(self._slots)
        key &= _WORD
        entry = slots[key % size]
        if not entry:  # as for half of all other names
            return None
        mark, first = key >> 48, -(-number >> self._shift)
        best = _PLACES
        for _ in range(PROBES):
            if entry >> 16 == mark and first <= (place := (entry & 0xFFFF) - 1) < best:
                best = place
            key = _onward(key)
            entry = slots[key % size]
            if not entry:
                break
        return best << self._shift if best < _PLACES else None

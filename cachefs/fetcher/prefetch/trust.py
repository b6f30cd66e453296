"""How much may be fetched ahead of a consumer that has no room on the SSD: as much as what it reads has earned.

What fits into the cache is never in vain. What does not is held in memory until it is read, and if nobody reads it the
origin was asked for nothing. So a consumer starts with a little credit and has at most as many unread ones in memory as
that. It earns by each item that is asked for in the order of its plan: after those shortly before it. A loader's
workers read at several places of the plan at once, each place in order; a reader whose plan is a wrong one hits upon
items of it here and there. It pays for each that is not in order, and for each that nobody came for.

One whose credit is gone is only watched: some items of its plan are looked out for, none is fetched, and when it reads
in order it is believed again. That costs the origin nothing.
"""

from __future__ import annotations

# So many may be in vain before anything is known. A consumer that reads what it said doubles it with every round.
FIRST = 16

# As many as the longest window has.
MOST = 1024

# One in vain takes what so many good ones have earned: a loader that skips a few percent of its plan keeps its hints,
# one that reads less than eight ninths of it loses them, because the origin would pay for it with every epoch.
COST = 8

# Before the first of so many nothing is said: each worker of a loader begins somewhere.
_GRACE = 32

# Of the missing items before one that is asked for, nearly all should have been: of a group of so many, all but one.
# How far before it groups end: for a single reader, for many threads or small batches, for several workers with large
# ones. Where workers have larger batches than that, each batch begins with some that seem out of order.
_GROUP, _BUT = 8, 1
_BEFORE = (1, 16, 256)

_REMEMBERED = 16384


class Trust:
    """credit: how many may be in memory unread."""

    def __init__(self) -> None:
        self.credit = FIRST
        self.lost = False
        self._count = 0
        self._asked = bytearray(_REMEMBERED)  # of the last items that were looked out for, in the order of the plan
        self._grace = _GRACE

    def look_out(self) -> int:
        """One more item of the plan is missing, and will be asked for if the plan is right; its number for `asked`."""
        number, self._count = self._count, self._count + 1
        self._asked[number % _REMEMBERED] = 0
        return number

    def asked(self, number: int) -> None:
        self._asked[number % _REMEMBERED] = 1
        if self._grace:
            self._grace -= 1
        elif any(self._read(number - before) for before in _BEFORE):
            self.credit = min(MOST, self.credit + 1)
            self.lost = self.lost and self.credit < FIRST
        else:
            self.in_vain()

    def _read(self, last: int) -> bool:
        """Whether what was looked out for until this number was asked for."""
        numbers = range(last, last - _GROUP, -1)
        return sum(self._asked[max(0, number) % _REMEMBERED] for number in numbers) >= _GROUP - _BUT

    def settled(self, number: int) -> None:
        """Nobody needs to ask for it: it is on the disk, or cannot be had. That says nothing."""
        self._asked[number % _REMEMBERED] = 1

    def in_vain(self, cost: int = COST) -> None:
        """It is not what is read."""
        self.credit = max(0, self.credit - cost)
        self.lost = self.lost or not self.credit

    @property
    def earned(self) -> bool:
        """Whether it was seen to read what it said, in that order, more than anything else."""
        return not self.lost and self.credit > FIRST

    def allows(self, unread: int) -> bool:
        """Whether one more may be fetched while so many are unread."""
        return not self.lost and unread < self.credit

"""Who gives its place to an object that was missed and does not fit, within a dataset in use; most often nobody.

When every item is read once per epoch in a fresh order, nobody may: what has not been read for long is what will be
read next (DESIGN section 6). When some items are read more often than others, those belong on the SSD. Both follow
from one rule, which needs to know neither which of the two it is, nor how long an epoch is:

    An item that was missed three times takes the place of a resident that was not read once meanwhile.

In epochs that never happens: between three reads of one item lies a whole epoch, in which every resident was read.
Of residents, the one unread for longest is looked at first, as CLOCK does; one that was found read more than once has
credit, and is passed over as often as halving takes to use it up.

Whether three are enough is found out by trial. Each replacement is a duel between who went and who came: whichever is
read first has won. Two jobs over one dataset, or uniform sampling, make three misses come about by chance, and who
went is read as soon as who came: then more are asked for. When nearly all who came were the better choice (what is
read has changed), two are enough.

Hits are not seen here; whether a resident was read since it was last asked about costs a look at a file. At most
LOOKS are taken for a miss, and none in epochs but one per resident in two epochs or so.

Chosen by simulation (`python -m bench.residency`, which runs this module; bench/RESIDENCY.md has what came out). With
one miss instead of three this is CLOCK and loses on everything; with two it loses on epochs; without credit it is
below SIEVE on flat Zipf traces; without duels, two jobs get 88% of what keeping gives them.

It is slower than SIEVE and S3-FIFO where what is read becomes something else altogether: three misses of each item
have to be waited for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from cachefs.fetcher.compact import MISSES, Misses, Queue

# Misses that an item needs: at first, at least and at most. At most: those remembered, and the one that asks.
_NEEDED = 3
_LEAST = 2
_MOST = MISSES + 1

# So often the time that a resident is passed over doubles, at most: 7 is three times.
_CREDIT = 7

# Credit of one that was not looked at yet. The first look says nothing: whoever missed it has read it, too.
_UNWATCHED = 255

# Residents looked at for one miss. An object that would need the place of more than these streams through.
LOOKS = 8

# Who came is first looked at when whoever missed it has read it: after so many more misses, and a part of a round.
_SOON = 16
_SOON_PART = 64

# Items whose misses are remembered for each resident. With fewer, the best 10% of a flat Zipf trace are not all found.
_REMEMBERED = 4

# Duels at a time; more are not watched. They are a sample, and a sample of so many is exact to 6%.
_DUELS = 256

# Part of the duels that who came has won, an average over the last _RATE or so. Between these, as many misses are
# needed as before. Even duels (.5) are those of a set that cannot become better.
_RATE = 32
_LOST = 0.25
_WON = 0.7

# Moments are counted in misses and kept in 32 bits: nine days at 5,000 a second, then the clock starts anew.
_END_OF_TIME = 0xFFFFFFFF


class _Duel:
    """who: came instead. It is asked about `wait` misses after `since`, then after twice as many."""

    __slots__ = ("since", "wait", "who")

    def __init__(self, who: bytes, since: int, wait: int) -> None:
        self.who = who
        self.since = since
        self.wait = wait


class Following:
    """One dataset. Items are named by 16 bytes of a hash.

    visited(item): whether it was read since it was last asked about. Asked in `place` only, which may wait for a disk.
    """

    def __init__(self, visited: Callable[[bytes], bool]) -> None:
        self._visited = visited
        self._residents = Queue()
        self._misses = Misses()
        self._now = 0
        self.needed = _NEEDED
        self._duels: OrderedDict[bytes, _Duel] = OrderedDict()  # by who went
        self._by_who_came: dict[bytes, bytes] = {}
        self._score = 0.5
        self._came: deque[tuple[bytes, int]] = deque()  # not looked at yet, with when they came

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, item: bytes) -> bool:
        return item in self._residents

    def kept(self, item: bytes, blocks: int = 1) -> None:
        """It is stored now. blocks: how much room it takes; the unit is the caller's, at most 65,535."""
        place = self._residents.find(item)
        if place is None:
            self._residents.append(item, self._now, blocks, _UNWATCHED)
            self._misses.forget(item)
        else:
            self._residents.blocks[place] = blocks
        if item in self._duels:  # it came back without having been missed here
            self._call_off(self._duels[item].who)

    def removed(self, item: bytes) -> None:
        """It is stored no longer, for whatever reason but that `place` has named it."""
        self._residents.remove(item)
        self._call_off(item)

    def missed(self, item: bytes) -> int | None:
        """It was fetched and does not fit. What to ask `place` with; None: it streams through."""
        if self._now == _END_OF_TIME:
            self._restart()
        self._now += 1
        earlier = self._misses.of(item)
        self._misses.add(item, self._now, _REMEMBERED * len(self._residents))
        since = earlier[self.needed - 2]
        first = self._residents.first
        if first is None:
            return None
        if since > self._residents.since[first]:
            return since
        return 0 if item in self._duels or self._due() is not None or self._came_long_ago() else None

    def place(self, item: bytes, since: int, blocks: int = 1) -> list[bytes]:
        """Residents that give it their places, at least `blocks` together; removed here. []: it streams through."""
        if item in self._duels:
            self._look(self._duels[item].who, else_lost=True)
        if due := self._due():
            self._look(due.who)
        if self._came_long_ago():
            self._look_first(self._came.popleft()[0])
        found: list[int] = []
        room = 0
        at = self._residents.first
        for _ in range(LOOKS):
            if at is None or self._residents.since[at] >= since:
                break
            this, at = at, self._residents.following(at)
            if self._spared(this):
                continue
            found.append(this)
            room += self._residents.blocks[this]
            if room >= blocks:
                return self._replace([self._residents.name(place) for place in found], item, since)
        return []

    def _spared(self, place: int) -> bool:
        """Whether a resident stays, for having been read lately or often."""
        visited, credit = self._visited(self._residents.name(place)), self._residents.credit[place]
        if credit == _UNWATCHED:
            self._pass_over(place, 0)
        elif visited:
            self._was_read(place)
        elif credit:
            self._pass_over(place, credit // 2)
        else:
            return False
        return True

    def _pass_over(self, place: int, credit: int) -> None:
        self._residents.credit[place] = credit
        self._residents.since[place] = self._now
        self._residents.to_the_end(place)

    def _was_read(self, place: int) -> None:
        self._pass_over(place, min(self._residents.credit[place] + 1, _CREDIT))
        self._decide(self._residents.name(place), won=True)

    def _replace(self, victims: list[bytes], item: bytes, since: int) -> list[bytes]:
        for victim in victims:
            self._decide(victim, won=False)
            self._residents.remove(victim)
        self._call_off(item)
        if len(self._duels) >= _DUELS:
            self._call_off(self._duels[next(iter(self._duels))].who)
        self._came.append((item, self._now))
        went = victims[0]
        self._duels[went] = _Duel(item, self._now, self._now - since)
        self._by_who_came[item] = went
        return victims

    # --- those that came ---

    def _came_long_ago(self) -> bool:
        return bool(self._came) and self._now - self._came[0][1] > _SOON + len(self._residents) // _SOON_PART

    def _look_first(self, item: bytes) -> None:
        """From now on it can be told whether it is read."""
        place = self._residents.find(item)
        if place is not None and self._residents.credit[place] == _UNWATCHED and self._visited(item):
            self._residents.credit[place] = 0

    def _due(self) -> _Duel | None:
        """The duel whose time it is to be looked at, if any."""
        if self._duels:
            duel = self._duels[next(iter(self._duels))]
            if self._now - duel.since > duel.wait:
                return duel
        return None

    def _look(self, who: bytes, else_lost: bool = False) -> None:
        """Whether the one that came has been read. else_lost: the one that went is, just now."""
        place = self._residents.find(who)
        if place is None or self._residents.credit[place] == _UNWATCHED:
            self._call_off(who)
        elif self._visited(who):
            self._was_read(place)
        elif else_lost:
            self._decide(who, won=False)
        else:
            went = self._by_who_came[who]
            duel = self._duels[went]
            duel.since, duel.wait = self._now, 2 * duel.wait
            self._duels.move_to_end(went)

    def _decide(self, who: bytes, won: bool) -> None:
        if not self._call_off(who):
            return
        self._score += ((1.0 if won else 0.0) - self._score) / _RATE
        if self._score < _LOST and self.needed < _MOST:
            self.needed += 1
            self._score = 0.5
        elif self._score > _WON and self.needed > _LEAST:
            self.needed -= 1
            self._score = 0.5

    def _call_off(self, who: bytes) -> bool:
        """End the duel of one that came, if it has one."""
        went = self._by_who_came.pop(who, None)
        if went is None:
            return False
        del self._duels[went]
        return True

    def _restart(self) -> None:
        self._now = 0
        self._residents.restart()
        self._misses.clear()
        self._duels.clear()
        self._by_who_came.clear()
        self._came.clear()

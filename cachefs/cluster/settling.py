"""When is a change of membership believed? Pure decisions over what was seen when.

Each change moves objects from owner to owner, so what passes is waited out, for each node by itself:
  * a node that is gone is still counted for LEAVE seconds. A restart, and anything that flaps faster, is never
    noticed; whoever asks a dead node meanwhile is overtaken by the origin after the hedge delay;
  * a new one is counted after JOIN seconds, twice as long for each time that it left lately: what flaps slowly is out
    most of the time, as in the damping of flapping routes (RFC 2439);
  * changes come at most once per APART seconds, so that a job that starts on 64 nodes makes few.
A node that has another address or weight is what it says at once: the old one is of no use to anybody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cachefs.cluster.nodes import Node

LEAVE = 5.0
JOIN = 1.0
LONGEST_JOIN = 300.0
APART = 1.0

# After so many quiet seconds the times that a node left are forgotten.
FORGET = 600.0

View = frozenset[Node]


class Settling:
    """Told what is seen, tells what to believe. Has no clock of its own."""

    def __init__(self) -> None:
        self.view: View = frozenset()
        self._seen: dict[str, Node] = {}
        self._since: dict[str, float] = {}  # by name: since when it is seen to be other than believed
        self._left: dict[str, tuple[int, float]] = {}  # by name: how often lately, when last
        self._changed = -math.inf

    def saw(self, now: float, nodes: Iterable[Node]) -> None:
        """All that a source names. Of two of one name the first in order counts, for every node that sees them."""
        self._seen = {node.name: node for node in sorted(nodes, reverse=True)}
        believed = {node.name for node in self.view}
        for name in self._seen.keys() | believed:
            if (name in self._seen) == (name in believed):
                self._since.pop(name, None)
            else:
                self._since.setdefault(name, now)
        for name in self._since.keys() - self._seen.keys() - believed:
            del self._since[name]  # it came and went before it was believed: not forgotten while it goes on so
            if name in self._left:
                self._left[name] = (self._times_left(name, now), now)

    def due(self) -> float:
        """When `settle` will have something to say; infinity: not before something is seen."""
        if any(node.name in self._seen and node != self._seen[node.name] for node in self.view):
            return -math.inf
        if not self.view and self._seen:
            return -math.inf  # the first that is heard of anybody
        return max(min(map(self._believable, self._since), default=math.inf), self._changed + APART)

    def settle(self, now: float) -> View:
        """The view as of now."""
        believed = {node.name: self._seen.get(node.name, node) for node in self.view}
        if not believed:
            believed = dict(self._seen)
            self._since.clear()
        elif now >= self._changed + APART:
            for name in [name for name in self._since if self._believable(name) <= now]:
                del self._since[name]
                if name in self._seen:
                    believed[name] = self._seen[name]
                else:
                    del believed[name]
                    self._left[name] = (self._times_left(name, now) + 1, now)
        view = frozenset(believed.values())
        if {node.name for node in view} != {node.name for node in self.view}:
            self._changed = now
            self._left = {name: left for name, left in self._left.items() if now - left[1] < FORGET}
        self.view = view
        return view

    def _believable(self, name: str) -> float:
        since = self._since[name]
        if name not in self._seen:
            return since + LEAVE
        return since + min(LONGEST_JOIN, JOIN * 2.0 ** min(20, self._times_left(name, since)))

    def _times_left(self, name: str, now: float) -> int:
        times, last = self._left.get(name, (0, -math.inf))
        return times if now - last < FORGET else 0

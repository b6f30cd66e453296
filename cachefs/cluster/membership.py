"""Who is in the cluster now, from whatever already runs it.

A view is a set of nodes. Reading it is reading an attribute, whatever its source does meanwhile: nobody waits for a
change, and a source that cannot be reached leaves the last view in place, with one warning. Two nodes may disagree for
a while; then an object has two owners and is read twice, which costs efficiency and nothing else.

A cluster of one is `Alone`, which looks the same and never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Protocol

from cachefs.cluster.addresses import recognise
from cachefs.cluster.nodes import DEFAULT_WEIGHT, MOST_CAPACITY, Node
from cachefs.cluster.settling import Settling, View
from cachefs.cluster.weights import weighed
from cachefs.errors import CacheFSError, MembershipError

log = logging.getLogger("cachefs.cluster")

# Between attempts to reach a source that failed: doubled each time, and spread, because all nodes lose it at once.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class Source(Protocol):
    """What tells who is there. `watch` says all nodes at first and whenever they may have changed.

    It raises MembershipError when it cannot say; whoever watches comes again later. One watch at a time.
    """

    def watch(self) -> AsyncGenerator[View, None]: ...


class Members(Protocol):
    """What the rest of the cluster sees of membership."""

    @property
    def view(self) -> View: ...

    @property
    def me(self) -> Node: ...

    @property
    def trouble(self) -> str: ...

    def changes(self) -> AsyncGenerator[View, None]: ...

    @property
    def silent(self) -> View: ...

    def told(self, name: str, weight: int) -> None: ...

    async def __aenter__(self) -> Members: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Alone:
    """A node that shares with nobody."""

    trouble = ""
    silent: View = frozenset()

    def __init__(self, me: Node) -> None:
        self.me = me
        self.view: View = frozenset({me})

    async def changes(self) -> AsyncGenerator[View, None]:
        """The one view; then nothing, until whoever waits is cancelled."""
        yield self.view
        await asyncio.Event().wait()

    def told(self, name: str, weight: int) -> None:
        """Nobody else is there to say anything."""

    async def __aenter__(self) -> Alone:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class Membership:
    """Follows a source while it is entered (`async with`). Until that has spoken, this node is alone.

    view: who is there. me: the node of the view that is this one. trouble: why the view may be out of date, "" when
    it is not. All three may be read at any time from any thread.
    """

    def __init__(self, source: Source, me: Node, clock: Callable[[], float] = time.monotonic) -> None:
        self.view: View = frozenset({me})
        self.me = me
        self.trouble = ""
        self._given = me
        self._source = source
        self._clock = clock
        self._settling = Settling()
        self._nodes: View = frozenset()  # as the source said them last
        self._weights: dict[str, int] = {}
        self._seen = asyncio.Event()  # something new was seen
        self._published = asyncio.Event()  # replaced with each view
        self._heard = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Membership:
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._publish())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def heard(self, seconds: float) -> bool:
        """Wait for the source's first word, for so many seconds at most. Whether it came."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._heard.wait()
        return self._heard.is_set()

    async def changes(self) -> AsyncGenerator[View, None]:
        """The view now, and each later one. Who is slow gets the newest and not those between."""
        while True:
            published, view = self._published, self.view
            yield view
            while self.view == view:
                await published.wait()
                published = self._published

    @property
    def silent(self) -> View:
        """Nodes of which nobody has said what they can store: neither the source nor they themselves."""
        known = self._weights.keys() | {self.me.name}
        return frozenset(node for node in self._nodes if node.weight == DEFAULT_WEIGHT and node.name not in known)

    def told(self, name: str, weight: int) -> None:
        """A node said what it can store: counts where the source does not say. In the loop of this membership."""
        if not 0 < weight <= MOST_CAPACITY or self._weights.get(name) == weight:
            return
        if any(node.name == name for node in self._nodes | self.view):
            self._weights[name] = weight
            self._see()

    async def _follow(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with contextlib.aclosing(self._source.watch()) as views:
                    async for nodes in views:
                        pause = FIRST_PAUSE
                        self._look(nodes)
                raise MembershipError("the source of the cluster's nodes ended")
            except CacheFSError as error:
                self._warn(str(error))
            except Exception as error:  # a defect in one source must not end membership
                log.exception("cluster membership")
                self._warn(f"{type(error).__name__}: {error}")
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _look(self, nodes: View) -> None:
        if not nodes:
            # Not so: this node is here. A name server or an API server that starts up says it too.
            self._warn("the source of the cluster's nodes names none")
            return
        if self.trouble:
            log.info("cluster membership: heard again, %d nodes", len(nodes))
            self.trouble = ""
        self._nodes = nodes
        self._see()

    def _see(self) -> None:
        own = {recognise(self._nodes, self._given).name: self._given.weight}
        self._settling.saw(self._clock(), weighed(self._nodes, self._weights | own))
        self._seen.set()

    def _warn(self, trouble: str) -> None:
        """Once per outage: it is tried again every few seconds."""
        if not self.trouble:
            log.warning("cluster membership: %s; going on with the %d nodes last seen", trouble, len(self.view))
        self.trouble = trouble

    async def _publish(self) -> None:
        while True:
            wait = self._settling.due() - self._clock()
            if wait > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait if wait < math.inf else None):
                        await self._seen.wait()
                self._seen.clear()
                continue
            view = self._settling.settle(self._clock())
            if view != self.view:
                self._tell(view)
            self._heard.set()

    def _tell(self, view: View) -> None:
        there, before = {node.name for node in view}, {node.name for node in self.view}
        if there != before:
            log.info("cluster: %d nodes, joined %s, left %s", len(view), _names(there - before), _names(before - there))
        else:
            log.info("cluster: %s changed address or weight", _names({node.name for node in view - self.view}))
        self.me = recognise(view, self._given)
        self.view = view
        # What a node said is forgotten when it is believed to be gone, and not before: it says it when it is met, and
        # one that the source left out for a moment is not met anew.
        names = {node.name for node in view | self._nodes}
        self._weights = {name: weight for name, weight in self._weights.items() if name in names}
        published, self._published = self._published, asyncio.Event()
        published.set()


def _names(nodes: set[str]) -> str:
    names = sorted(nodes)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def open_members(url: str, me: Node) -> Alone | Membership:
    """Membership from what the URL names (see `sources`), or alone ("" or "alone:"). Raises ConfigError."""
    if url in ("", "alone:"):
        return Alone(me)
    from cachefs.cluster.sources import open_source

    return Membership(open_source(url, me), me)

"""The way to one peer: what is asked of it, gathered into requests, over a few connections that are kept.

The first object that is asked for goes at once. While a connection is busy, what is asked next gathers, and goes
together when one is free, or over another one when it has waited for GATHER_SECONDS. So a lone reader waits for nobody,
and many readers make large requests, with no timer to tune.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec

from cachefs.budget import Urgency
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.channel import Channel
from cachefs.cluster.peers.gathering import Ask, Lane
from cachefs.cluster.peers.health import Health
from cachefs.cluster.peers.receiving import Answer, Piece, Unlike
from cachefs.cluster.peers.trust import Session, Trust
from cachefs.cluster.peers.wire import Item, Request, Status, encode
from cachefs.errors import PeerBusy, PeerError, PeerHasNot, PeerRefused, PeerTimeout, PeerWrong

log = logging.getLogger("cachefs.peers")

GATHER_SECONDS = 0.01

# How exact deadlines are.
SWEEP_SECONDS = 0.1

# How much longer the peer goes on for us: if it ended at our deadline, that would look like a connection that broke.
OUR_END_FIRST = 1.0

# What somebody comes to wait for after it was sent among things that nobody waits for: most of it comes within this
# time, and need not be urged on.
URGE_SECONDS = 0.02

# What nobody waits for yet may come as late as this after it was sent: those who wait go first at the other side.
PREFETCH_PATIENCE = 5.0

CONNECT_SECONDS = 3.0

# A peer that sends nothing in the middle of an object, or of an answer that it had ready.
STALL_SECONDS = 5.0

# Less than the server keeps a connection on which nobody asks.
KEEP_SECONDS = 300.0

# Told (name of a node, bytes that it can store) whenever it has said so.
Told = Callable[[str, int], None]

_WORDS = {
    Status.MISSING: "does not have it",
    Status.FAILED: "could not get it from the origin",
    Status.REFUSED: "gives less in one answer",
}


class Line(NamedTuple):
    channel: Channel
    session: Session
    used: float
    fresh: bool


class Link:
    """To one peer. Used on one event loop; `close` ends everything."""

    def __init__(self, node: Node, trust: Trust, health: Health, told: Told) -> None:
        self.node = node
        self.health = health
        self.capacity = 0  # as it said last
        self._told = told
        self._trust = trust
        self._loop = asyncio.get_running_loop()
        self._idle: list[Line] = []
        self._lanes = (Lane(prefetch=False), Lane(prefetch=True))
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: set[Ask] = set()
        self._sweeping: asyncio.TimerHandle | None = None

    async def get(self, item: Item, *, fetch: bool, urgency: Urgency | None, deadline: float) -> Piece:
        """urgency: None = somebody waits for it. Raises PeerError."""
        prefetch = urgency is not None and urgency.level > 0
        if why := self.health.why_not(prefetch=prefetch):
            raise PeerBusy(f"{self.node.name}: {why}", path=item.path)
        ask = Ask(item, fetch, self._loop.time() + deadline, self._loop.create_future(), prefetch)
        self._asks.add(ask)
        self._line_up(ask)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        try:
            if urgency is None or not prefetch:
                return await ask.answer
            with urgency.telling(lambda: self._lifted(ask, urgency)):
                return await ask.answer
        except asyncio.CancelledError:
            ask.answer.cancel()
            ask.leave()
            raise
        finally:
            if ask.urging is not None:
                ask.urging.cancel()
            self._asks.discard(ask)

    async def greet(self) -> int:
        """What the peer says that it can store; 0: it does not say. Raises PeerError, OSError."""
        if not self.capacity:
            async with self.line():
                pass
        return self.capacity

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        """A connection of one's own; it is kept for others if all went well. Raises PeerError, OSError."""
        line = await self._line()
        try:
            yield line
        except BaseException:
            line.channel.close()
            raise
        self._idle.append(line._replace(used=self._loop.time(), fresh=False))

    def _line_up(self, ask: Ask) -> None:
        lane = self._lanes[ask.prefetch]
        lane.queue.append(ask)
        self._hire(lane)

    def _lifted(self, ask: Ask, urgency: Urgency) -> None:
        """Somebody waits for it now."""
        if urgency.level > 0 or not ask.prefetch or ask.answer.done():
            return
        ask.prefetch = False
        if ask.taken:
            ask.urging = self._loop.call_later(URGE_SECONDS, self._urge, ask)
        else:
            self._line_up(ask)

    def _urge(self, ask: Ask) -> None:
        if not ask.answer.done():
            ask.urging = self._start(self._urged(ask))

    async def _urged(self, ask: Ask) -> None:
        """See to it that it comes, though it was asked for among things that nobody waits for.

        Whoever asks for its first byte and waits for it makes the peer fetch it before those. When the peer has it and
        it still does not come, it is behind others on the way, and is asked for once more.
        """
        left = ask.until - self._loop.time()
        first = msgspec.structs.replace(ask.item, length=1)
        try:
            await self.get(first, fetch=ask.fetch, urgency=None, deadline=left)
            await asyncio.sleep(URGE_SECONDS)
            piece = await self.get(ask.item, fetch=ask.fetch, urgency=None, deadline=left)
        except PeerError:
            return  # the answer that is under way decides
        if not ask.answer.done():
            ask.answer.set_result(piece)
            ask.leave()

    def _sweep(self) -> None:
        """End those whose deadline has come. One timer for all: one for each costs as much as what it guards."""
        now = self._loop.time()
        late = [ask for ask in self._asks if ask.until <= now and not ask.answer.done()]
        for ask in late:
            ask.fail(PeerTimeout(f"{self.node.name}: no answer before the deadline", path=ask.item.path))
        if any(ask.sent for ask in late):
            self.health.failed("no answer before the deadline")
        for ask in late:
            ask.leave()
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if self._asks else None

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lane in self._lanes:
            for ask in lane.queue:
                ask.fail(PeerBusy(f"{self.node.name}: is asked nothing any more", path=ask.item.path))
            lane.queue.clear()
        while self._idle:
            self._idle.pop().channel.close()

    # --- gathering ---

    def _hire(self, lane: Lane) -> None:
        """See to it that somebody takes what is in the lane: a worker that is free, or one more in a moment."""
        if lane.workers == 0:
            self._work(lane)
        elif lane.workers < lane.most and lane.timer is None:
            lane.timer = self._loop.call_later(GATHER_SECONDS, self._hire_more, lane)

    def _hire_more(self, lane: Lane) -> None:
        lane.timer = None
        if lane.queue and lane.workers < lane.most:
            self._work(lane)

    def _work(self, lane: Lane) -> None:
        lane.workers += 1
        self._start(self._worker(lane))

    def _start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _worker(self, lane: Lane) -> None:
        try:
            await asyncio.sleep(0)  # what is asked in the same turn of the loop goes together
            while asks := lane.take():
                if lane.queue:
                    self._hire(lane)
                await self._settle(lane, asks)
        finally:
            lane.workers -= 1

    async def _settle(self, lane: Lane, asks: list[Ask]) -> None:
        """Every ask has its answer, or its error, afterwards."""
        exchange = self._loop.create_task(self._exchange(lane, asks))

        def left() -> None:
            # The last who waited has left: what still comes is not worth its bytes.
            if all(ask.answer.done() for ask in asks):
                exchange.cancel()

        for ask in asks:
            ask.left = left
        error: PeerError
        try:
            await asyncio.wait((exchange,))
            if exchange.cancelled():
                self.health.given_up()
                return
            failure = exchange.exception()
            if failure is None:
                return
            if isinstance(failure, ConnectionError) and all(ask.answer.done() for ask in asks):
                self.health.given_up()  # it went away after all had come, before it said so
                return
            error = self._judge(failure)
            for ask in asks:
                ask.fail(type(error)(error.message, path=ask.item.path))
        finally:
            for ask in asks:
                if ask.left is left:  # and not in another request by now, because it came with wrong bytes
                    ask.left = None  # else they refer to each other, and their bytes stay until the collector comes
            exchange.cancel()
            await asyncio.wait((exchange,))

    def _judge(self, failure: BaseException) -> PeerError:
        """What a failed exchange says of the peer."""
        name = self.node.name
        if isinstance(failure, PeerBusy):
            return PeerBusy(f"{name}: {failure.message}")
        if isinstance(failure, PeerWrong):
            self.health.sent_wrong(failure.message)
            return PeerWrong(f"{name}: {failure.message}")
        if isinstance(failure, PeerRefused):
            log.warning("%s: %s", name, failure.message)
            self.health.failed(failure.message)
            return PeerRefused(f"{name}: {failure.message}")
        if isinstance(failure, TimeoutError):
            why = str(failure) or "stopped in the middle"
            self.health.failed(why)
            return PeerTimeout(f"{name}: {why}")
        if not isinstance(failure, OSError):
            log.error("%s: a request failed", name, exc_info=failure)
        why = f"{type(failure).__name__}: {failure}"
        self.health.failed(why)
        return PeerError(f"{name}: {why}")

    # --- one request ---

    async def _exchange(self, lane: Lane, asks: list[Ask]) -> None:
        """Raises PeerError, OSError, TimeoutError."""
        self.health.tried()
        while True:
            line = await self._line()
            whole = False
            answer = Answer([ask.item for ask in asks], line.session, lambda index, came: self._came(asks[index], came))
            try:
                await self._converse(lane, line, answer, asks)
                whole = True
                return
            except ConnectionError:
                # A connection that was kept may have been closed by the other side meanwhile: that is no failure.
                if line.fresh or answer.begun:
                    raise
            finally:
                if whole:
                    self._idle.append(line._replace(used=self._loop.time(), fresh=False))
                else:
                    line.channel.close()

    async def _converse(self, lane: Lane, line: Line, answer: Answer, asks: list[Ask]) -> None:
        now = self._loop.time()
        until = max(ask.until for ask in asks)
        fetch = asks[0].fetch
        request = Request(
            [ask.item for ask in asks],
            fetch=fetch,
            prefetch=lane.prefetch,
            patience=max(1, min(600_000, int((until - now + OUR_END_FIRST) * 1000))),
        )
        for ask in asks:
            ask.sent = now
        async with asyncio.timeout(STALL_SECONDS):
            await line.session.send(line.channel, encode(request))
        # What is fetched first takes as long as the origin takes.
        patience = until - now if fetch else STALL_SECONDS
        await line.channel.fill(answer.frames(), lambda: STALL_SECONDS if answer.within else patience)
        if answer.last is Status.BUSY:
            self.health.was_busy(answer.retry, prefetch=lane.prefetch)
            raise PeerBusy("has too much to do")
        self.health.well(self._loop.time() - now)

    def _came(self, ask: Ask, came: Piece | Status | Unlike) -> None:
        if isinstance(came, Unlike):
            log.warning("%s: %s; it is asked to look at what it has", self.node.name, came.why)
            ask.item = msgspec.structs.replace(ask.item, look=True)
            ask.taken = False
            self._line_up(ask)
            return
        if not isinstance(came, Piece):
            ask.fail(PeerHasNot(f"{self.node.name}: {_WORDS.get(came, 'has no answer')}", path=ask.item.path))
            return
        if not ask.item.word:  # what is said of catalogs waits for work: it would pass for how long an object takes
            self.health.answered(self._loop.time() - ask.sent, len(came.data))
        if not ask.answer.done():
            ask.answer.set_result(came)

    async def _line(self) -> Line:
        while self._idle:
            line = self._idle.pop()
            if self._loop.time() - line.used < KEEP_SECONDS:
                return line
            line.channel.close()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                channel = await dial(self.node)
                try:
                    session = await self._trust.call(channel, self.node.certified)
                except BaseException:
                    channel.close()
                    raise
        except TimeoutError:
            raise PeerTimeout(f"no connection in {CONNECT_SECONDS:g} s") from None
        if session.capacity:
            self.capacity = session.capacity
            self._told(self.node.name, session.capacity)
        return Line(channel, session, self._loop.time(), fresh=True)


async def dial(node: Node) -> Channel:
    """A connection to `node`, nothing said yet. Raises OSError; whoever calls has a deadline."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return Channel(sock)
    raise failure or OSError(f"{node.host}: has no address")

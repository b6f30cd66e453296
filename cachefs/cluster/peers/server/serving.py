"""Take peers' connections and answer what they ask, each in a task of its own.

The way of a request: if it is small, and all of it is in memory here, it is answered at once -> else: is there room for
it (`limits`) -> a thread opens and sends what is stored here -> if the peer wants the rest fetched, all of it is asked
of the fetcher, and each piece is sent when it is there -> END. A peer that hangs up, or whose patience ends, takes its
request with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cachefs.budget import Budget
from cachefs.cluster.peers.account import INQUIRY
from cachefs.cluster.peers.channel import Channel
from cachefs.cluster.peers.server.asking import Asking
from cachefs.cluster.peers.server.blobs import Blobs, Piece
from cachefs.cluster.peers.server.catalogs import Catalogs
from cachefs.cluster.peers.server.limits import Admission, Limits
from cachefs.cluster.peers.server.sending import PREFETCH_TURN_BYTES, TURN_BYTES, Outbox, Sent
from cachefs.cluster.peers.trust import Session, Trust
from cachefs.cluster.peers.wire import MOST_REQUEST, Item, Request, Status, decode_request
from cachefs.descriptors import HINT, allow_files
from cachefs.errors import CacheFSError, PeerError, PeerRefused, PeerTimeout

log = logging.getLogger("cachefs.peers")

T = TypeVar("T")

FOREGROUND, PREFETCH = 0, 1

# A connection, and what is open of what it asks for.
_FILES_PER_CONNECTION = 4

# What is answered at once, of what is in memory: so many items, each of so many bytes at most. It costs the others on
# the loop half a millisecond, and saves the way to a thread and back, which is most of what one small object costs.
AT_ONCE_ITEMS = 4
AT_ONCE_BYTES = 256 * 1024

# How long nobody is taken when there are no descriptors left; how often it is said that somebody was turned away.
PAUSE_SECONDS = 1.0
TELL_SECONDS = 60.0


class Server:
    """Serves one cache. asking: None = only what is stored here. catalogs: None = nothing is said of them.

    Used on one event loop, until `close`.
    """

    def __init__(
        self,
        blobs: Blobs,
        trust: Trust,
        *,
        asking: Asking | None = None,
        catalogs: Catalogs | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._blobs = blobs
        self._trust = trust
        self._asking = asking
        self._catalogs = catalogs
        self._limits = limits or Limits()
        self._admission = Admission(self._limits)
        self._senders = Budget(self._limits.senders)
        self._threads = ThreadPoolExecutor(self._limits.senders, thread_name_prefix="peers")
        self._loop = asyncio.get_running_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._listener: socket.socket | None = None
        self._again: asyncio.TimerHandle | None = None
        self._files = self._most = 0
        self._tell_at = 0.0
        self.turned_away = 0
        # What this node says of itself to whoever asks; None = nothing.
        self.account: Callable[[], Awaitable[bytes]] | None = None
        self.requests = 0
        self.objects = 0
        self.bytes = 0

    def listen(self, host: str, port: int) -> int:
        """Begin; the port (that was chosen, for port 0). Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self._listener.setblocking(False)
        self._files = allow_files()
        self._most = min(self._limits.connections, self._files // _FILES_PER_CONNECTION)
        if self._most < self._limits.connections:
            log.warning("at most %d connections of other nodes, as this process may open %d files: %s",
                        self._most, self._files, HINT)  # fmt: skip
        self._loop.add_reader(self._listener.fileno(), self._accept, self._listener)
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._catalogs is not None:
            await self._catalogs.close()
        if self._asking is not None:
            await self._asking.close()
        self._threads.shutdown()

    def report(self) -> dict[str, int]:
        return {
            "connections": len(self._connections),
            "answering": self._admission.foreground,
            "answering_prefetch": self._admission.prefetch,
            "refused": self._admission.refused,
            "turned_away": self.turned_away,
            "requests": self.requests,
            "objects": self.objects,
            "bytes": self.bytes,
        }

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):  # a bounded number per turn: many who come must not starve those who are here
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Whoever knocks goes on knocking, which would keep the loop busy with nothing else.
                log.warning("no connection can be taken for a while (%s): %s", error.strerror, HINT)
                fd = listener.fileno()
                self._loop.remove_reader(fd)
                self._again = self._loop.call_later(PAUSE_SECONDS, self._loop.add_reader, fd, self._accept, listener)
                return
            if len(self._connections) >= self._most or self._strangers >= self._limits.strangers:
                sock.close()
                self._turned_away()
                continue
            task = self._loop.create_task(self._connection(Channel(sock), str(address[0])))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    def _turned_away(self) -> None:
        self.turned_away += 1
        now = self._loop.time()
        if now >= self._tell_at:
            self._tell_at = now + TELL_SECONDS
            log.warning("%d connections are open, %d of them of who has not shown who it is: more are turned away",
                        len(self._connections), self._strangers)  # fmt: skip

    async def _connection(self, channel: Channel, address: str) -> None:
        try:
            session = await self._greet(channel)
            while True:
                said = await self._next(channel, session)
                if said == INQUIRY:
                    await self._watched(channel, self._tell(channel, session))
                    continue
                request = decode_request(said)
                outbox = self._at_once(channel, session, request)
                if outbox is None:
                    await self._watched(channel, self._answer(channel, session, address, request))
                elif outbox.unsent:
                    await self._watched(channel, self._rest(channel, outbox, request))
                else:
                    await asyncio.sleep(0)  # who sends requests without waiting for answers has no loop for itself
        except PeerError as error:
            log.warning("%s was cut off: %s", address, error)
        except (OSError, TimeoutError) as error:
            log.debug("%s is gone: %s", address, error)
        except Exception:  # a defect of ours must not end the server, and is seen
            log.exception("a request of %s failed", address)
        finally:
            channel.close()

    async def _greet(self, channel: Channel) -> Session:
        self._strangers += 1
        try:
            async with asyncio.timeout(self._limits.handshake):
                return await self._trust.answer(channel)
        finally:
            self._strangers -= 1

    async def _next(self, channel: Channel, session: Session) -> bytes:
        async with asyncio.timeout(self._limits.idle) as deadline:
            return await session.receive(
                channel, MOST_REQUEST, begun=lambda: deadline.reschedule(self._loop.time() + self._limits.transfer)
            )

    async def _watched(self, channel: Channel, answer: Coroutine[object, object, None]) -> None:
        """Await `answer`; end it when the peer hangs up."""
        task = self._loop.create_task(answer)
        fd = channel.sock.fileno()

        def heard() -> None:
            if channel.hung_up():
                task.cancel()
            else:
                # Its next request: the thread that sent the end of this answer has not told us yet.
                self._loop.remove_reader(fd)

        self._loop.add_reader(fd, heard)
        try:
            await asyncio.wait((task,))
            if task.cancelled():
                raise ConnectionAbortedError("it hung up while it was answered")
            task.result()
        finally:
            self._loop.remove_reader(fd)
            task.cancel()
            await asyncio.wait((task,))

    async def _tell(self, channel: Channel, session: Session) -> None:
        if self.account is None:
            raise PeerRefused("asks what this node says of itself, and it says nothing")
        async with asyncio.timeout(self._limits.transfer):
            await session.send(channel, await self.account())

    # --- one request ---

    def _at_once(self, channel: Channel, session: Session, request: Request) -> Outbox | None:
        """Answer a small request of what is in memory, without waiting for anything. None: nothing was said.

        It takes no place of those that `limits` has: it is over before another request is looked at. Of what nobody
        waits for nothing is answered so: it goes behind.
        """
        items = request.items
        if (
            request.keep
            or request.prefetch
            or len(items) > AT_ONCE_ITEMS
            or any(item.word or item.keep for item in items)
        ):
            return None
        outbox = Outbox(channel.sock, session, lambda index: self._resident(index, items[index]), resident=True)
        outbox.look_for(range(len(items)))
        outbox.end_if_complete()
        try:
            outbox.pump()
        except BlockingIOError:
            outbox.close()
            return None
        except BaseException:
            outbox.close()
            raise
        self.requests += 1
        self.objects += len(items)
        self.bytes += outbox.sent
        if not outbox.unsent:
            outbox.close()
        return outbox

    def _resident(self, index: int, item: Item) -> Piece:
        """Raises BlockingIOError when it is not in memory, or is not small."""
        piece = self._blobs.find_resident(index, item)
        if piece.length > AT_ONCE_BYTES:
            piece.close()
            raise BlockingIOError
        return piece

    async def _rest(self, channel: Channel, outbox: Outbox, request: Request) -> None:
        """Of what was answered at once, what the socket did not take."""
        try:
            async with asyncio.timeout(request.patience / 1000):
                await self._drain(channel, outbox, request)
        finally:
            outbox.close()

    async def _answer(self, channel: Channel, session: Session, address: str, request: Request) -> None:
        turn = PREFETCH_TURN_BYTES if request.prefetch else TURN_BYTES
        outbox = Outbox(channel.sock, session, lambda index: self._find(index, request.items[index]), turn=turn)
        try:
            with self._admission.enter(session.who(address), request.prefetch) as admitted:
                async with asyncio.timeout(request.patience / 1000):
                    if admitted:
                        self.requests += 1
                        await self._give(channel, outbox, request)
                    else:
                        outbox.say(Status.BUSY, size=self._limits.retry)
                        await self._drain(channel, outbox, request)
        finally:
            outbox.close()
            self.bytes += outbox.sent

    async def _give(self, channel: Channel, outbox: Outbox, request: Request) -> None:
        if request.keep:
            await self._keep(outbox, request)
            outbox.say(Status.END)
            await self._drain(channel, outbox, request)
            return
        outbox.look_for(range(len(request.items)))
        outbox.end_if_complete()
        await self._drain(channel, outbox, request)
        wanted, outbox.missing = outbox.missing, []
        damaged, outbox.damaged = outbox.damaged, []
        self.objects += len(request.items) - len(wanted) - len(damaged)
        if outbox.ended:
            return
        if request.fetch and self._asking is not None:
            await self._fetch(channel, outbox, request, wanted, damaged)
        else:
            for index in (*wanted, *damaged):
                outbox.say(Status.MISSING, index)
        outbox.say(Status.END)
        await self._drain(channel, outbox, request)

    def _find(self, index: int, item: Item) -> Piece | None:
        try:
            if item.word:
                return None if self._catalogs is None else self._catalogs.find(index, item)
            if item.keep:
                return None  # the fetcher must know that it counts on this node
            return self._blobs.find(index, item)
        except (OSError, PeerError) as error:
            log.warning("%s: cannot be read: %s", item.path or item.key.hex(), error)
            return None

    async def _fetch(
        self, channel: Channel, outbox: Outbox, request: Request, wanted: list[int], damaged: list[int]
    ) -> None:
        """Ask the fetcher for all, and send each when it is there."""
        assert self._asking is not None
        # Each is an open file until it is sent, and a slow peer takes long: all together have half of the files.
        active = self._admission.foreground + self._admission.prefetch
        turns = asyncio.Semaphore(max(1, min(self._limits.fetches, self._files // 2 // max(1, active))))
        tasks = {
            self._loop.create_task(self._fetched(self._asking, turns, request, index, index in damaged)): index
            for index in (*wanted, *damaged)
        }
        waiting = set(tasks)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    found = task.result()
                    if isinstance(found, Piece):
                        outbox.put(found)
                        self.objects += 1
                    else:
                        outbox.say(found, tasks[task])
                await self._drain(channel, outbox, request)
                for _ in done:
                    turns.release()
                for index in outbox.damaged:
                    outbox.say(Status.FAILED, index)
                outbox.damaged.clear()
        finally:
            for task in waiting:
                task.cancel()
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                if isinstance(result, Piece):
                    result.close()

    async def _fetched(
        self, asking: Asking, turns: asyncio.Semaphore, request: Request, index: int, damaged: bool
    ) -> Piece | Status:
        item = request.items[index]
        await turns.acquire()  # until it is sent
        try:
            if item.word:
                return Status.MISSING if self._catalogs is None else await self._catalogs.answer(index, item)
            if item.key or not await asking.knows(item.dataset):
                return Status.MISSING
            if item.keep:
                return await asking.kept(index, item, ahead=request.prefetch)
            return await asking.piece(index, item, damaged=damaged, ahead=request.prefetch)
        except (CacheFSError, OSError) as error:
            log.info("%s: could not be fetched for a peer: %s", item.path, error)
            return Status.FAILED

    async def _keep(self, outbox: Outbox, request: Request) -> None:
        """What another node has no room for. Once there is none here, the rest of its request is refused unseen."""
        turns = asyncio.Semaphore(self._limits.guests)
        full = False

        async def answer(index: int, item: Item) -> None:
            nonlocal full
            async with turns:
                status = Status.MISSING
                if self._asking is not None:
                    status = Status.REFUSED if full else await self._asking.keep(item)
            full = full or status is Status.REFUSED
            outbox.say(status, index)

        async with asyncio.TaskGroup() as group:
            for index, item in enumerate(request.items):
                group.create_task(answer(index, item))

    # --- sending ---

    async def _drain(self, channel: Channel, outbox: Outbox, request: Request) -> None:
        """Send what is in the outbox. Raises PeerTimeout when the peer takes nothing of it for too long."""
        priority = PREFETCH if request.prefetch else FOREGROUND
        while True:
            async with self._senders.hold(1, priority):
                sent = await self._in_thread(outbox, outbox.pump)
            if sent is Sent.ALL:
                return
            if sent is Sent.BLOCKED:
                try:
                    async with asyncio.timeout(self._limits.stall):
                        await channel.writable()
                except TimeoutError:
                    raise PeerTimeout(f"took nothing of its answer for {self._limits.stall:g} s") from None

    async def _in_thread(self, outbox: Outbox, work: Callable[[], T]) -> T:
        """What `work` returns. When cancelled, the thread has left the outbox and its socket before this ends."""
        running = self._loop.run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            outbox.stop = True
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((running,))
            raise

"""The fetcher's front door: a Unix socket that only its own user may use.

Each connection has one task that takes packets; each request has a task of its own, owned by its connection, so a
reader that is killed takes its requests with it (but not the flights others wait for). The service ends when it
is told to, or when it has been idle: no connection and no work for `config.idle` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import deque

import msgspec

from cachefs import memory
from cachefs.catalog import staging
from cachefs.errors import CacheError, CacheFSError, FetcherError, ObjectNotFound, PlanError, StaleObject, to_wire
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.jobs import Jobs
from cachefs.fetcher.lanes import FOREGROUND
from cachefs.fetcher.large import Alive, LargeObjects, Moved, Place, silent
from cachefs.fetcher.objects import Objects, Room, Stored
from cachefs.fetcher.prefetch import Listening, Prefetcher
from cachefs.fetcher.settings import leave_count, remember_size, take_count
from cachefs.fetcher.transit import Transit
from cachefs.messages import (
    PROTOCOL,
    Announce,
    AnyRequest,
    Attach,
    Attached,
    Cancel,
    Done,
    Entry,
    Evict,
    Failed,
    Found,
    Hello,
    Info,
    List,
    MakeCatalog,
    Need,
    Plan,
    Progress,
    Ready,
    Refresh,
    Reply,
    Report,
    Shutdown,
    Status,
    Verify,
    Warm,
    Welcome,
    Withdraw,
    decode_request,
    encode,
)
from cachefs.packets import peer_pid, peer_uid, receive, send

log = logging.getLogger("cachefs.fetcher")

# How often an object may become whole, or go, while it is looked for. Once is rare.
MOST_MOVES = 10

# How often pending index records are written: what a kill -9 may lose, in seconds of fetching.
FLUSH_SECONDS = 0.5

# Replies a reader has not taken yet. One that stops reading is cut off here instead of filling our memory.
MAX_UNSENT = 4096


class Service:
    """Serves one cache. `run` returns when it is over; everything it started has ended by then."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.objects = Objects(room)
        self.large = LargeObjects(self.objects)
        self.jobs = Jobs(room, self.bytes_of, self.large.discard)
        self.prefetcher = Prefetcher(room, self.bytes_of)
        self.over = asyncio.Event()
        self.started = time.time()
        self._connections: set[_Connection] = set()
        self._busy_until = time.monotonic()

    async def run(self, listener: socket.socket) -> None:
        """Accept readers until idle, Shutdown or cancellation."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._scan())
            keeper = group.create_task(self._keep_house())
            loop.add_reader(listener.fileno(), self._accept, listener)
            try:
                await self.over.wait()
            finally:
                loop.remove_reader(listener.fileno())
                keeper.cancel()
                for connection in list(self._connections):
                    await connection.close()
                await self.prefetcher.close()
                await self.large.close()
                await self.objects.close()
                await self.room.attachments.close()
                self.room.transit.close()
                self.room.index.close()
        # Everything has ended: the count is final. A crash leaves none.
        if self.room.scanned.is_set():
            leave_count(self.room.config.home, self.room.capacity.used)

    def serve(self, sock: socket.socket) -> None:
        """Take a connected reader (also used for a reader in this very process)."""
        self._connections.add(_Connection(self, sock))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if peer_uid(sock) not in (os.geteuid(), 0):
            log.warning("a process of uid %d was refused", peer_uid(sock))
            sock.close()
            return
        self.serve(sock)

    def gone(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._busy_until = time.monotonic()

    async def _scan(self) -> None:
        """Count what is stored, unless the last fetcher left its count."""
        counted = take_count(self.room.config.home)
        if counted is None:
            await asyncio.to_thread(self.room.store.sweep)
            counted = (await asyncio.to_thread(self.room.store.usage)).bytes
        self.room.capacity.used += counted
        await asyncio.to_thread(staging.remove_abandoned, self.room.config.home / "catalogs")
        self.room.scanned.set()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(min(FLUSH_SECONDS, self.room.config.idle))
            self.room.index.flush()
            if self._connections:
                self._busy_until = time.monotonic()
            elif time.monotonic() - self._busy_until > self.room.config.idle:
                log.info("idle for %g s: exiting", self.room.config.idle)
                self.over.set()

    # --- what readers ask ---

    async def bytes_of(
        self, attachment: Attachment, request: Need, priority: int = FOREGROUND, alive: Alive = silent
    ) -> Place:
        """Make the bytes readable and say where. alive is called as blocks of a large object come in."""
        version, size = await self.objects.version_of(attachment, request)
        if request.size < 0 <= size:
            request = msgspec.structs.replace(request, size=size)
        try:
            for _ in range(MOST_MOVES):
                result = await self.objects.whole(attachment, request, version, priority)
                if not isinstance(result, Entry):
                    return result
                with contextlib.suppress(Moved):
                    return await self.large.need(attachment, request, result, priority, alive)
            raise CacheError(f"{request.path}: comes and goes faster than it can be read", path=request.path)
        except ObjectNotFound as error:
            if not version:
                raise
            # Not "no such object": the reader's snapshot has it.
            raise StaleObject(
                f"{request.path}: was deleted at the origin and the version of this snapshot is not cached; "
                "`cachefs refresh` takes what is there now",
                path=request.path,
            ) from error

    async def ready(self, attachment: Attachment, request: Need, alive: Alive = silent) -> tuple[Ready, int]:
        """The reply to Need and the descriptor that goes with it (-1: none). The descriptor is the caller's."""
        self.room.counters.needs += 1
        with self.prefetcher.asked(attachment, request):
            place = await self.bytes_of(attachment, request, alive=alive)
        if isinstance(place, Stored):
            file = place.file
            reply = Ready(
                id=request.id,
                file=file,
                size=place.size,
                version=place.version,
                start=0,
                stop=place.size,
                complete=True,
            )
            return (reply, os.open(file, os.O_RDONLY)) if request.descriptor else (reply, -1)
        if isinstance(place, Transit):
            reply = Ready(
                id=request.id,
                file="",
                size=place.size,
                version=place.version,
                start=place.start,
                stop=place.stop,
                base=place.start,
            )
            return reply, os.dup(place.fd)
        file, start, stop, size, version = place
        reply = Ready(id=request.id, file=file, size=size, version=version, start=start, stop=stop)
        return (reply, os.open(file, os.O_RDONLY)) if request.descriptor else (reply, -1)

    async def info(self, attachment: Attachment, path: str) -> Entry:
        catalog = attachment.catalog(self.room.config.home)
        if catalog is not None and (row := catalog.find(path)) is not None:
            return Entry(path, row.size, row.mtime_ns, row.version, row.directory)
        seen = self.room.index.seen(attachment.dataset, attachment.snapshot, path)
        if seen is not None:
            return Entry(path, seen.size, seen.mtime_ns, seen.version)
        self.room.counters.origin_requests += 1
        return await attachment.origin.head(path)

    def limit(self, size: int) -> None:
        """Give the cache another size, as the last one who says so wants it, and remember it for later fetchers."""
        capacity = self.room.capacity
        if size == capacity.limit:
            return
        log.info("size: %s bytes (was %s)", size, capacity.limit)
        capacity.limit = size
        remember_size(self.room.config.home, size)

    def status(self) -> dict[str, object]:
        capacity = self.room.capacity
        return {
            "pid": os.getpid(),
            "started": self.started,
            "home": str(self.room.config.home),
            "dirs": [str(d) for d in self.room.config.dirs],
            "out": {str(d): why for d, why in self.room.store.out.items()},
            "size": capacity.limit,
            "min_free": str(self.room.config.min_free),
            "used": capacity.used,
            "reserved": capacity.reserved,
            "scanned": self.room.scanned.is_set(),
            "connections": len(self._connections),
            "memory": {
                "usable": memory.usable(),
                "in_flight": self.room.in_flight.used,
                "in_flight_most": self.room.in_flight.most,
                "in_flight_limit": self.room.in_flight.limit,
            },
            "counters": self.room.counters.as_dict(),
            "consumers": self.prefetcher.report(),
        }


class _Connection:
    """One reader: its socket, its attachments, its requests under way."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._attachments: list[Attachment] = []
        self._consumers = Listening(service.prefetcher, peer_pid(sock), self._hang_up)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unsent: deque[tuple[bytes, int]] = deque()
        self._alive = True
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(64):  # a bounded number per turn: one busy reader must not starve the others
            try:
                data, descriptors = receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, FetcherError):
                data, descriptors = b"", []
            request = self._understand(data)
            fd = descriptors.pop() if descriptors and isinstance(request, Announce | Plan) else -1
            for unwanted in descriptors:
                os.close(unwanted)
            if request is None:
                self._hang_up()
                return
            self._take(request, fd)

    def _understand(self, data: bytes) -> AnyRequest | None:
        """None at the end of the connection, and for what is no request."""
        if not data:
            return None
        try:
            request: AnyRequest = decode_request(data)
            return request
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("a reader sent what is no request (%s): cut off", error)
            return None

    def _take(self, request: AnyRequest, fd: int) -> None:
        """fd: what came with an Announce or a Plan, else -1. It is taken over."""
        if isinstance(request, Cancel):
            if task := self._tasks.get(request.target):
                task.cancel()
            return
        if isinstance(request, Announce | Plan | Withdraw):
            self._hear(request, fd)
            return
        task = self._loop.create_task(self._answer(request))
        self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))

    async def _answer(self, request: AnyRequest) -> None:
        try:
            await self._serve(request)
        except Exception as error:  # noqa: BLE001 - the reader is told, and a defect is logged
            self._fail(request, error)

    def _hear(self, request: Announce | Plan | Withdraw, fd: int) -> None:
        """What a consumer says it will read: at once, for it is understood by the order in which it is said."""
        try:
            if isinstance(request, Withdraw):
                self.reply(self._consumers.withdraw(request))
            elif fd < 0:
                raise PlanError(f"{type(request).__name__} came without its memory")
            elif isinstance(request, Plan):
                self.reply(self._consumers.plan(request, fd))
            else:
                self.reply(self._consumers.announce(self._attachments, request, fd))
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(request, error)

    def _fail(self, request: AnyRequest, error: Exception) -> None:
        if not isinstance(error, CacheFSError):
            # A defect of ours must not leave a reader waiting: it is logged whole and the reader is told.
            log.error("request %s failed", type(request).__name__, exc_info=error)
        self.reply(Failed(id=request.id, error=to_wire(error)))

    async def _serve(self, request: AnyRequest) -> None:
        service = self._service
        match request:
            case Need():

                def alive(done: int, total: int) -> None:
                    # A reader gives up on a fetcher that shows no sign of life; a large object may take longer.
                    self.reply(Progress(id=request.id, done=done, total=total, bytes=done, what="bytes"))

                ready, fd = await service.ready(self._attachment(request.attachment), request, alive)
                self.reply(ready, fd)
            case Hello():
                if request.protocol != PROTOCOL:
                    raise FetcherError(
                        f"this fetcher speaks protocol {PROTOCOL}, the reader {request.protocol}: they are different "
                        "versions of cachefs; stop the fetcher (`cachefs stop`) or upgrade the reader"
                    )
                if request.size is not None:
                    service.limit(request.size)
                self.reply(Welcome(id=request.id, protocol=PROTOCOL, pid=os.getpid()))
            case Attach():
                attachment = service.room.attachments.attach(request)
                self._attachments.append(attachment)
                self.reply(
                    Attached(
                        id=request.id,
                        attachment=len(self._attachments) - 1,
                        dataset=attachment.dataset,
                        snapshot=attachment.snapshot,
                    )
                )
            case Info():
                entry = await service.info(self._attachment(request.attachment), request.path)
                self.reply(Found(id=request.id, entry=entry))
            case Status():
                self.reply(Report(id=request.id, status=service.status()))
            case Shutdown():
                self.reply(Done(id=request.id))
                service.over.set()
            case List() | MakeCatalog() | Refresh() | Warm() | Evict() | Verify():
                of = getattr(request, "attachment", None)
                await service.jobs.run(request, None if of is None else self._attachment(of), self.reply)
            case _:
                raise FetcherError(f"this fetcher does not know {type(request).__name__}")

    def _attachment(self, number: int) -> Attachment:
        if not 0 <= number < len(self._attachments):
            raise FetcherError(f"attachment {number}: this connection has none of that number")
        return self._attachments[number]

    def reply(self, reply: Reply, fd: int = -1) -> None:
        """Send, or queue when the reader is slow. Takes `fd` over and closes it once it is sent."""
        if not self._alive or len(self._unsent) > MAX_UNSENT:
            if fd >= 0:
                os.close(fd)
            if self._alive:
                log.warning("a reader does not take its replies: cut off")
                self._hang_up()
            return
        self._unsent.append((encode(reply), fd))
        if len(self._unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            data, fd = self._unsent[0]
            try:
                send(self._sock, data, fd)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self._hang_up()
                return
            self._unsent.popleft()
            if fd >= 0:
                os.close(fd)
        self._loop.remove_writer(self._sock.fileno())

    def _hang_up(self) -> None:
        if not self._alive:
            return
        self._alive = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fd in self._unsent:
            if fd >= 0:
                os.close(fd)
        self._unsent.clear()
        for task in self._tasks.values():
            task.cancel()
        self._consumers.close()
        for attachment in self._attachments:
            self._service.room.attachments.detach(attachment)
        self._service.gone(self)

    async def close(self) -> None:
        """Send what is queued if the reader takes it at once, then end its requests and wait for them."""
        self._flush()
        tasks = [task for task in self._tasks.values() if task is not asyncio.current_task()]
        self._hang_up()
        await asyncio.gather(*tasks, return_exceptions=True)

"""The fetcher's front door: a Unix socket that only its own user may use.

What a reader asks comes in through its `Connection` and is answered here. The service ends when it is told to, or when
it has been idle: no connection and no work for `config.idle` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time

import msgspec

from cachefs import memory
from cachefs.catalog import staging
from cachefs.errors import CacheError, ObjectNotFound, StaleObject
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.connection import Connection
from cachefs.fetcher.jobs import Jobs
from cachefs.fetcher.lanes import FOREGROUND
from cachefs.fetcher.large import Alive, LargeObjects, Moved, Place, silent
from cachefs.fetcher.objects import Objects, Room, Stored
from cachefs.fetcher.prefetch import Prefetcher
from cachefs.fetcher.settings import leave_count, remember_size, take_count
from cachefs.fetcher.transit import Transit
from cachefs.messages import Entry, Need, Ready
from cachefs.packets import peer_uid

log = logging.getLogger("cachefs.fetcher")

# How often an object may become whole, or go, while it is looked for. Once is rare.
MOST_MOVES = 10

# How often pending index records are written: what a kill -9 may lose, in seconds of fetching.
FLUSH_SECONDS = 0.5


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
        self._connections: set[Connection] = set()
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
        self._connections.add(Connection(self, sock))

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

    def gone(self, connection: Connection) -> None:
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

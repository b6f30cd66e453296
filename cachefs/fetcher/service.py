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
from contextlib import nullcontext
from typing import Any

import msgspec

from cachefs import memory
from cachefs.catalog import staging
from cachefs.errors import CacheError, ObjectNotFound, StaleObject
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.blocks import Moved
from cachefs.fetcher.cluster import Cluster
from cachefs.fetcher.connection import Connection
from cachefs.fetcher.jobs import Jobs
from cachefs.fetcher.lanes import AHEAD, FOREGROUND
from cachefs.fetcher.large import Alive, LargeObjects, Place, silent
from cachefs.fetcher.objects import Objects, Stored
from cachefs.fetcher.prefetch import Prefetcher
from cachefs.fetcher.room import Room
from cachefs.fetcher.settings import leave_count, remember_size, take_count
from cachefs.fetcher.sources import Host
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
        self.jobs = Jobs(room, self.bytes_of, self.large.discard, self.large.discard_part)
        self.prefetcher = Prefetcher(room, self.bytes_of)
        room.plans = self.prefetcher.foresight
        self.cluster = Cluster(room)
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
                await self.jobs.close()
                await self.cluster.close()
                await self.large.close()
                await self.objects.close()
                await self.room.quotas.close()
                await self.room.attachments.close()
                self.room.transit.close()
                self.room.index.close()
        # Everything has ended: the count is final. A crash leaves none.
        if self.room.scanned.is_set():
            self.room.capacity.commit(0, self.room.store.arrived())
            leave_count(self.room.config.home, self.room.capacity.used)
            self.room.quotas.leave()

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
        await self.jobs.fit()  # a command that lowered a quota may have been cut off
        self.room.scanned.set()
        await asyncio.to_thread(self.room.turnover.try_directories)
        await asyncio.to_thread(staging.remove_abandoned, self.room.config.home / "catalogs")

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
                    if request.keep:
                        return await self.large.take_in(attachment, request, result, priority)
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

    async def kept(self, attachment: Attachment, request: Need, priority: int, alive: Alive) -> Place:
        """A block, kept from now on for the owner of its object. Raises CacheFull, CacheError."""
        source, path, version = self.room.source, request.path, request.version
        if not isinstance(source, Host) or not source.take_in(attachment, path, version):
            raise CacheError(f"{path}: nothing of it is kept here for another node", path=path)
        try:
            return await self.bytes_of(attachment, request, priority, alive)
        finally:
            if self.large.has(attachment.domain, path, version):
                source.take_in(attachment, path, version)  # another block of it may have failed meanwhile
            else:
                source.turn_away(attachment, path, version)

    async def ready(self, attachment: Attachment, request: Need, alive: Alive = silent) -> tuple[Ready, int]:
        """The reply to Need and the descriptor that goes with it (-1: none). The descriptor is the caller's."""
        self.room.counters.needs += 1
        self.room.counters.asked_by_peers += attachment.direct
        # What another node's reader asks for says nothing of what consumers of this one have read.
        with nullcontext() if attachment.direct else self.prefetcher.asked(attachment, request):
            bytes_of = self.kept if request.keep else self.bytes_of
            place = await bytes_of(attachment, request, AHEAD if request.ahead else FOREGROUND, alive)
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

    def status(self) -> dict[str, Any]:
        capacity = self.room.capacity
        return {
            "pid": os.getpid(),
            "started": self.started,
            "home": str(self.room.config.home),
            "dirs": [str(d) for d in self.room.config.dirs],
            "out": {str(d): why for d, why in self.room.store.out.items()},
            "silent": sorted(self.room.turnover.silent) if self.room.turnover.tried else [],
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
            "counters": self.room.counters.as_dict() | {"found": self.room.found()},
            "quotas": self.room.quotas.report(),
            "consumers": self.prefetcher.report(),
            "cluster": self.cluster.status(),
        }

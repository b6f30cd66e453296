"""One reader at the fetcher's door: its socket, its attachments, its requests under way.

A task takes its packets and each request has a task of its own, so a reader that is killed takes its requests with it
(but not the flights others wait for).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import msgspec

from cachefs.errors import CacheFSError, FetcherError, PlanError, to_wire
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.prefetch import Listening
from cachefs.fetcher.prefetch.release import release
from cachefs.messages import (
    CONSUMERS_PER_REPORT,
    NODES_PER_REPORT,
    PROTOCOL,
    Adopt,
    Announce,
    AnyRequest,
    Attach,
    Attached,
    Cancel,
    Done,
    Evict,
    Failed,
    Follow,
    Found,
    Hello,
    Info,
    Join,
    List,
    Lodge,
    MakeCatalog,
    Need,
    Pin,
    Plan,
    Progress,
    Quota,
    Refresh,
    Reply,
    Report,
    Shutdown,
    Status,
    Survey,
    TakeCatalog,
    Tell,
    Verify,
    Warm,
    Welcome,
    Withdraw,
    decode_request,
    encode,
)
from cachefs.packets import receive, send

if TYPE_CHECKING:
    from cachefs.fetcher.service import Service

log = logging.getLogger("cachefs.fetcher")

T = TypeVar("T")

# Replies a reader has not taken yet. One that stops reading is cut off here instead of filling our memory.
MAX_UNSENT = 4096


class Connection:
    """Owned by the service, which is told when it is gone."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._attachments: list[Attachment] = []
        self._consumers = Listening(service.prefetcher, sock, self._hang_up)
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
                release(unwanted)
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
                raise PlanError(f"{type(request).__name__} came without its memory: pass a memfd with it")
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
                attachment = service.room.attachments.attach(request, service.room.store)
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
                self._report(request.id)
            case Join():
                await service.cluster.join(self, request)
                if not self._alive:  # whoever wanted it is gone, and was before there was anything to let go of
                    service.cluster.let_go(self)
                self.reply(Done(id=request.id))
            case Tell():
                self.reply(Report(id=request.id, status=service.cluster.account()))
            case Survey():
                async for row in service.cluster.survey():
                    self.reply(Report(id=request.id, status=row, more="me" not in row))
            case Lodge():
                kept = await service.objects.take_in(self._attachment(request.attachment), request)
                self.reply(Done(id=request.id, count=int(kept)))
            case Shutdown():
                self.reply(Done(id=request.id))
                service.over.set()
            case Adopt() | Follow():
                await service.jobs.run(request, None, self.reply)
            case List() | MakeCatalog() | TakeCatalog() | Refresh() | Warm() | Evict() | Pin() | Quota() | Verify():
                of = getattr(request, "attachment", None)
                await service.jobs.run(request, None if of is None else self._attachment(of), self.reply)
            case _:
                raise FetcherError(f"this fetcher does not know {type(request).__name__}")

    def _report(self, id: int) -> None:
        status = self._service.status()
        consumers, cluster = status["consumers"], status["cluster"]
        parts = [{"consumers": part} for part in _parts(consumers[CONSUMERS_PER_REPORT:], CONSUMERS_PER_REPORT)]
        first = status | {"consumers": consumers[:CONSUMERS_PER_REPORT]}
        if cluster is not None:
            for kind in ("nodes", "peers"):
                parts += [{kind: part} for part in _parts(cluster[kind], NODES_PER_REPORT)]
            first["cluster"] = cluster | {"nodes": [], "peers": []}
        for number, part in enumerate([first, *parts]):
            self.reply(Report(id=id, status=part, more=number < len(parts)))

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
        self._service.cluster.let_go(self)
        for attachment in self._attachments:
            self._service.room.attachments.detach(attachment)
        self._service.gone(self)

    async def close(self) -> None:
        """Send what is queued if the reader takes it at once, then end its requests and wait for them."""
        self._flush()
        tasks = [task for task in self._tasks.values() if task is not asyncio.current_task()]
        self._hang_up()
        await asyncio.gather(*tasks, return_exceptions=True)


def _parts(rows: list[T], count: int) -> Iterator[list[T]]:
    return (rows[start : start + count] for start in range(0, len(rows), count))

"""The connection for an event loop: one socket, any number of requests in flight on it.

Used by mount workers and by the async face of the file system. Packets are read when the loop says so and handed
to the future of their request; a request whose fetcher died is sent again to the next. Cancelling a request
tells the fetcher that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from cachefs.client.launch import connect
from cachefs.client.located import Located, open_ready
from cachefs.client.session import FIRST_ID, RETRY_FIRST, RETRY_LAST, LostFetcher, Session, expect
from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, FetcherTimeout
from cachefs.messages import (
    Attached,
    Cancel,
    Done,
    Entry,
    Found,
    Info,
    List,
    Lodge,
    Need,
    Page,
    Progress,
    Ready,
    Reply,
    Request,
    Welcome,
    decode_reply,
    encode,
)
from cachefs.packets import receive, send

log = logging.getLogger("cachefs.client")

R = TypeVar("R", bound=Reply)
T = TypeVar("T")
OnProgress = Callable[[Progress], None]
_Answer = tuple[Reply, list[int]]


class _Line:
    """A socket on a loop: what is still to be sent, and who waits for what."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.sock = sock
        self.loop = loop
        self.waiting: dict[int, asyncio.Queue[_Answer | None]] = {}
        self.unsent: deque[bytes] = deque()
        self.next_id = FIRST_ID
        self.alive = True
        self.attached: Attached | None = None
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)

    def send(self, request: Request) -> None:
        if not self.alive:
            raise LostFetcher("the connection is closed")
        self.unsent.append(encode(request))
        if len(self.unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        while self.unsent:
            try:
                send(self.sock, self.unsent[0])
            except BlockingIOError:
                self.loop.add_writer(self.sock.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            self.unsent.popleft()
        self.loop.remove_writer(self.sock.fileno())

    def _readable(self) -> None:
        # A bounded number per turn, so that a burst of replies does not starve the loop's other work.
        for _ in range(64):
            try:
                data, descriptors = receive(self.sock)
            except BlockingIOError:
                return
            except (OSError, FetcherError):
                data, descriptors = b"", []
            if not data:
                self.close()
                return
            try:
                reply = decode_reply(data)
            except msgspec.MsgspecError:
                self.close()
                return
            queue = self.waiting.get(reply.id)
            if queue is not None:
                queue.put_nowait((reply, descriptors))
            else:
                for fd in descriptors:  # the answer to a request that was cancelled
                    os.close(fd)

    def close(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.loop.remove_reader(self.sock.fileno())
        self.loop.remove_writer(self.sock.fileno())
        self.sock.close()
        for queue in self.waiting.values():
            queue.put_nowait(None)


class AsyncConnection:
    """Async access to the fetcher of `config` for one dataset (or for the cache itself: session None). Belongs to the
    loop it is first used on.

    Methods raise the errors of cachefs.errors, FetcherTimeout after config.deadline seconds.
    """

    def __init__(self, config: CacheConfig, session: Session | None) -> None:
        self.config = config
        self.session = session
        self._current: _Line | None = None
        self._dialing: asyncio.Lock | None = None

    async def attach(self) -> Attached:
        """Dataset and snapshot of this connection."""
        attached = (await self._line()).attached
        assert attached is not None
        return attached

    async def need(
        self,
        path: str,
        *,
        version: str = "",
        size: int = -1,
        offset: int = 0,
        length: int | None = None,
        damaged: bool = False,
        descriptor: bool = False,
        ahead: bool = False,
        keep: bool = False,
    ) -> Located:
        """Bytes [offset, offset+length) of an object, ready to read. The caller closes `.fd`."""
        while True:
            ready, descriptors = await self._call(
                lambda attachment, id, descriptor=descriptor: Need(  # type: ignore[misc]
                    id=id,
                    attachment=attachment,
                    path=path,
                    version=version,
                    size=size,
                    offset=offset,
                    length=length,
                    descriptor=descriptor,
                    damaged=damaged,
                    ahead=ahead,
                    keep=keep,
                ),
                Ready,
            )
            located = open_ready(ready, descriptors)
            if located is not None:
                return located
            descriptor = True  # evicted before we opened it: a descriptor cannot be taken away

    async def info(self, path: str) -> Entry:
        return (await self._call(lambda a, i: Info(id=i, attachment=a, path=path), Found))[0].entry

    async def lodge(self, path: str, version: str, size: int) -> bool:
        """Keep an object for another node. Whether it is kept; raises CacheFull."""
        make = lambda a, i: Lodge(id=i, attachment=a, path=path, version=version, size=size)  # noqa: E731
        return (await self._call(make, Done))[0].count > 0

    async def entries(self, path: str, *, recursive: bool = False) -> list[Entry]:
        """Entries below `path`: one level, or all files."""
        return await self._persisting(lambda line: self._listed(line, path, recursive))

    async def work(self, make: Callable[[int, int], Request], progress: OnProgress) -> Reply:
        """How long work ended. make: the request, from attachment and id; progress: told how far it is."""
        reply, _ = await self._persisting(lambda line: self._exchange(line, make, progress))
        return expect(reply, Reply)

    async def close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    # --- how they travel ---

    async def _call(self, make: Callable[[int, int], Request], expected: type[R]) -> tuple[R, list[int]]:
        reply, descriptors = await self._persisting(lambda line: self._exchange(line, make))
        return expect(reply, expected), descriptors

    async def _persisting(self, ask: Callable[[_Line], Awaitable[T]]) -> T:
        """What `ask` answers, asked again (of another fetcher) when the fetcher dies meanwhile."""
        deadline = time.monotonic() + self.config.deadline
        pause = RETRY_FIRST
        while True:
            try:
                return await ask(await self._line())
            except LostFetcher as error:
                if time.monotonic() + pause > deadline:
                    home = self.config.home
                    raise FetcherError(f"{home}: its fetcher dies again and again; see run/fetcher.log") from error
                await asyncio.sleep(pause)
                pause = min(RETRY_LAST, pause * 2)

    async def _exchange(
        self, line: _Line, make: Callable[[int, int], Request], progress: OnProgress | None = None
    ) -> _Answer:
        id, queue = self._open(line)
        answered = False
        try:
            line.send(make(_attachment(line), id))
            while True:
                reply, descriptors = await self._next(queue)
                if not isinstance(reply, Progress):
                    answered = True
                    return reply, descriptors
                if progress is not None:
                    progress(reply)
        finally:
            if not answered and line.alive:
                line.send(Cancel(id=0, target=id))
            self._close_request(line, id)

    async def _listed(self, line: _Line, path: str, recursive: bool) -> list[Entry]:
        entries: list[Entry] = []
        id, queue = self._open(line)
        try:
            line.send(List(id=id, attachment=_attachment(line), path=path, recursive=recursive))
            more = True
            while more:
                page = expect((await self._next(queue))[0], Page)
                entries += page.entries
                more = page.more
        finally:
            self._close_request(line, id)
        return entries

    def _open(self, line: _Line) -> tuple[int, asyncio.Queue[_Answer | None]]:
        id = line.next_id
        line.next_id += 1
        queue = line.waiting[id] = asyncio.Queue()
        return id, queue

    def _close_request(self, line: _Line, id: int) -> None:
        queue = line.waiting.pop(id)
        while not queue.empty():  # replies that arrived as we were cancelled may hold descriptors
            answer = queue.get_nowait()
            for fd in answer[1] if answer else ():
                os.close(fd)

    async def _next(self, queue: asyncio.Queue[_Answer | None]) -> _Answer:
        try:
            async with asyncio.timeout(self.config.deadline):
                answer = await queue.get()
        except TimeoutError:
            raise FetcherTimeout(
                f"no answer from the fetcher in {self.config.deadline:g} s; see {self.config.home}/run/fetcher.log"
            ) from None
        if answer is None:
            raise LostFetcher("the fetcher closed the connection")
        return answer

    async def _line(self) -> _Line:
        line = self._current
        if line is not None and line.alive:
            return line
        if self._dialing is None:
            self._dialing = asyncio.Lock()
        async with self._dialing:
            if self._current is not None and self._current.alive:
                return self._current
            deadline = time.monotonic() + self.config.deadline
            local = self.session is not None and self.session.local
            # Starting a fetcher blocks, so it happens in a thread; the loop goes on serving other reads.
            sock = await asyncio.to_thread(connect, self.config, deadline, local=local)
            line = _Line(sock, asyncio.get_running_loop())
            try:
                pid = await self._greet(line)
            except BaseException:
                line.close()
                raise
            if self._current is not None:
                log.warning("%s: its fetcher was gone, %d is there now", self.config.home, pid)
            self._current = line
            return line

    async def _greet(self, line: _Line) -> int:
        """The fetcher's pid."""
        welcome: asyncio.Queue[_Answer | None] = asyncio.Queue()
        attached: asyncio.Queue[_Answer | None] = asyncio.Queue()
        line.waiting.update({1: welcome, 2: attached})
        session = self.session or Session("", {}, {})
        line.send(session.hello(self.config))
        if self.session is not None:
            line.send(session.attach())
        pid = expect((await self._next(welcome))[0], Welcome).pid
        line.attached = (
            Attached(id=0, attachment=0, dataset="", snapshot="")
            if self.session is None
            else expect((await self._next(attached))[0], Attached)
        )
        del line.waiting[1], line.waiting[2]
        return pid


def _attachment(line: _Line) -> int:
    assert line.attached is not None
    return line.attached.attachment

"""The connection for threads: each thread of each process has a socket of its own, so nothing is shared.

That makes it safe after fork (a child finds no socket under its pid and dials) and needs no lock that a fork
could copy while held (fsspec's loop lock is such a trap). A request whose fetcher died is sent again to the next.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from cachefs.client.launch import connect
from cachefs.client.located import Located, open_ready
from cachefs.client.session import (
    FIRST_ID,
    RETRY_FIRST,
    RETRY_LAST,
    LostFetcher,
    Session,
    expect,
)
from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, FetcherTimeout
from cachefs.messages import (
    Attached,
    Catalogued,
    Done,
    Entry,
    Evict,
    Found,
    Info,
    List,
    MakeCatalog,
    Need,
    Page,
    Pin,
    Progress,
    Quota,
    Ready,
    Refresh,
    Reply,
    Report,
    Request,
    Shutdown,
    Status,
    Survey,
    TakeCatalog,
    Verify,
    Warm,
    Welcome,
    decode_reply,
    encode,
)
from cachefs.packets import receive, send

R = TypeVar("R", bound=Reply)
P = TypeVar("P", Page, Report)
T = TypeVar("T")
OnProgress = Callable[[Progress], None]


class _Line:
    """One thread's socket and where it is in its numbering."""

    __slots__ = ("attached", "next_id", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.next_id = FIRST_ID
        self.attached: Attached | None = None


class Connection:
    """Blocking access to the fetcher of `config` for one dataset (or for the cache itself: session None).

    Every method raises the errors of cachefs.errors: what the fetcher met, FetcherError when none can be
    reached, FetcherTimeout after config.deadline seconds without a sign of life.
    """

    def __init__(self, config: CacheConfig, session: Session | None) -> None:
        self.config = config
        self.session = session
        self._lines = threading.local()

    def __repr__(self) -> str:
        return f"Connection({str(self.config.home)!r}, {self.session!r})"

    # --- requests ---

    def attach(self) -> Attached:
        """Dataset and snapshot of this connection."""
        return self._persisting(lambda deadline: self._attached(self._line(deadline)))

    def need(
        self,
        path: str,
        *,
        version: str = "",
        size: int = -1,
        offset: int = 0,
        length: int | None = None,
        damaged: bool = False,
    ) -> Located:
        """Bytes [offset, offset+length) of an object, ready to read. The caller closes `.fd`."""
        descriptor = False
        while True:

            def request(attached: Attached, id: int, descriptor: bool = descriptor) -> Request:
                return Need(
                    id=id,
                    attachment=attached.attachment,
                    path=path,
                    version=version,
                    size=size,
                    offset=offset,
                    length=length,
                    descriptor=descriptor,
                    damaged=damaged,
                )

            ready, descriptors = self._call(request, Ready)
            located = open_ready(ready, descriptors)
            if located is not None:
                return located
            descriptor = True  # evicted before we opened it: a descriptor cannot be taken away

    def info(self, path: str) -> Entry:
        return self._call(lambda a, i: Info(id=i, attachment=a.attachment, path=path), Found)[0].entry

    def entries(self, path: str, *, recursive: bool = False) -> list[Entry]:
        """Entries below `path`: one level, or all files."""
        pages = self._gathered(lambda a, i: List(id=i, attachment=a.attachment, path=path, recursive=recursive), Page)
        return [entry for page in pages for entry in page.entries]

    def make_catalog(self, *, refresh: bool = False, progress: OnProgress | None = None) -> Catalogued:
        return self._call(
            lambda a, i: MakeCatalog(id=i, attachment=a.attachment, refresh=refresh), Catalogued, progress
        )[0]

    def take_catalog(self, file: str, previous: str, last_id: int, *, progress: OnProgress | None = None) -> Catalogued:
        def request(attached: Attached, id: int) -> TakeCatalog:
            return TakeCatalog(id=id, attachment=attached.attachment, file=file, previous=previous, last_id=last_id)

        return self._call(request, Catalogued, progress)[0]

    def refresh(self) -> Done:
        return self._call(lambda a, i: Refresh(id=i, attachment=a.attachment), Done)[0]

    def warm(self, paths: list[str] | None = None, *, progress: OnProgress | None = None) -> Done:
        return self._call(lambda a, i: Warm(id=i, attachment=a.attachment, paths=paths), Done, progress)[0]

    def warm_versions(self, versions: list[tuple[str, str, int]], *, progress: OnProgress | None = None) -> Done:
        """Fetch (path, version, size) each, whatever catalog there is."""
        return self._call(lambda a, i: Warm(id=i, attachment=a.attachment, versions=versions), Done, progress)[0]

    def evict(self, path: str, *, force: bool = False, progress: OnProgress | None = None) -> Done:
        return self._call(lambda a, i: Evict(id=i, attachment=a.attachment, path=path, force=force), Done, progress)[0]

    def pin(self, dataset: str, pinned: bool = True) -> Done:
        """dataset: its id. The count of the answer is 0 when it was so already."""
        return self._call(lambda _, i: Pin(id=i, dataset=dataset, pinned=pinned), Done)[0]

    def quota(
        self, quota: int | None, *, dataset: str = "", tenant: str = "", progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Bound what a dataset (its id), or a tenant, may take; None: no more. What Quota says of the answer."""
        return self._call(lambda _, i: Quota(id=i, quota=quota, dataset=dataset, tenant=tenant), Report, progress)[
            0
        ].status

    def verify(self, *, progress: OnProgress | None = None) -> Done:
        return self._call(lambda _, i: Verify(id=i), Done, progress)[0]

    def status(self) -> Report:
        first, *rest = self._gathered(lambda _, i: Status(id=i), Report)
        status = dict(first.status)
        for report in rest:
            for kind, rows in report.status.items():
                of = status if kind == "consumers" else status["cluster"]
                of[kind] += rows
        return Report(id=first.id, status=status)

    def survey(self) -> list[dict[str, Any]]:
        """What Survey says of the answer: every node of the cluster, and last this one."""
        return [report.status for report in self._gathered(lambda _, i: Survey(id=i), Report)]

    def shutdown(self) -> Done:
        done = self._call(lambda _, i: Shutdown(id=i), Done)[0]
        self._hang_up()
        return done

    def close(self) -> None:
        """Close this thread's socket. Those of other threads close with their threads."""
        self._hang_up()

    # --- how they travel ---

    def _deadline(self) -> float:
        return time.monotonic() + self.config.deadline

    def _call(
        self,
        make: Callable[[Attached, int], Request],
        expected: type[R],
        progress: OnProgress | None = None,
    ) -> tuple[R, list[int]]:
        return self._persisting(lambda deadline: self._exchange(make, expected, progress, deadline))

    def _persisting(self, ask: Callable[[float], T]) -> T:
        """What `ask` answers, asked again (of another fetcher) when the fetcher dies meanwhile."""
        deadline = self._deadline()
        pause = RETRY_FIRST
        while True:
            try:
                return ask(deadline)
            except LostFetcher as error:
                if time.monotonic() + pause > deadline:
                    home = self.config.home
                    raise FetcherError(f"{home}: its fetcher dies again and again; see run/fetcher.log") from error
                time.sleep(pause)
                pause = min(RETRY_LAST, pause * 2)

    def _exchange(
        self,
        make: Callable[[Attached, int], Request],
        expected: type[R],
        progress: OnProgress | None,
        deadline: float,
    ) -> tuple[R, list[int]]:
        answered = False
        try:
            line = self._line(deadline)
            id = line.next_id
            line.next_id += 1
            self._send(line, make(self._attached(line), id))
            reply, descriptors = self._receive(line, id, progress)
            answered = True
        finally:
            if not answered:
                self._hang_up()  # a late answer on this socket would be taken for the next request's
        return expect(reply, expected), descriptors

    def _gathered(self, make: Callable[[Attached, int], Request], expected: type[P]) -> list[P]:
        """All replies to a request that is answered in several."""
        return self._persisting(lambda deadline: self._exchange_several(make, expected, deadline))

    def _exchange_several(
        self, make: Callable[[Attached, int], Request], expected: type[P], deadline: float
    ) -> list[P]:
        parts: list[P] = []
        more = True  # also when the first reply is an error: then nothing more comes
        try:
            line = self._line(deadline)
            id = line.next_id
            line.next_id += 1
            self._send(line, make(self._attached(line), id))
            while more:
                part = expect(self._receive(line, id, None)[0], expected)
                parts.append(part)
                more = part.more
        finally:
            if more:
                self._hang_up()  # what is still to come would be taken for the answer to something else
        return parts

    def _line(self, deadline: float) -> _Line:
        held: tuple[int, _Line] | None = getattr(self._lines, "held", None)
        if held is not None and held[0] == os.getpid():
            return held[1]
        if held is not None:
            self._lines.held = None  # the parent's socket: closing our copy does not disturb it
            held[1].sock.close()
        local = self.session is not None and self.session.local
        line = _Line(connect(self.config, deadline, local=local))
        try:
            self._greet(line)
        except BaseException:
            line.sock.close()
            raise
        self._lines.held = (os.getpid(), line)
        return line

    def _greet(self, line: _Line) -> None:
        session = self.session or Session("", {}, {})
        self._send(line, session.hello(self.config))
        expect(self._receive(line, 1, None)[0], Welcome)
        if self.session is not None:
            self._send(line, session.attach())
            line.attached = expect(self._receive(line, 2, None)[0], Attached)

    def _attached(self, line: _Line) -> Attached:
        return line.attached or Attached(id=0, attachment=0, dataset="", snapshot="")

    def _send(self, line: _Line, request: Request) -> None:
        line.sock.settimeout(self.config.deadline)
        try:
            send(line.sock, encode(request))
        except TimeoutError:
            raise FetcherTimeout("the fetcher takes no requests: is it stopped?") from None
        except (ConnectionError, BrokenPipeError) as error:
            raise LostFetcher(str(error)) from error

    def _receive(self, line: _Line, id: int, progress: OnProgress | None) -> tuple[Reply, list[int]]:
        while True:
            line.sock.settimeout(self.config.deadline)
            try:
                data, descriptors = receive(line.sock)
            except TimeoutError:
                raise FetcherTimeout(
                    f"no answer from the fetcher in {self.config.deadline:g} s; see {self.config.home}/run/fetcher.log"
                ) from None
            except ConnectionError as error:
                raise LostFetcher(str(error)) from error
            if not data:
                raise LostFetcher("the fetcher closed the connection")
            try:
                reply = decode_reply(data)
            except msgspec.MsgspecError as error:
                raise FetcherError(f"cannot understand the fetcher ({error}): another version of cachefs?") from error
            if reply.id == id and not isinstance(reply, Progress):
                return reply, descriptors
            for fd in descriptors:  # the answer to a request somebody gave up
                os.close(fd)
            if reply.id == id and isinstance(reply, Progress) and progress is not None:
                progress(reply)

    def _hang_up(self) -> None:
        held: tuple[int, _Line] | None = getattr(self._lines, "held", None)
        self._lines.held = None
        if held is not None:
            with contextlib.suppress(OSError):
                held[1].sock.close()

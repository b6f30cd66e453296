"""One connection's consumers: what they say is heard at once and in order, and they end with their process."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cachefs.errors import PlanError
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.prefetcher import Prefetcher
from cachefs.fetcher.prefetch.release import release
from cachefs.messages import Announce, Announced, Done, Plan, Reply, Withdraw
from cachefs.packets import peer_handle, peer_pid


class Listening:
    """gone: called when the process at the other end of `sock` ends, however many copies of its socket live on."""

    def __init__(self, prefetcher: Prefetcher, sock: socket.socket, gone: Callable[[], None]) -> None:
        self._prefetcher = prefetcher
        self._sock = sock
        self._pid = peer_pid(sock)
        self._gone = gone
        self._courses: dict[int, Course] = {}
        self._announced = 0
        self._watch = -1

    def announce(self, attachments: Sequence[Attachment], request: Announce, fd: int) -> Reply:
        """attachments: the connection's. Takes `fd` over. Raises PlanError, StaleObject."""
        with self._refusing(f"the consumer {request.label[:200]!r}", fd):
            if not 0 <= request.attachment < len(attachments):
                raise PlanError(f"attachment {request.attachment}: this connection has none of that number")
            course = self._prefetcher.announce(attachments[request.attachment], request, fd, self._pid)
        number = self._announced
        self._announced += 1
        self._courses[number] = course
        self._watch_process()
        return Announced(id=request.id, consumer=number)

    def plan(self, request: Plan, fd: int) -> Reply:
        """Takes `fd` over. Raises PlanError."""
        with self._refusing(f"the plan of consumer {request.consumer} from item {request.at} on", fd):
            self._prefetcher.plan(self._course(request.consumer), request, fd)
        return Done(id=request.id)

    def withdraw(self, request: Withdraw) -> Reply:
        """Raises PlanError."""
        course = self._course(request.consumer)
        del self._courses[request.consumer]
        return self._prefetcher.withdraw(course, request.id)

    @contextmanager
    def _refusing(self, what: str, fd: int) -> Iterator[None]:
        """Close `fd` when it is not taken, and say what was not."""
        try:
            yield
        except PlanError as error:
            release(fd)
            raise PlanError(f"{what} is refused, and reads go on without it: {error.message}") from None
        except BaseException:
            release(fd)
            raise

    def _course(self, number: int) -> Course:
        if number not in self._courses:
            raise PlanError(f"consumer {number}: this connection has none of that number (any more)")
        return self._courses[number]

    def _watch_process(self) -> None:
        # Its children may hold copies of its socket (loader workers do), so the socket alone does not tell.
        if self._watch >= 0 or self._pid == os.getpid():
            return
        loop = asyncio.get_running_loop()
        try:
            self._watch = peer_handle(self._sock)
        except ProcessLookupError:
            loop.call_soon(self._gone)
            return
        if self._watch >= 0:
            loop.add_reader(self._watch, self._gone)

    def close(self) -> None:
        for course in self._courses.values():
            self._prefetcher.withdraw(course)
        self._courses.clear()
        if self._watch >= 0:
            asyncio.get_running_loop().remove_reader(self._watch)
            os.close(self._watch)
            self._watch = -1

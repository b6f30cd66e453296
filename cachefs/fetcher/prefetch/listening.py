"""One connection's consumers: what they say is heard at once and in order, and they end with their process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence

from cachefs.errors import PlanError
from cachefs.fetcher.attachments import Attachment
from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.prefetcher import Prefetcher
from cachefs.messages import Announce, Announced, Done, Plan, Reply, Withdraw


class Listening:
    """pid: the process at the other end. gone: called when it ends, however many copies of its socket live on."""

    def __init__(self, prefetcher: Prefetcher, pid: int, gone: Callable[[], None]) -> None:
        self._prefetcher = prefetcher
        self._pid = pid
        self._gone = gone
        self._courses: list[Course] = []
        self._watch = -1

    def announce(self, attachments: Sequence[Attachment], request: Announce, fd: int) -> Reply:
        """attachments: the connection's. Takes `fd` over. Raises PlanError, StaleObject."""
        try:
            if not 0 <= request.attachment < len(attachments):
                raise PlanError(f"attachment {request.attachment}: this connection has none of that number")
            course = self._prefetcher.announce(attachments[request.attachment], request, fd, self._pid)
        except BaseException:
            os.close(fd)
            raise
        self._courses.append(course)
        self._watch_process()
        return Announced(id=request.id, consumer=len(self._courses) - 1)

    def plan(self, request: Plan, fd: int) -> Reply:
        """Takes `fd` over. Raises PlanError."""
        try:
            self._prefetcher.plan(self._course(request.consumer), request, fd)
        except BaseException:
            os.close(fd)
            raise
        return Done(id=request.id)

    def withdraw(self, request: Withdraw) -> Reply:
        return self._prefetcher.withdraw(self._course(request.consumer), request.id)

    def _course(self, number: int) -> Course:
        if not 0 <= number < len(self._courses):
            raise PlanError(f"consumer {number}: this connection has none of that number")
        return self._courses[number]

    def _watch_process(self) -> None:
        # Its children may hold copies of its socket (loader workers do), so the socket alone does not tell.
        if self._watch >= 0 or self._pid in (0, os.getpid()):
            return
        with contextlib.suppress(OSError):  # it has ended, and its socket says so; or the kernel is older than 5.3
            self._watch = os.pidfd_open(self._pid)
            asyncio.get_running_loop().add_reader(self._watch, self._gone)

    def close(self) -> None:
        for course in self._courses:
            self._prefetcher.withdraw(course)
        if self._watch >= 0:
            asyncio.get_running_loop().remove_reader(self._watch)
            os.close(self._watch)
            self._watch = -1

"""READs that wait for the fetcher: one task each, on the worker's event loop.

The thread that reads requests hands a miss over and goes on, so a read that waits for the origin holds up nobody
else's. The task asks the fetcher where the bytes are, reads them and writes the reply. A range of a large object
that became readable is kept for the READs that follow it.

INTERRUPT: the kernel sends one for any signal that reaches a waiting reader, and gives it to whichever worker reads
next. Only a reader that is being killed may see its read end early: a local disk never answers EINTR, and a page
fault that got it would die of SIGBUS. So the reader's pending signals are watched, and the request ends when SIGKILL
(which is also what the kernel makes of any fatal signal) is among them. An interrupt for a request of another
worker is passed on through the keeper; replying to it would not do, because the kernel looks for a request only
on the descriptor that it was read from.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from cachefs import memory
from cachefs.budget import Budget
from cachefs.client import Located
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import CacheFSError, FetcherError, FetcherTimeout, ObjectNotFound, errno_of
from cachefs.store.layout import seal_ns
from cachefs_sidecar.fuse.abi import UNIQUE_RESEND
from cachefs_sidecar.fuse.reading import Miss, Reading, Window, stale

log = logging.getLogger("cachefs.mount")

# Bytes of READs whose other half is still waited for. Only what crosses from one block to the next can wait so.
HALVES_SHARE, HALVES_LEAST, HALVES_MOST = 256, 4 * 1024 * 1024, 64 * 1024 * 1024

# How often a reader that got a signal is looked at: a killed process is gone within what feels like at once.
WATCH_SECONDS = 0.05

# An interrupt that was passed on may arrive before the worker has taken the request in hand. When it is still
# unknown after this long, it was a hit and has been answered.
UNKNOWN_SECONDS = 0.5


class Fetching(Protocol):
    """The part of cachefs.client.AsyncConnection that a mount uses."""

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
    ) -> Located: ...
    async def close(self) -> None: ...


class Replies(Protocol):
    """Where answers go: the session."""

    def reply_bytes(self, unique: int, data: bytes) -> None: ...
    def reply_error(self, unique: int, number: int) -> None: ...


class Misses:
    """deadline: seconds that a READ may wait. pass_on: sends an interrupt to the other workers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Fetching,
        reading: Reading,
        lock: threading.Lock,
        *,
        deadline: float,
        pass_on: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._reading = reading
        self._lock = lock
        self._deadline = deadline
        self._pass_on = pass_on
        self._seal = seal_ns()
        self._halves = Budget(memory.share(HALVES_SHARE, least=HALVES_LEAST, most=HALVES_MOST))
        self._tasks: dict[int, tuple[asyncio.Task[None], int]] = {}
        self.replies: Replies | None = None
        self.counts: Counter[str] = Counter()

    # --- called from the thread that reads requests ---

    def take(self, unique: int, pid: int, miss: Miss) -> None:
        self._loop.call_soon_threadsafe(self._start, unique, pid, miss)

    def interrupt(self, unique: int) -> None:
        # Requests of this worker were taken before: the loop runs callbacks in order.
        self._loop.call_soon_threadsafe(self._interrupted, unique, True)

    # --- on the loop ---

    @property
    def waiting(self) -> int:
        return len(self._tasks)

    def interrupt_passed_on(self, unique: int) -> None:
        """Another worker was told to end a request that may be ours."""
        if unique & ~UNIQUE_RESEND in self._tasks:
            self._interrupted(unique, False)
        else:
            self._loop.call_later(UNKNOWN_SECONDS, self._interrupted, unique, False)

    def _interrupted(self, unique: int, ours_to_pass_on: bool) -> None:
        waiting = self._tasks.get(unique & ~UNIQUE_RESEND)
        if waiting is None:
            if ours_to_pass_on:
                self._pass_on(unique)
            return
        task, pid = waiting
        if _is_dying(pid):
            task.cancel()
        else:
            self._loop.call_later(WATCH_SECONDS, self._interrupted, unique, False)

    def _start(self, unique: int, pid: int, miss: Miss) -> None:
        key = unique & ~UNIQUE_RESEND
        task = self._loop.create_task(self._answer(unique, miss))
        self._tasks[key] = (task, pid)
        task.add_done_callback(lambda done: self._finished(key, done))

    def _finished(self, key: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key, (None,))[0] is task:
            del self._tasks[key]

    async def _answer(self, unique: int, miss: Miss) -> None:
        """Reply exactly once, whatever happens."""
        assert self.replies is not None
        number = errno.EIO
        try:
            async with asyncio.timeout(self._deadline):
                data = await self._bytes(miss)
        except asyncio.CancelledError:
            number = errno.EINTR  # its reader is being killed, or this worker ends
        except (CacheFSError, OSError) as error:
            number = self._failed(miss, error)
        except Exception:  # a fault of ours in one read must not leave its reader waiting for ever
            log.exception("%s: read failed", miss.path)
        else:
            self.replies.reply_bytes(unique, data)
            return
        self.counts["errors"] += 1
        self.replies.reply_error(unique, number)

    def _failed(self, miss: Miss, error: Exception) -> int:
        if isinstance(error, TimeoutError) and not isinstance(error, CacheFSError):
            error = FetcherTimeout(f"no bytes within {self._deadline:g} s", path=miss.path)
        log.error("%s: %s", miss.path, error)
        # The snapshot has the object, so a read of it that finds it deleted is a stale one: read(2) knows no ENOENT.
        return errno.ESTALE if isinstance(error, ObjectNotFound) else errno_of(error)

    async def _bytes(self, miss: Miss) -> bytes:
        """Exactly the bytes of the miss. They are in memory from the last answer of the fetcher until the reply, which
        is one step of the loop, so of all readers' bytes there is one READ's at a time, but for halves."""
        if miss.offset // BLOCK_SIZE == (miss.stop - 1) // BLOCK_SIZE:
            return await self._gathered(miss)
        async with self._halves.hold(miss.stop - miss.offset):
            return await self._gathered(miss)

    async def _gathered(self, miss: Miss) -> bytes:
        """Over as many answers as they need."""
        parts: list[bytes] = []
        at = miss.offset
        damaged = miss.damaged
        while at < miss.stop:
            located = await self._connection.need(
                miss.path,
                version=miss.version,
                size=miss.size,
                offset=at,
                length=miss.stop - at,
                damaged=damaged,
            )
            try:
                piece = self._take(miss, located, at)
            except OSError as error:
                # The disk failed under bytes that had just been found good. Once more, from the origin.
                if damaged or not isinstance(error, OSError) or errno_of(error) != errno.EIO:
                    raise
                damaged = True
                continue
            parts.append(piece)
            at += len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, miss: Miss, located: Located, at: int) -> bytes:
        """The bytes from `at` on that are there; the descriptor is kept or closed."""
        keep = False
        try:
            if located.size != miss.size:
                raise stale(miss, located.size)
            if not located.start <= at < located.stop:
                raise FetcherError(f"{miss.path}: the fetcher made other bytes readable than asked for")
            data = located.read(at, min(miss.stop, located.stop) - at)
            info = os.fstat(located.fd)
            with self._lock:
                self._reading.reply.settling.add(located.fd, at - located.base, len(data))
            # More than one name and not complete: it became a blob just now, and is opened as one by the next READ.
            # A file without the seal is being written to; one without a path is memory of the fetcher's.
            more = located.start < miss.offset or located.stop > miss.stop
            keep = (
                more
                and (located.complete or info.st_nlink <= 1)
                and (not located.file or info.st_mtime_ns == self._seal)
            )
        finally:
            if not keep:
                os.close(located.fd)
        if keep:
            kept = 0 if located.file else info.st_size
            window = Window(located.start, located.stop, located.base, located.fd, info, located.complete, kept)
            with self._lock:
                self._reading.hold(miss.node, miss.size, window)
        return data

    async def finished(self) -> None:
        """Returns when no read waits any more."""
        while self._tasks:
            await asyncio.wait([task for task, _ in self._tasks.values()])

    async def close(self) -> None:
        """End every read that waits (EINTR) and the connection."""
        tasks = [task for task, _ in self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()


def _is_dying(pid: int) -> bool:
    """Whether SIGKILL is pending for a thread. False for 0: a reader in a pid namespace that we cannot see."""
    if pid == 0:
        return False
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = status.read().splitlines()
    except OSError:
        return True  # gone already
    pending = 0
    for line in lines:
        if line.startswith((b"SigPnd:", b"ShdPnd:")):
            pending |= int(line.split()[1], 16)
    return bool(pending >> (signal.SIGKILL - 1) & 1)

"""Tasks done by processes of this machine: `python -m cachefs.batch.worker`, each with one end of a socket.

Not concurrent.futures: a process of ours that dies takes its task with it and no other, what travels is ours to read,
and the processes end with the command however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from types import TracebackType

from cachefs.batch.frames import MOST, read_frame, write_frame
from cachefs.batch.tasks import Answer, Parcel, lost, unpack_answer
from cachefs.errors import FetcherError

# Reading and hashing small objects is bound by Python: 0.2 ms each. More processes than that no origin keeps busy.
MOST_PROCESSES = 8

# A task whose process was killed so often is what kills it.
TRIES = 3


_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class LocalEngine:
    def __init__(self, processes: int | None = None) -> None:
        self._count = processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._turns = asyncio.Semaphore(self._count)

    @property
    def slots(self) -> int:
        return 2 * self._count  # the next is ready when one is done

    @property
    def workers(self) -> int:
        return self._count

    async def __aenter__(self) -> LocalEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
        await asyncio.gather(*(process.gone() for process in self._all))
        self._all.clear()

    async def run(self, parcel: Parcel, workers: tuple[str, ...] = ()) -> Answer:
        async with self._turns:
            for _ in range(TRIES):
                answer = await self._try(parcel)
                if answer is not None:
                    return unpack_answer(answer)
        raise lost(parcel, f"its process was killed {TRIES} times (memory?)")

    async def _try(self, parcel: Parcel) -> bytes | None:
        process = self._idle.pop() if self._idle else await self._start()
        answer = None
        try:
            answer = await process.ask(parcel.data)
        finally:
            if answer is not None:
                self._idle.append(process)
            else:  # it died, or we are cancelled and it is still busy with what nobody wants
                process.kill()
        return answer

    async def _start(self) -> _Process:
        process = await _Process.start()
        self._all.add(process)
        return process


class _Process:
    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        environ = dict(os.environ)
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_ROOT, environ.get("PYTHONPATH")]))
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "cachefs.batch.worker", str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=environ,
                    start_new_session=True,  # Ctrl-C is for the command, which ends them
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise FetcherError(f"cannot start a process of {sys.executable}: {error.strerror}") from error
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours, limit=MOST)
        return cls(process, reader, writer)

    async def ask(self, data: bytes) -> bytes | None:
        """None: it died."""
        try:
            write_frame(self._writer, data)
            await self._writer.drain()
        except ConnectionError:
            return None
        return await read_frame(self._reader)

    def kill(self) -> None:
        self._writer.close()
        if self._process.returncode is None:
            # Not its `kill`, which reaps one that is dead already: asyncio then misses it, and says so.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def gone(self) -> None:
        await self._process.wait()

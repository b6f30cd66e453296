"""How far long work is and what failed in it, as whoever asked is told: at least once a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cachefs.messages import Progress, Reply

# Failures named in a reply; the rest are counted.
NAMED_FAILURES = 100

# So that a hundred of them stay within a packet of 96 KiB whatever they are called.
NAME_LENGTH, REASON_LENGTH = 400, 300

Send = Callable[[Reply], None]


@dataclass
class Tally:
    """How far a job is."""

    what: str
    done: int = 0
    total: int = 0
    bytes: int = 0


class Failures:
    """What failed and why: the first few by name, so that the reply fits into a packet, and how many in all."""

    def __init__(self) -> None:
        self.named: list[tuple[str, str]] = []
        self.total = 0

    def add(self, path: str, reason: str) -> None:
        self.total += 1
        if len(self.named) < NAMED_FAILURES:
            self.named.append((path[-NAME_LENGTH:], reason[:REASON_LENGTH]))


@asynccontextmanager
async def heartbeat(id: int, tally: Tally, send: Send) -> AsyncIterator[None]:
    """Tell the one who asked how far the work is, as long as the block runs."""

    async def beat() -> None:
        while True:
            send(Progress(id=id, done=tally.done, total=tally.total, bytes=tally.bytes, what=tally.what))
            await asyncio.sleep(0.2)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()

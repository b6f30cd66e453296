"""Ask a peer, and the origin too when the peer takes long: whoever has it first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cachefs.budget import Urgency
from cachefs.errors import PeerError

T = TypeVar("T")

# How exact timers are on a machine that is not busy.
LATE = 0.01


async def first(
    owner: Callable[[], Awaitable[T]],
    origin: Callable[[], Awaitable[T]],
    *,
    after: float,
    urgency: Urgency | None = None,
    patience: float = 0.0,
) -> T:
    """What `owner` gives; what `origin` gives when the owner fails, or has not answered within `after` seconds and the
    origin is faster. The other one is cancelled, and has ended when this returns.

    urgency: while nobody waits for it, and for at most `patience` seconds, those do not begin.
    Raises what `origin` raises, once the owner has failed too.
    """
    asking = asyncio.ensure_future(owner())
    reading: asyncio.Future[T] | None = None
    try:
        if urgency is not None and urgency.level > 0:
            await _unwaited(asking, urgency, patience)
        await _patiently(asking, after)
        if asking.done() and not _failed(asking):
            return asking.result()
        reading = asyncio.ensure_future(origin())
        if not asking.done():
            await asyncio.wait((asking, reading), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and reading.exception() is not None and not asking.done():
                await asyncio.wait((asking,))  # it may still come from there
            if not reading.done() and _failed(asking):
                return await reading
        if asking.done() and not _failed(asking):
            return asking.result()
        return await reading
    finally:
        losers = [future for future in (asking, reading) if future is not None]
        for future in losers:
            future.cancel()
        await asyncio.gather(*losers, return_exceptions=True)


async def _patiently(asking: asyncio.Future[T], seconds: float) -> None:
    """Wait for it, for so long. Where this process got no turn when that was over, as much longer: what came meanwhile
    lies unread, and whoever shares this machine, or one that is as busy, got no turn either.
    """
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    await asyncio.wait((asking,), timeout=seconds)
    if not asking.done() and (late := loop.time() - due) > LATE:
        await asyncio.wait((asking,), timeout=late)


async def _unwaited(asking: asyncio.Future[T], urgency: Urgency, patience: float) -> None:
    lifted = asyncio.ensure_future(urgency.waited_for())
    try:
        await asyncio.wait((asking, lifted), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    finally:
        lifted.cancel()


def _failed(asking: asyncio.Future[T]) -> bool:
    """Whether a peer that has answered gave nothing. Anything but a PeerError is a defect, and raised."""
    error = asking.exception()
    if error is not None and not isinstance(error, PeerError):
        raise error
    return error is not None

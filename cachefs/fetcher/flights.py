"""One flight per object: whoever asks for what is already being fetched waits for that fetch.

A flight belongs to nobody in particular: when the reader that started it is killed, the others still get their
bytes; when nobody waits any more, it is cancelled. It is as urgent as the most urgent of those who ever waited: a
reader that joins what was begun ahead of time lifts it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cachefs.budget import Urgency

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    urgency: Urgency
    waiting: int = 0


class Flights(Generic[T]):
    """Runs at most one coroutine per key at a time. Used on one event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Hashable, start: Callable[[Urgency], Coroutine[Any, Any, T]], level: int = 0) -> T:
        """The result of the flight for `key`, started with `start` when there is none. level: of its urgency."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._begin(key, start, Urgency(level))
        else:
            flight.urgency.lift(level)
        flight.waiting += 1
        try:
            # shield: the cancellation of one waiter must not take the flight from the others.
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Take it off the board at once: a reader who comes now must start a flight of its own and
                # not join one that is being cancelled.
                self._off_the_board(key, flight)
                flight.task.cancel()

    def _begin(self, key: Hashable, start: Callable[[Urgency], Coroutine[Any, Any, T]], urgency: Urgency) -> _Flight[T]:
        flight = self._flights[key] = _Flight(asyncio.create_task(start(urgency)), urgency)
        flight.task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    def _landed(self, key: Hashable, flight: _Flight[T]) -> None:
        self._off_the_board(key, flight)
        if not flight.task.cancelled():
            flight.task.exception()  # retrieved: every waiter has been given it by shield, or nobody waits

    def _off_the_board(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """Cancel every flight and wait for its end."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

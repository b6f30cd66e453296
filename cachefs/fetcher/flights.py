"""One flight per object: whoever asks for what is already being fetched waits for that fetch.

A flight belongs to nobody in particular: when the reader that started it is killed, the others still get their
bytes; when nobody waits any more, it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Flights(Generic[T]):
    """Runs at most one coroutine per key at a time. Used on one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}
        self._waiting: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the flight for `key`, started with `start` when there is none."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(start())
            task.add_done_callback(lambda done: self._landed(key, done))
        self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            # shield: the cancellation of one waiter must not take the flight from the others.
            return await asyncio.shield(task)
        finally:
            left = self._waiting.get(key, 1) - 1
            if left > 0:
                self._waiting[key] = left
            else:
                self._waiting.pop(key, None)
                if not task.done():
                    # Take it off the board at once: a reader who comes now must start a flight of its own and
                    # not join one that is being cancelled.
                    if self._tasks.get(key) is task:
                        del self._tasks[key]
                    task.cancel()

    def _landed(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # retrieved: every waiter has been given it by shield, or nobody waits

    async def close(self) -> None:
        """Cancel every flight and wait for its end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

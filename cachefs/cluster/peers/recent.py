"""Counts of the last minute, from counts that only grow: a sample of them each second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

SAMPLE_SECONDS = 1.0

# One more than a minute has, so that the oldest is a minute old.
_SAMPLES = 62


class Recent:
    """read: what was counted so far. `keep` samples it until it is cancelled."""

    def __init__(self, read: Callable[[], tuple[int, ...]], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque([(clock(), read())], maxlen=_SAMPLES)

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.sample()

    def total(self) -> tuple[int, ...]:
        return self._read()

    def sample(self) -> None:
        self._samples.append((self._clock(), self._read()))

    def since(self, seconds: float) -> tuple[int, tuple[int, ...]]:
        """(milliseconds, what was counted in them): the last `seconds`, or as long as it is known where that is less.

        A little more where the samples do not fall on it.
        """
        now, counts = self._clock(), self._read()
        then, before = self._samples[0]
        for at, sample in reversed(self._samples):
            if at <= now - seconds:
                then, before = at, sample
                break
        return int((now - then) * 1000), tuple(b - a for a, b in zip(before, counts, strict=True))

"""How long an origin is waited for, and when a request is tried again.

Options of every origin (seconds): `retry_timeout`, `connect_timeout`, `read_timeout`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cachefs.errors import ConfigError, OriginTimeout, OriginUnreachable

if TYPE_CHECKING:
    from obstore.store import RetryConfig

T = TypeVar("T")

# No retry starts later than this after the first attempt. Storage gateways restart and fail over within 10-30 s, and
# a reader waits 120 s in all (config.DEFAULT_DEADLINE_SECONDS), so there is room for a block behind a failed one.
RETRY_SECONDS = 30.0

# TCP tries again after 1 and 3 s, so 5 s survive two lost SYNs.
CONNECT_SECONDS = 5.0

# The longest silence in the middle of an answer. S3 promises a first byte within 0.2 s; a spinning disk array that
# rebuilds may take seconds.
READ_SECONDS = 10.0

# First pause and longest pause between attempts: 0.1 s is about one round trip to a far region; 5 s keep the number
# of attempts within RETRY_SECONDS near ten, and the pause short when the origin is back.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0

# One request with its whole body. Only against servers that drip: 8 MiB in 300 s is 28 KB/s.
REQUEST_SECONDS = 300.0

# The deadline ends the retries, not their number.
_MAX_RETRIES = 50


class Transient(Exception):
    """An attempt failed in a way that another may not. `.error` is what to raise when time is up."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Patience:
    retry: float = RETRY_SECONDS
    connect: float = CONNECT_SECONDS
    read: float = READ_SECONDS

    @classmethod
    def take(cls, options: dict[str, Any]) -> Patience:
        """From the options, which lose the names consumed here. Raises ConfigError."""
        return cls(
            retry=_seconds(options, "retry_timeout", RETRY_SECONDS),
            connect=_seconds(options, "connect_timeout", CONNECT_SECONDS),
            read=_seconds(options, "read_timeout", READ_SECONDS),
        )

    def brief(self) -> Patience:
        """For a person who waits at a prompt: one or two attempts, then say so."""
        return replace(self, retry=min(self.retry, 2.0))

    def retry_config(self) -> RetryConfig:
        """The same for obstore, which adds the jitter."""
        return {
            "max_retries": _MAX_RETRIES if self.retry else 0,
            "retry_timeout": timedelta(seconds=self.retry),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE),
                "base": 2,
            },
        }

    def client_options(self) -> dict[str, Any]:
        return {
            "connect_timeout": timedelta(seconds=self.connect),
            "read_timeout": timedelta(seconds=self.read),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
        }

    async def persevere(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Call `attempt` until it does not raise Transient or the time is up; then raise what it last met."""
        deadline = time.monotonic() + self.retry
        pause = FIRST_PAUSE
        while True:
            try:
                return await attempt()
            except Transient as failure:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise failure.error from failure
            # Full jitter: clients that failed together must not come back together.
            await asyncio.sleep(min(left, random.uniform(0, pause)))  # noqa: S311 - not for secrets
            pause = min(LONGEST_PAUSE, pause * 2)

    def unreachable(self, where: str, why: str) -> OriginUnreachable:
        return OriginUnreachable(
            f"{where}: nothing answers there ({why}; tried for {self.retry:g} s); check the endpoint and the network"
        )

    def too_slow(self, where: str) -> OriginTimeout:
        return OriginTimeout(
            f"{where}: no answer in time (silent for {self.read:g} s, tried for {self.retry:g} s);"
            " the origin is overloaded or the network is, or raise the options read_timeout and retry_timeout"
        )


def _seconds(options: dict[str, Any], name: str, default: float) -> float:
    value = options.pop(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 86400 or (number == 0 and name != "retry_timeout"):
        raise ConfigError(f"option {name}={value!r}: give a number of seconds, such as {default:g}")
    return number

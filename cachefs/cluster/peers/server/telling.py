"""What this node says of itself to the others: its fetcher's counts, and what this process gave.

The fetcher is asked at most twice a second, however many peers ask: a few bytes of answer are all that asking costs.
When it does not answer, the others hear that, and what this process knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from cachefs.client.once import ask_once
from cachefs.cluster.peers.account import Account, Given, GivenLately, encode_account, text
from cachefs.cluster.peers.recent import Recent
from cachefs.cluster.peers.server.serving import Server
from cachefs.config import CacheConfig
from cachefs.errors import CacheFSError
from cachefs.messages import Report, Tell

# Less than those who ask wait for, so that they hear what is the matter.
FETCHER_SECONDS = 1.0

KEEP_SECONDS = 0.5


class Telling:
    """Of one server. name: what the node is called where its fetcher does not say. `running` it counts."""

    def __init__(self, config: CacheConfig, name: str, server: Server) -> None:
        self._config = config
        self._name = name
        self._recent = Recent(lambda: (server.objects, server.bytes))
        self._asking = asyncio.Lock()
        self._told = b""
        self._until = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        counting = asyncio.create_task(self._recent.keep())
        try:
            yield
        finally:
            counting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await counting

    async def account(self) -> bytes:
        """An Account, as it travels."""
        async with self._asking:
            if time.monotonic() >= self._until:
                account = await self._of_fetcher()
                (age_10s, last_10s), (age_60s, last_60s) = self._recent.since(10), self._recent.since(60)
                self._told = encode_account(msgspec.structs.replace(
                    account,
                    given=Given(*self._recent.total()),
                    given_10s=GivenLately(age_10s, Given(*last_10s)),
                    given_60s=GivenLately(age_60s, Given(*last_60s)),
                ))  # fmt: skip
                self._until = time.monotonic() + KEEP_SECONDS
            return self._told

    async def _of_fetcher(self) -> Account:
        try:
            report = await ask_once(self._config, Tell(id=2), Report, FETCHER_SECONDS)
            return msgspec.convert(report.status, Account)
        except (CacheFSError, OSError) as error:
            why = str(error)
        except msgspec.MsgspecError as error:
            why = f"its fetcher cannot be understood ({error}); is it of another version?"
        return Account(name=text(self._name, 253), fetcher=text(why))

"""What a user settles about a dataset or a tenant, written down before it is said to be done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice

from cachefs import datasets, tenants
from cachefs.config import checked_tenant, format_size
from cachefs.datasets import DatasetRecord
from cachefs.errors import CacheError, ConfigError
from cachefs.fetcher.room import Room
from cachefs.fetcher.tally import Send, Tally, heartbeat
from cachefs.messages import Done, Pin, Quota, Report

log = logging.getLogger("cachefs.fetcher")


class Settling:
    """discard_part: drops an incomplete object, by its name in the store; bytes freed."""

    def __init__(self, room: Room, discard_part: Callable[[str], int]) -> None:
        self._room = room
        self._discard_part = discard_part
        self._one_at_a_time = asyncio.Lock()

    async def pin(self, request: Pin, send: Send) -> None:
        """Raises ConfigError for a dataset that the cache does not know, CacheError when it cannot be written down."""
        record = self._record(request.dataset)
        if record.pinned != request.pinned:
            try:
                await asyncio.to_thread(datasets.update, self._room.config.home, record, pinned=request.pinned)
            except OSError as error:
                raise self._unwritten(record.root, _word(request), error) from error
            log.info("%s: %s", record.root, _word(request))
        send(Done(id=request.id, count=int(record.pinned != request.pinned)))

    async def quota(self, request: Quota, send: Send) -> None:
        """Raises as `pin` does."""
        home = self._room.config.home
        tally = Tally("objects")
        async with heartbeat(request.id, tally, send), self._one_at_a_time_when_counted():
            if request.dataset:
                record = self._record(request.dataset)
                what, before = record.root or "(everything)", record.quota
                write = asyncio.to_thread(datasets.update, home, record, quota=request.quota)
            else:
                if not checked_tenant(request.tenant):
                    raise ConfigError("a quota is a dataset's or a tenant's, and neither was named")
                what, before = f"tenant {request.tenant}", tenants.quotas(home).get(request.tenant)
                write = asyncio.to_thread(tenants.set_quota, home, request.tenant, request.quota)  # type: ignore[arg-type]
            try:
                await write
            except OSError as error:
                raise self._unwritten(what, "given a quota", error) from error
            log.info("%s: quota %s", what, "none" if request.quota is None else format_size(request.quota))
            stays = await self._fit(tally)
        used = self._room.quotas.used(request.dataset, request.tenant)
        report = {
            "used": used,
            "dropped": tally.done,
            "freed": tally.bytes,
            "changed": before != request.quota,
            "pinned": stays,
        }
        send(Report(id=request.id, status=report))

    @asynccontextmanager
    async def _one_at_a_time_when_counted(self) -> AsyncIterator[None]:
        """Counted first, as `fit` has its turn before all is counted: else what goes now would stay in the count."""
        await self._room.scanned.wait()
        async with self._one_at_a_time:
            yield

    async def fit(self) -> None:
        """Drop what exceeds a quota: after a start, in case that a command was cut off."""
        async with self._one_at_a_time:
            await self._fit(Tally("objects"))

    async def _fit(self, tally: Tally) -> list[str]:
        """Roots of pinned datasets whose quota, or their tenant's, stays exceeded."""
        room = self._room
        await room.quotas.reload()
        for own, excess in room.quotas.too_much():
            steps = room.quotas.trim(own, excess, self._discard_part)
            while batch := await asyncio.to_thread(lambda steps=steps: list(islice(steps, 256))):  # type: ignore[misc]
                tally.done += len(batch)
                tally.bytes += sum(batch)
                room.capacity.free(sum(batch))
        if tally.done:
            log.info("%d objects dropped, %s freed: more than a quota allows", tally.done, format_size(tally.bytes))
        above = {dataset for own, _ in room.quotas.too_much() for dataset in own}
        return [record.root for record in datasets.load_all(room.config.home) if record.pinned and record.id in above]

    def _record(self, dataset: str) -> DatasetRecord:
        found = next((r for r in datasets.load_all(self._room.config.home) if r.id == dataset), None)
        if found is None:
            raise ConfigError(
                f"{self._room.config.home}: nothing is stored yet of that dataset; mount or warm it first "
                "(`cachefs status` lists what is known)"
            )
        return found

    def _unwritten(self, what: str, done: str, error: OSError) -> CacheError:
        return CacheError(f"{what}: cannot be {done}: {self._room.config.home}: {error.strerror}")


def _word(request: Pin) -> str:
    return "pinned" if request.pinned else "unpinned"

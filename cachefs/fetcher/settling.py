"""What a user settles about a dataset, written down in its record before it is said to be done."""

from __future__ import annotations

import asyncio
import logging

from cachefs import datasets
from cachefs.datasets import DatasetRecord
from cachefs.errors import CacheError, ConfigError
from cachefs.fetcher.objects import Room
from cachefs.fetcher.tally import Send
from cachefs.messages import Done, Pin

log = logging.getLogger("cachefs.fetcher")


class Settling:
    def __init__(self, room: Room) -> None:
        self._room = room

    async def pin(self, request: Pin, send: Send) -> None:
        """Raises ConfigError for a dataset that the cache does not know, CacheError when it cannot be written down."""
        record = self._record(request.dataset)
        if record.pinned != request.pinned:
            try:
                await asyncio.to_thread(datasets.update, self._room.config.home, record, pinned=request.pinned)
            except OSError as error:
                home = self._room.config.home
                raise CacheError(f"{record.root}: cannot be {_word(request)}: {home}: {error.strerror}") from error
            log.info("%s: %s", record.root, _word(request))
        send(Done(id=request.id, count=int(record.pinned != request.pinned)))

    def _record(self, dataset: str) -> DatasetRecord:
        found = next((r for r in datasets.load_all(self._room.config.home) if r.id == dataset), None)
        if found is None:
            raise ConfigError(
                f"{self._room.config.home}: nothing is stored yet of that dataset; mount or warm it first "
                "(`cachefs status` lists what is known)"
            )
        return found


def _word(request: Pin) -> str:
    return "pinned" if request.pinned else "unpinned"

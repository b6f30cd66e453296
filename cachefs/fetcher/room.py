"""What the parts of a fetcher share: its store, its index, its counts and limits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachefs import hits, memory
from cachefs.budget import Budget
from cachefs.config import CacheConfig
from cachefs.fetcher.attachments import Attachments
from cachefs.fetcher.capacity import Capacity
from cachefs.fetcher.copies import NoPlans, Plans
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.index import Index
from cachefs.fetcher.quotas import Quotas
from cachefs.fetcher.sources import FromOrigin, Source
from cachefs.fetcher.storing import Storing
from cachefs.fetcher.transit import KEEP_BYTES, KEEP_LEAST, KEEP_SHARE, TransitStation
from cachefs.fetcher.turnover import Turnover
from cachefs.store import Reader, Store

if TYPE_CHECKING:
    from cachefs.fetcher.editions import Editions


class Room:
    """Owned by the service; made once."""

    def __init__(self, config: CacheConfig, store: Store, index: Index) -> None:
        self.config = config
        self.store = store
        self.reader = Reader(config.dirs)
        self.storing = Storing(store)
        self.index = index
        self.capacity = Capacity(config.size, config.min_free)
        self.attachments = Attachments(config.home)
        self.quotas = Quotas(config.home, store)
        self.counters = Counters()
        self.origin = FromOrigin(self.counters)
        self.source: Source = self.origin  # or what goes before it: see cluster.py
        self.editions: Editions | None = None  # of the cluster that this node is in
        self.plans: Plans = NoPlans()  # what will be read here, as far as somebody said so: see service.py
        self.in_flight = Budget(memory.in_flight())
        self.transit = TransitStation(memory.share(KEEP_SHARE, least=KEEP_LEAST, most=KEEP_BYTES))
        self.turnover = Turnover(config, store, index, self.capacity, self.attachments, self.counters)
        self.scanned = asyncio.Event()
        self._found_before = self._found = hits.total(config.home)

    def found(self) -> int:
        """How often readers found an object on the disk by themselves since this fetcher began.

        Never less than before, though the number may be lost and begin anew.
        """
        self._found = max(self._found, hits.total(self.config.home))
        return self._found - self._found_before

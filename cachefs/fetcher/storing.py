"""Put small objects into the store in the cheapest way that holds nobody up.

A write of 110 KB into the page cache takes 0.1 ms. Handing it to a thread and back costs more than that: a dozen
system calls there and a busy loop here take the interpreter from each other at each of them. So it is done on the
loop, as long as the disk takes what it is given at once. When it does not (the kernel makes writers wait for a disk
that is slower than the network; a disk hangs), the next ones go to threads for a while, and only they wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from cachefs.store import Store
from cachefs.store.layout import Places

# Larger ones keep the loop for longer than the hand-over costs. Nearly all images are smaller.
SMALL_BYTES = 512 * 1024

# Fifty times what a small object takes. No disk is meant that is a little slow, but one that makes writers wait.
PROMPT_SECONDS = 0.005

# How long such a disk is left to threads before the loop tries it again. The kernel holds a writer up for at most
# 0.2 s at a time (MAX_PAUSE in mm/page-writeback.c), so that is 2% of the loop's time.
WARY_SECONDS = 10.0


class Storing:
    """What is stored, and where it is. Used on one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads_until = 0.0
        self.spent = 0.0  # seconds that writing has taken, of all writers together
        # With one directory there is nothing to look for.
        self._only = Places(store.config.home) if len(store.config.dirs) == 1 else None

    async def put(self, data: bytes | memoryview, links: Iterable[tuple[str, str]], tag: bytes = b"") -> bytes:
        """As Store.put."""
        began = time.monotonic()
        if len(data) > SMALL_BYTES or began < self._threads_until:
            try:
                return await asyncio.to_thread(self._store.put, data, links=links, tag=tag)
            finally:
                self.spent += time.monotonic() - began
        try:
            return self._store.put(data, links=links, tag=tag)
        finally:
            now = time.monotonic()
            self.spent += now - began
            if now - began > PROMPT_SECONDS:
                self._threads_until = now + WARY_SECONDS

    def file(self, key: bytes) -> str:
        """Where a blob is that is stored. Raises CacheError when no directory is left."""
        if self._only is not None:
            return self._only.blob(key.hex())
        return str(self._store.path(key))

"""Bytes that pass through without being stored: no room on the SSD, or the SSD fails.

They live in a memfd, whose descriptor goes to the reader; a few recent ones stay here, so that ranks that read
the same object within seconds share one read of the origin. What was fetched ahead is held until it is read: nothing
else pushes it out. Memory is bounded by KEEP_BYTES plus what readers hold themselves and what the prefetcher lets be
held (its HOLD_BYTES).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

# Eight blocks: enough for several sequential readers of large objects to take their READs out of one block, and
# 600 images of 110 KB for ranks that follow one another; small against what one training process takes.
KEEP_BYTES = 64 * 1024 * 1024

# Where memory is short: a share of it, and never less than two blocks, or readers of one would fetch it in turns.
KEEP_SHARE, KEEP_LEAST = 64, 16 * 1024 * 1024


class Transit(NamedTuple):
    """fd: a memfd with bytes [start, stop) of the object. size and version are the object's."""

    fd: int
    start: int
    stop: int
    size: int
    version: str
    mtime_ns: int


def memory_file(data: bytes) -> int:
    """A descriptor of an anonymous file with `data`."""
    fd = os.memfd_create("cachefs-transit", os.MFD_CLOEXEC)
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


class TransitStation:
    """The recent ones, least recently used first."""

    def __init__(self, keep: int = KEEP_BYTES) -> None:
        self._keep = keep
        self._held = 0
        self._recent: OrderedDict[Hashable, Transit] = OrderedDict()
        self._on_hold: dict[Hashable, Transit] = {}

    def get(self, key: Hashable) -> Transit | None:
        if (transit := self._on_hold.get(key)) is not None:
            return transit
        transit = self._recent.get(key)
        if transit is not None:
            self._recent.move_to_end(key)
        return transit

    def put(self, key: Hashable, transit: Transit) -> None:
        if (old := self._recent.pop(key, None)) is not None:
            self._drop(old)
        self._recent[key] = transit
        self._held += transit.stop - transit.start
        while self._held > self._keep and len(self._recent) > 1:
            self._drop(self._recent.popitem(last=False)[1])

    def hold(self, key: Hashable) -> int:
        """Keep a recent one until `release`; its bytes, 0 when it is not there or held already."""
        transit = self._recent.pop(key, None)
        if transit is None:
            return 0
        self._on_hold[key] = transit
        size = transit.stop - transit.start
        self._held -= size
        return size

    def release(self, key: Hashable) -> None:
        """It is one of the recent ones again."""
        if (transit := self._on_hold.pop(key, None)) is not None:
            self.put(key, transit)

    def _drop(self, transit: Transit) -> None:
        self._held -= transit.stop - transit.start
        os.close(transit.fd)

    def close(self) -> None:
        for key in list(self._on_hold):
            self.release(key)
        while self._recent:
            self._drop(self._recent.popitem()[1])

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
from dataclasses import dataclass

# Eight blocks: enough for several sequential readers of large objects to take their READs out of one block, and
# 600 images of 110 KB for ranks that follow one another; small against what one training process takes.
KEEP_BYTES = 64 * 1024 * 1024

# Where memory is short: a share of it, and never less than two blocks, or readers of one would fetch it in turns.
KEEP_SHARE, KEEP_LEAST = 64, 16 * 1024 * 1024


@dataclass(eq=False, slots=True)
class Transit:
    """fd: a memfd with bytes [start, stop) of the object. size and version are the object's.

    It closes fd when nobody has it any more: others may push it out of the station between the end of a flight and the
    moment when whoever waited takes the descriptor, whose number would be another file's by then.
    """

    fd: int
    start: int
    stop: int
    size: int
    version: str
    mtime_ns: int

    def __del__(self) -> None:
        os.close(self.fd)


def memory_file(data: bytes | memoryview) -> int:
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
            self._held -= old.stop - old.start
        self._recent[key] = transit
        self._held += transit.stop - transit.start
        while self._held > self._keep and len(self._recent) > 1:
            _, first = self._recent.popitem(last=False)
            self._held -= first.stop - first.start

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

    def close(self) -> None:
        self._on_hold.clear()
        self._recent.clear()
        self._held = 0

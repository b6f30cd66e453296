"""What stays on the SSD, as pure decisions over numbers (DESIGN section 6).

Within a dataset in use nothing is evicted for its own sake: when every item is read once per epoch in a fresh
order, keeping a uniform resident set hits C/N, which no policy beats, and LRU falls far below. What does not fit
streams through. Across datasets the one least recently used goes first, never one in use or pinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A dataset with something stored. last_use: seconds since the epoch."""

    dataset: str
    last_use: float
    in_use: bool
    pinned: bool = False


def victims(candidates: Iterable[Candidate], wanted_by: str) -> list[str]:
    """Datasets that may give room to `wanted_by`, the first to go first."""
    idle = [c for c in candidates if not c.in_use and not c.pinned and c.dataset != wanted_by]
    return [c.dataset for c in sorted(idle, key=lambda c: c.last_use)]

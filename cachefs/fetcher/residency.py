"""Which dataset gives room to another, as a pure decision over numbers (DESIGN section 6).

The one least recently used goes first, never one in use or pinned. Within a dataset in use: `following`.
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

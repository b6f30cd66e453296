"""What the fetcher has done since it started, in numbers that `cachefs status` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """requests: at the origin. bytes: from the origin. needs: asked by readers; stored: answered from disk."""

    needs: int = 0
    stored: int = 0
    origin_requests: int = 0
    origin_bytes: int = 0
    origin_errors: int = 0
    streamed: int = 0
    damaged: int = 0
    evicted_bytes: int = 0
    store_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

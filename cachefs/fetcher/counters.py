"""What the fetcher has done since it started, in numbers that `cachefs status` shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """requests: at the origin. bytes: from the origin. needs: asked by readers; stored: answered from disk.

    origin_reads: objects and blocks that came from the origin, without what was asked of names. asked_by_peers,
    read_for_peers: of needs and origin_reads, those of other nodes.
    peer_reads, peer_bytes: what other nodes gave; peer_failures: what they were asked for and did not give, or gave
    later than the origin.
    lodged: objects, and blocks of large ones, that other nodes took in for this one, which had no room; guests: that
    this one took in.
    replaced: objects that gave their place to one of the same dataset that is read more often.
    """

    needs: int = 0
    stored: int = 0
    origin_requests: int = 0
    origin_bytes: int = 0
    origin_errors: int = 0
    origin_reads: int = 0
    asked_by_peers: int = 0
    read_for_peers: int = 0
    peer_reads: int = 0
    peer_bytes: int = 0
    peer_failures: int = 0
    lodged: int = 0
    guests: int = 0
    streamed: int = 0
    damaged: int = 0
    evicted_bytes: int = 0
    replaced: int = 0
    store_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

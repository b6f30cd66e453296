"""What this node of a cluster says of itself to the others, as far as its fetcher knows: see cluster/peers/account."""

from __future__ import annotations

import time
from typing import cast

import msgspec

from cachefs import datasets
from cachefs.cluster.membership import Members
from cachefs.cluster.peers.account import (
    MOST_DATASETS,
    MOST_PEERS,
    Account,
    Counts,
    Lately,
    Seen,
    Served,
    State,
    text,
    view_of,
)
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.health import PeerState
from cachefs.cluster.peers.recent import Recent
from cachefs.fetcher.room import Room

# In these units seconds travel.
_MICRO = 1_000_000


class Telling:
    """Of one part in one cluster: it counts from when it was made."""

    def __init__(self, room: Room, members: Members, peers: Peers) -> None:
        self._room = room
        self._members = members
        self._peers = peers
        self._began = time.monotonic()
        self._before = self._counted()
        self.recent = Recent(self._counted)

    def _counted(self) -> tuple[int, ...]:
        counted = self._room.counters
        counts = Counts(
            asked=counted.needs - counted.asked_by_peers,
            stored=counted.stored,
            from_peers=counted.peer_reads,
            from_peers_bytes=counted.peer_bytes,
            peer_failures=counted.peer_failures,
            from_origin=counted.origin_reads,
            from_origin_bytes=counted.origin_bytes,
            origin_errors=counted.origin_errors,
            for_peers=counted.read_for_peers,
            found=self._room.found(),
        )
        return msgspec.structs.astuple(counts)

    def account(self) -> Account:
        room, members = self._room, self._members
        total = Counts(*(now - before for now, before in zip(self._counted(), self._before, strict=True)))
        return Account(
            name=text(members.me.name, 253),
            trouble=text(members.trouble),
            age=int((time.monotonic() - self._began) * 1000),
            used=room.capacity.used,
            size=-1 if room.capacity.limit is None else room.capacity.limit,
            counted=room.scanned.is_set(),
            total=total,
            last_10s=self._lately(10),
            last_60s=self._lately(60),
            view=view_of([node.name for node in members.view]),
            peers=self._seen(),
            datasets=self._served(),
        )

    def _lately(self, seconds: float) -> Lately:
        milliseconds, counts = self.recent.since(seconds)
        return Lately(milliseconds, Counts(*counts))

    def _seen(self) -> list[Seen]:
        """Of many, those that are the worst."""
        rows = sorted(self._peers.status(), key=_badness, reverse=True)[:MOST_PEERS]
        return [
            Seen(
                node=text(row.node, 253),
                state=cast(State, row.state),
                objects=row.objects,
                bytes=row.bytes,
                failures=row.failures,
                wrong=row.wrong,
                busy=row.busy,
                late=row.late,
                lately=row.lately,
                p50=int(row.lately_p50 * _MICRO),
                p99=int(row.lately_p99 * _MICRO),
                last_failure=text(row.last_failure),
            )
            for row in rows
        ]

    def _served(self) -> list[Served]:
        """Of many, those that were used last."""
        home = self._room.config.home
        records = sorted(datasets.load_all(home), key=lambda r: datasets.last_use(home, r.id), reverse=True)
        return [
            Served(record.id, text(record.root), text(record.snapshot if record.catalog else "", 64))
            for record in records[:MOST_DATASETS]
        ]


def _badness(row: PeerState) -> tuple[bool, int, int, float]:
    return row.state != "closed", row.wrong, row.late, row.lately_p50

"""What `cachefs cluster status` knows, made of what the nodes said: the document of --json, whose keys stay.

Numbers are bytes, seconds and counts. Of a node that does not answer, what only it knows is 0, null or empty. Texts
come from other nodes: whoever shows them escapes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median_low
from typing import Any

import msgspec

from cachefs.cluster.peers.account import Account, Counts, Lately, Seen, view_of

# Of fewer answers nothing is concluded.
ENOUGH_ANSWERS = 16


class Reads(msgspec.Struct, frozen=True):
    """read: by the node's own readers, who found it on its disk (`found`) or asked its fetcher (`asked`). local: of
    that, what had not to be brought. stored: was on the disk when the fetcher was asked. peers, origin: came from
    there, for whoever reads or ahead of them. for_peers: of origin, because other nodes asked. given: to other nodes.
    peer_failures: what a peer was asked for and did not give, or later than the origin.
    """

    read: int = 0
    local: int = 0
    found: int = 0
    asked: int = 0
    stored: int = 0
    peers: int = 0
    origin: int = 0
    for_peers: int = 0
    given: int = 0
    peer_failures: int = 0
    origin_errors: int = 0


class Bytes(msgspec.Struct, frozen=True):
    peers: int = 0
    origin: int = 0
    given: int = 0


class Rates(msgspec.Struct, frozen=True):
    """Bytes per second."""

    peers: float = 0.0
    origin: float = 0.0
    given: float = 0.0


class Answers(msgspec.Struct, frozen=True):
    """How a node does as the others see it. Of the last minute: p50, p99, seconds from request to object, the median
    of what the others see, None where none of them has asked; overtaken, by the origin. left_alone_by: who asks it
    nothing for a while, because it failed.
    """

    p50: float | None = None
    p99: float | None = None
    seen_by: int = 0
    objects: int = 0
    overtaken: int = 0
    failures: int = 0
    wrong: int = 0
    left_alone_by: list[str] = []
    last_failure: str = ""


class Differs(msgspec.Struct, frozen=True):
    """How many nodes it sees, and those in which its view differs from this node's (empty where they are too many)."""

    nodes: int = 0
    agrees: bool = True
    lacks: list[str] = []
    adds: list[str] = []


class NodeRow(msgspec.Struct, frozen=True):
    """why: it does not answer, "" = it does. fetcher: why only its server does. trouble: why its view may be old. age:
    since it joined. capacity: None = what its disk has. stored: None = not counted yet. snapshots: by dataset.
    """

    name: str
    address: str
    weight: int
    share: float
    why: str = ""
    fetcher: str = ""
    trouble: str = ""
    calls_itself: str = ""
    age: float = 0.0
    stored: int | None = None
    capacity: int | None = None
    reads: Reads = Reads()
    reads_60s: Reads = Reads()
    bytes: Bytes = Bytes()
    rates_10s: Rates = Rates()
    rates_60s: Rates = Rates()
    answers: Answers = Answers()
    view: Differs = Differs()
    snapshots: dict[str, str] = {}


class DatasetRow(msgspec.Struct, frozen=True):
    """snapshots: which nodes have which, "" = no catalog. Nodes that do not know the dataset are in none."""

    dataset: str
    root: str
    snapshots: dict[str, list[str]]


class ClusterReport(msgspec.Struct, frozen=True):
    """me: this node's name. trouble: why its list of nodes may be old. well: every node answers. verdict: who does not,
    or is slow, and how that is known.
    """

    me: str
    home: str
    trouble: str
    nodes: list[NodeRow]
    datasets: list[DatasetRow]
    well: bool = True
    verdict: str = ""


def report_of(home: str, told: Iterable[Mapping[str, Any]]) -> ClusterReport:
    """told: what the fetcher says of each node, and last of this one. Raises msgspec.ValidationError."""
    *rows, last = told
    accounts = {
        row["node"]: msgspec.convert(row["account"], Account) for row in rows if row["account"] is not None
    }  # fmt: skip
    ours = sorted(row["node"] for row in rows)
    nodes = [_node(row, accounts, ours) for row in sorted(rows, key=lambda row: str(row["node"]))]
    return ClusterReport(last["me"], home, last["trouble"], nodes, _datasets(accounts))


def _node(row: Mapping[str, Any], accounts: Mapping[str, Account], ours: list[str]) -> NodeRow:
    name = row["node"]
    known = NodeRow(
        name, row["address"], row["weight"], row["share"], why=row["why"], answers=_answers(name, accounts)
    )  # fmt: skip
    account = accounts.get(name)
    if account is None:
        return known
    alone = account.fetcher != ""  # its server only
    given = account.given
    return msgspec.structs.replace(
        known,
        fetcher=account.fetcher,
        trouble=account.trouble,
        calls_itself="" if alone or account.name == name else account.name,
        age=account.age / 1000,
        stored=account.used if account.counted else None,
        capacity=account.size if account.size >= 0 else None,
        reads=_reads(account.total, given.objects),
        reads_60s=_reads(account.last_60s.counts, account.given_60s.given.objects),
        bytes=Bytes(account.total.from_peers_bytes, account.total.from_origin_bytes, given.bytes),
        rates_10s=_rates(account.last_10s, account.given_10s.given.bytes, account.given_10s.milliseconds),
        rates_60s=_rates(account.last_60s, account.given_60s.given.bytes, account.given_60s.milliseconds),
        view=Differs(account.view.count) if alone else _view(account, ours),
        snapshots={each.dataset: each.snapshot for each in account.datasets},
    )


def _reads(counts: Counts, given: int) -> Reads:
    brought = counts.from_peers + max(0, counts.from_origin - counts.for_peers)
    read = max(counts.found + counts.asked, brought)  # of what was brought ahead, not all is read yet
    return Reads(
        read=read,
        local=read - brought,
        found=counts.found,
        asked=counts.asked,
        stored=counts.stored,
        peers=counts.from_peers,
        origin=counts.from_origin,
        for_peers=counts.for_peers,
        given=given,
        peer_failures=counts.peer_failures,
        origin_errors=counts.origin_errors,
    )


def _rates(lately: Lately, given: int, milliseconds: int) -> Rates:
    seconds = max(1, lately.milliseconds) / 1000
    counts = lately.counts
    return Rates(
        round(counts.from_peers_bytes / seconds, 1),
        round(counts.from_origin_bytes / seconds, 1),
        round(given / (max(1, milliseconds) / 1000), 1),
    )


def _answers(name: str, accounts: Mapping[str, Account]) -> Answers:
    """What the others say of it. What few of them say, as one behind a slow line does of all, is not the median."""
    seen = {of: row for of, account in accounts.items() if of != name for row in account.peers if row.node == name}
    timed = [row for row in seen.values() if row.lately >= ENOUGH_ANSWERS]
    timed = timed or [row for row in seen.values() if row.lately]
    failing = max(seen.values(), key=_failing, default=None)
    return Answers(
        p50=median_low(row.p50 for row in timed) / 1e6 if timed else None,
        p99=median_low(row.p99 for row in timed) / 1e6 if timed else None,
        seen_by=len(timed),
        objects=sum(row.objects for row in seen.values()),
        overtaken=sum(row.late for row in seen.values()),
        failures=sum(row.failures for row in seen.values()),
        wrong=sum(row.wrong for row in seen.values()),
        left_alone_by=sorted(of for of, row in seen.items() if row.state != "closed"),
        last_failure=failing.last_failure if failing is not None else "",
    )


def _failing(row: Seen) -> tuple[bool, int]:
    return row.state != "closed", row.failures


def _view(account: Account, ours: list[str]) -> Differs:
    agrees = account.view.digest == view_of(ours).digest
    named = len(account.view.names) == account.view.count
    theirs = set(account.view.names) if named and not agrees else set(ours)
    return Differs(account.view.count, agrees, sorted(set(ours) - theirs), sorted(theirs - set(ours)))


def _datasets(accounts: Mapping[str, Account]) -> list[DatasetRow]:
    rows: dict[str, DatasetRow] = {}
    for name, account in sorted(accounts.items()):
        for each in account.datasets:
            row = rows.setdefault(each.dataset, DatasetRow(each.dataset, each.root, {}))
            row.snapshots.setdefault(each.snapshot, []).append(name)
    return sorted(rows.values(), key=lambda row: (row.root, row.dataset))

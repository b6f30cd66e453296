"""`cachefs cluster status`: ask every node, and show what they say of themselves and of each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import msgspec

from cachefs.cli.cluster_report import ClusterReport, NodeRow, Reads, report_of
from cachefs.cli.cluster_verdict import judged
from cachefs.cli.fetcher import ASK_SECONDS, running_fetcher
from cachefs.cli.output import count, printable, table
from cachefs.client import Connection
from cachefs.config import CacheConfig, format_size
from cachefs.errors import FetcherError

_MB = 1e6

_SINCE = ("node", "address", "share", "stored", "read", "from here", "from peers", "from origin", "given to peers")
_LATELY = ("node", "from peers", "MB/s", "from origin", "MB/s", "given", "MB/s", "answers take", "")


def gathered(config: CacheConfig) -> ClusterReport:
    """Raises FetcherError when this cache is in no cluster, or its fetcher does not answer."""
    # Asked first, so that nobody is kept waiting by one that is stopped, and none is started.
    if running_fetcher(config) is None:
        raise _in_none(config)
    with closing(Connection(replace(config, fetcher="require", deadline=ASK_SECONDS, size=None), None)) as connection:
        told = connection.survey()
    if told[-1]["me"] is None:
        raise _in_none(config)
    try:
        return judged(report_of(str(config.home), told))
    except (msgspec.ValidationError, KeyError) as error:
        raise FetcherError(f"cannot understand the fetcher ({error}); is it of another version?") from None


def _in_none(config: CacheConfig) -> FetcherError:
    return FetcherError(f"{config.home}: is in no cluster; `cachefs cluster serve` joins one")


def lines(report: ClusterReport) -> Iterator[str]:
    """All of it, fit for a terminal whatever other nodes said."""
    answering = sum(not node.why for node in report.nodes)
    yield printable(
        f"{report.me}: one of {count(len(report.nodes), 'node')}, of which {answering} answer; {report.home}"
    )
    if report.trouble:
        yield printable(f"the list of nodes may be out of date: {report.trouble}")
    yield "since they joined:"
    yield from _table(_SINCE, map(_since, report.nodes))
    yield "in the last minute (MB/s: in the last 10 s, and in 60):"
    yield from _table(_LATELY, map(_lately, report.nodes))
    yield "counted are objects, and blocks of large ones; what the kernel has in its page cache it gives without a word"
    yield from map(printable, _views(report))
    yield from map(printable, _snapshots(report))
    yield printable(report.verdict)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Without the columns that have nothing in them."""
    cells = [headings, *([printable(cell) for cell in row] for row in rows)]
    filled = [any(row[column] for row in cells[1:]) for column in range(len(headings))]
    return table([[cell for cell, kept in zip(row, filled, strict=True) if kept] for row in cells])


def _since(node: NodeRow) -> Sequence[str]:
    share, address = f"{node.share:.1%}", node.address if node.address != node.name else ""
    if node.why or node.fetcher:
        return (node.name, address, share, "", "", "", "", "", "")
    reads = node.reads
    stored = "counting" if node.stored is None else format_size(node.stored)
    if node.capacity is not None:
        stored += f" of {format_size(node.capacity)}"
    peers = f"{_part(reads.peers, reads.read)}, {format_size(node.bytes.peers)}"
    origin = f"{_part(reads.read - reads.local - reads.peers, reads.read)}, {format_size(node.bytes.origin)}"
    if reads.for_peers:
        origin += f" with {reads.for_peers:,} for others"
    given = f"{reads.given:,}, {format_size(node.bytes.given)}"
    return (node.name, address, share, stored, f"{reads.read:,}", _part(reads.local, reads.read), peers, origin, given)


def _lately(node: NodeRow) -> Sequence[str]:
    if node.why or node.fetcher:
        return (node.name, "", "", "", "", "", "", _latency(node), "does not answer" if node.why else "no fetcher")
    reads, short, long = node.reads_60s, node.rates_10s, node.rates_60s
    state = "left alone by " + ", ".join(node.answers.left_alone_by) if node.answers.left_alone_by else ""
    return (
        node.name,
        f"{reads.peers:,}",
        f"{short.peers / _MB:.1f}, {long.peers / _MB:.1f}",
        _origin(reads),
        f"{short.origin / _MB:.1f}, {long.origin / _MB:.1f}",
        f"{reads.given:,}",
        f"{short.given / _MB:.1f}, {long.given / _MB:.1f}",
        _latency(node),
        state,
    )


def _origin(reads: Reads) -> str:
    """How many, and of these for other nodes."""
    return f"{reads.origin:,}" + (f" ({reads.for_peers:,} for others)" if reads.for_peers else "")


def _latency(node: NodeRow) -> str:
    answers = node.answers
    if answers.p50 is None or answers.p99 is None:
        return ""
    return f"{answers.p50 * 1e3:.1f} ms, p99 {answers.p99 * 1e3:.1f}"


def _part(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})" if total else f"{number:,}"


def _views(report: ClusterReport) -> Iterator[str]:
    for node in report.nodes:
        if node.calls_itself:
            yield f"node {node.name} calls itself {node.calls_itself}: its --name, or its list of nodes, is another"
        if node.trouble and node.name != report.me:
            yield f"node {node.name}: its list of nodes may be out of date: {node.trouble}"
        if not node.why and not node.view.agrees:
            lacks = f", without {_some(node.view.lacks)}" if node.view.lacks else ""
            adds = f", with {_some(node.view.adds)}" if node.view.adds else ""
            yield f"node {node.name} sees {count(node.view.nodes, 'node')}, this one {len(report.nodes)}{lacks}{adds}"


def _snapshots(report: ClusterReport) -> Iterator[str]:
    """Where all that have a dataset serve one snapshot of it, that; else who serves which."""
    for dataset in report.datasets:
        root = dataset.root or "(everything)"
        if len(dataset.snapshots) == 1:
            ((snapshot, names),) = dataset.snapshots.items()
            yield f"{root}: {_called(snapshot)} on {len(names)} of {len(report.nodes)} nodes"
            continue
        most = sorted(dataset.snapshots.items(), key=lambda item: (-len(item[1]), item[0]))
        yield f"{root}: nodes serve different snapshots: " + "; ".join(
            f"{_called(snapshot)} on {_some(names)}" for snapshot, names in most
        )


def _called(snapshot: str) -> str:
    return f"snapshot {snapshot[:12]}" if snapshot else "no catalog"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

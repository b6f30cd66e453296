"""What `cachefs cluster status` says of real nodes: it adds up, and names who does not answer and who sees others."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cachefs.cli.cluster import weight_of
from cachefs.cli.cluster_report import ClusterReport
from cachefs.cli.status import _stored_bytes
from cachefs.config import CacheConfig
from cachefs.fetcher.settings import remember_size
from cachefs_sidecar.testbed.nodes import flat
from tests.command_line import CommandLine, Outcome
from tests.nodes import Node, cluster, fill, slow_reads
from tests.test_cluster import origin_reads, read_all, versions

# A cluster may take two minutes to start (testbed/nodes).
pytestmark = pytest.mark.timeout(300)

COUNT = 60

SECONDS = 60.0

# What scripts may rely on. A key that goes or is renamed breaks them.
KEYS = {
    "": "me home trouble nodes datasets well verdict",
    "nodes": "name address weight share why fetcher trouble calls_itself age stored capacity reads reads_60s bytes "
    "rates_10s rates_60s answers view snapshots",
    "nodes.reads": "read local found asked stored peers origin for_peers given peer_failures origin_errors",
    "nodes.reads_60s": "read local found asked stored peers origin for_peers given peer_failures origin_errors",
    "nodes.bytes": "peers origin given",
    "nodes.rates_10s": "peers origin given",
    "nodes.rates_60s": "peers origin given",
    "nodes.answers": "p50 p99 seen_by objects overtaken failures wrong left_alone_by last_failure",
    "nodes.view": "nodes agrees lacks adds",
    "datasets": "dataset root snapshots",
}


@pytest.fixture
def objects(throttled):
    return fill(throttled, COUNT)


@pytest.fixture
def cachefs(capsys) -> CommandLine:
    return CommandLine(capsys)


def asked(cachefs: CommandLine, node: Node, until: Callable[[ClusterReport], object]) -> ClusterReport:
    """The first report of which `until` holds: on a machine that is busy a node that is well may take its two seconds,
    and it has counted what it gave a moment after others have received it."""
    deadline = time.monotonic() + SECONDS
    while True:
        outcome = cachefs("cluster", "status", "--json", "--cache-dir", node.home)
        report = msgspec.json.decode(outcome.out, type=ClusterReport)
        assert outcome.code == (0 if report.well else 1), outcome
        if until(report):
            return report
        assert time.monotonic() < deadline, outcome
        time.sleep(0.1)


def well(report: ClusterReport) -> bool:
    return report.well


def shown(cachefs: CommandLine, node: Node, *words: str) -> Outcome:
    """As people see it, as soon as these words are in it."""
    deadline = time.monotonic() + SECONDS
    while True:
        outcome = cachefs("cluster", "status", "--cache-dir", node.home)
        assert "\x1b" not in outcome.said
        if all(word in outcome.out for word in words):
            return outcome
        assert time.monotonic() < deadline, outcome


def sums(report: ClusterReport) -> tuple[int, int]:
    """(given, received) in bytes."""
    return sum(n.bytes.given for n in report.nodes), sum(n.bytes.peers for n in report.nodes)


@pytest.mark.slow
def test_what_one_gave_another_received_and_nothing_is_counted_twice(throttled, objects, tmp_path, cachefs):
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with cluster(folder, throttled, 3, size=1 << 30) as nodes:
            known = versions(nodes[0], objects)
            for node in nodes:
                read_all(node, objects, known, sorted(objects))
            from_origin = origin_reads(throttled)
            if not slow_reads(nodes):  # else some may have been read twice, and then not all adds up
                assert_it_adds_up(cachefs, nodes, objects, from_origin)
                return
    pytest.fail("the machine was too slow for this test")


def assert_it_adds_up(cachefs: CommandLine, nodes: list[Node], objects: dict[str, bytes], from_origin: int) -> None:
    report = asked(cachefs, nodes[1], lambda report: report.well and len(set(sums(report))) == 1)
    given, _ = sums(report)
    assert given + sum(n.bytes.origin for n in report.nodes) == 3 * sum(map(len, objects.values()))
    assert sum(n.reads.origin for n in report.nodes) == from_origin == COUNT
    assert sum(n.reads.peers for n in report.nodes) == 2 * COUNT
    for row, node in zip(sorted(report.nodes, key=lambda row: row.name), sorted(nodes, key=str_of), strict=True):
        assert (row.name, row.address, row.why, row.fetcher) == (node.name, node.name, "", "")
        # What the others saw come from it is what it gave.
        assert row.answers.objects == row.reads.given
        assert row.reads.asked == row.reads.read == COUNT
        assert row.reads.local == COUNT - row.reads.peers - row.reads.origin + row.reads.for_peers
        assert row.reads.peers + row.reads.origin - row.reads.for_peers + row.reads.stored >= COUNT
        assert row.stored == _stored_bytes(node.home)
        assert row.capacity == 1 << 30
        assert row.reads_60s.peers <= row.reads.peers
        assert row.view.agrees
        assert row.view.nodes == 3
    assert sum(row.share for row in report.nodes) == pytest.approx(1)
    assert report.well
    assert "all 3 nodes answer" in report.verdict
    (dataset,) = report.datasets
    assert [sorted(names) for names in dataset.snapshots.values()] == [sorted(node.name for node in nodes)]
    assert_keys(cachefs("cluster", "status", "--json", "--cache-dir", nodes[0].home).json)
    said = shown(cachefs, nodes[2], *(node.name for node in nodes), "all 3 nodes answer").ok().out
    assert "secret" not in said


def str_of(node: Node) -> str:
    return node.name


def assert_keys(document) -> None:
    for where, names in KEYS.items():
        found = document
        for step in where.split(".") if where else ():
            found = found[step]
            found = found[0] if isinstance(found, list) else found
        assert set(found) == set(names.split()), where


@pytest.mark.slow
def test_who_does_not_answer_is_named_and_keeps_nobody_waiting(throttled, objects, tmp_path, cachefs):
    with cluster(tmp_path, throttled, 3) as nodes:
        one, two, three = nodes
        assert two.process is not None
        fetcher, server = two.status()["pid"], two.process.pid
        with stopped(fetcher):
            report = asked(cachefs, one, lambda report: mute(report) == {two.name})
            assert f"node {two.name} answers, but not its fetcher: the fetcher does not answer in" in report.verdict
            assert not report.well
        with stopped(fetcher, server):
            report = asked(cachefs, one, lambda report: absent(report) == {two.name})
            (silent,) = (row for row in report.nodes if row.why)
            assert "in 2 s" in silent.why
            assert f"node {two.name} does not answer: {silent.why}" in report.verdict
            said = shown(cachefs, one, f"node {two.name} does not answer: {silent.why}")
            assert said.code == 1
        asked(cachefs, one, well)
        three.kill()
        report = asked(cachefs, one, lambda report: absent(report) == {three.name})
        assert f"node {three.name} does not answer: " in report.verdict


def absent(report: ClusterReport) -> set[str]:
    return {row.name for row in report.nodes if row.why}


def mute(report: ClusterReport) -> set[str]:
    return {row.name for row in report.nodes if row.fetcher}


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_nodes_that_see_other_nodes_and_other_snapshots_are_named(throttled, objects, tmp_path, cachefs):
    with cluster(tmp_path, throttled, 2) as nodes:
        one, two = nodes
        two.leave()
        two.serve(f"static:{two.name}", ["--secret", str(tmp_path / "secret")])
        two.wait_for(1)
        for node in nodes:
            origin = [f"--origin-option={key}={value}" for key, value in flat(node.options)]
            cachefs("warm", f"s3://{throttled.name}", "--cache-dir", node.home, "--min-free", "0", *origin).ok()
        throttled.put("set/more.jpg", b"more")
        two.connection.make_catalog(refresh=True)  # tells nobody, for it sees nobody
        report = asked(cachefs, one, well)
        (view,) = (row.view for row in report.nodes if row.name == two.name)
        assert (view.nodes, view.agrees, view.lacks, view.adds) == (1, False, [one.name], [])
        (dataset,) = report.datasets
        assert sorted(dataset.snapshots.values()) == sorted([[one.name], [two.name]])
        sees = f"node {two.name} sees 1 node, this one 2, without {one.name}"
        shown(cachefs, one, sees, f"{throttled.name}: nodes serve different snapshots: ").ok()


@pytest.mark.slow
def test_a_cluster_of_many_nodes_can_be_shown(throttled, tmp_path, cachefs):
    """More than one packet has room for, none of which is there."""
    others = 1_500
    with cluster(tmp_path, throttled, 1) as (node,):
        node.leave()
        names = ",".join(f"127.{n // 250}.{n % 250 + 1}.9:9" for n in range(others))
        node.serve(f"static:{node.name},{names}", ["--secret", str(tmp_path / "secret")])
        node.wait_for(1 + others)
        report = asked(cachefs, node, lambda report: [row.name for row in report.nodes if not row.why] == [node.name])
        assert len(report.nodes) == 1 + others
        assert "1,495 more do not answer" in report.verdict


def test_the_weight_of_a_node_is_that_of_its_cache_also_after_a_restart_without_its_size(tmp_path):
    (tmp_path / "cache").mkdir()
    remember_size(tmp_path / "cache", 12_345_678)
    assert weight_of(CacheConfig.make(tmp_path / "cache")) == 12_345_678
    assert weight_of(CacheConfig.make(tmp_path / "cache", size=1_000_000)) == 1_000_000


def test_a_cache_in_no_cluster_says_so(bucket, cache_dir: Path, cachefs):
    cachefs("cluster", "status", "--cache-dir", cache_dir.parent).failed(4, "is in no cluster", "cluster serve")

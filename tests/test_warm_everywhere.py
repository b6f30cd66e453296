"""`cachefs warm --all-nodes`: each machine its share, and all of it whoever dies. Here they are addresses of one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.batch import dask_engine, everywhere
from cachefs.batch.everywhere import Share, warm_everywhere
from cachefs.batch.reach import Reach
from cachefs.batch.tasks import Answer, Met, Parcel, Warmed, WarmObjects, unpack
from cachefs.errors import FetcherError
from cachefs_sidecar.testbed import S3Server, stop_fetcher
from tests.command_line import CommandLine, credentials, s3
from tests.conftest import ThrottledBucket
from tests.dask_cluster import DaskHosts
from tests.nodes import cluster, slow_reads

OBJECTS = 60
HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")


@pytest.fixture
def hosts(s3_server: S3Server, tmp_path: Path, cache_dir: Path) -> Iterator[DaskHosts]:
    environ = {host: {**credentials(s3_server.options), "CACHEFS_DIR": str(tmp_path / host)} for host in HOSTS}
    with DaskHosts(environ) as started:
        yield started
    for host in HOSTS:
        stop_fetcher(tmp_path / host)


@pytest.fixture
def photos(throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch) -> ThrottledBucket:
    for number in range(OBJECTS):
        throttled.put(f"set/c{number % 7}/{number:02d}.jpg", b"%d" % number * 100)
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    return throttled


def blobs(home: Path) -> int:
    return sum(1 for file in home.glob("blobs/*/*") if file.suffix != ".blocks")


def test_each_machine_its_share(cachefs: CommandLine, photos: ThrottledBucket, hosts: DaskHosts, tmp_path: Path):
    url = f"{photos.url}/set"
    scheduler = ("--scheduler", hosts.address)
    done = cachefs("warm", url, "--all-nodes", *scheduler, *s3(photos.options), "--json").ok().json
    assert (done["objects"], done["failed"]) == (OBJECTS, 0)
    shares = {node["host"]: node["objects"] for node in done["nodes"]}
    assert set(shares) == set(HOSTS)
    assert sum(shares.values()) == OBJECTS
    assert min(shares.values()) > 0
    assert {host: blobs(tmp_path / host) for host in HOSTS} == shares
    assert set(photos.reads.values()) == {1}
    assert len(photos.reads) == OBJECTS
    # What is there is not read again.
    cachefs("warm", url, "--all-nodes", *scheduler, *s3(photos.options)).ok()
    assert set(photos.reads.values()) == {1}
    # A reader of a machine's cache, which lists for itself, has its share at hand.
    cachefs("warm", url, *s3(photos.options), "-d", tmp_path / HOSTS[0]).ok()
    assert sum(photos.reads.values()) == OBJECTS + OBJECTS - shares[HOSTS[0]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_cluster_of_caches_each_node_gets_what_it_owns(
    cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with cluster(tmp_path, photos, len(HOSTS)) as nodes:
        environ = {
            host: {**credentials(photos.options), "CACHEFS_DIR": str(node.home)}
            for host, node in zip(HOSTS, nodes, strict=True)
        }
        with DaskHosts(environ) as hosts:
            scheduler = ("--scheduler", hosts.address)
            warm = ("warm", f"{photos.url}/set", "--all-nodes", *scheduler, *s3(photos.options), "--json")
            monkeypatch.setenv("CACHEFS_DIR", str(nodes[0].home))  # with --cache-dir it would be that of all machines
            done = cachefs(*warm).ok().json
            assert (done["objects"], done["failed"]) == (OBJECTS, 0)
            assert {row["node"] for row in done["nodes"]} == {node.name for node in nodes}
        shares = {row["node"]: row["objects"] for row in done["nodes"]}
        assert {node.name: blobs(node.home) for node in nodes} == shares
        assert len(photos.reads) == OBJECTS
        # Each from the node that owns it: nothing came from a peer, and nothing twice.
        assert set(photos.reads.values()) == {1}
        assert [node.counters()["peer_reads"] for node in nodes] == [0, 0, 0]
        known = {entry.path: entry for entry in nodes[1].connection.entries(f"{photos.name}/set", recursive=True)}
        for path, entry in known.items():
            nodes[1].read(path, entry.version, entry.size)
        slow = len(slow_reads(nodes))
        assert OBJECTS <= sum(photos.reads.values()) <= OBJECTS + 2 * slow
        others = OBJECTS - shares[nodes[1].name]
        assert others - slow <= nodes[1].counters()["peer_reads"] <= others


def test_a_machine_that_is_killed(
    cachefs: CommandLine, photos: ThrottledBucket, hosts: DaskHosts, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dask_engine, "LOOK_SECONDS", 0.2)
    photos.throttle.delay(8.0, "*.jpg")  # nobody is done before one is killed

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not photos.reads and time.monotonic() < deadline:
            time.sleep(0.01)
        hosts.workers[HOSTS[0]].kill()
        photos.throttle.heal()
        photos.throttle.let_pass()

    killer = threading.Thread(target=kill)
    killer.start()
    scheduler = ("--scheduler", hosts.address)
    done = cachefs("warm", f"{photos.url}/set", "--all-nodes", *scheduler, *s3(photos.options), "--json").ok().json
    killer.join()
    assert (done["objects"], done["failed"]) == (OBJECTS, 0)
    assert {node["host"]: bool(node["gone"]) for node in done["nodes"]} == dict.fromkeys(HOSTS, False) | {
        HOSTS[0]: True
    }
    assert max(photos.reads.values()) <= 2
    assert len(photos.reads) == OBJECTS


def test_what_does_not_go_together(cachefs: CommandLine, photos: ThrottledBucket):
    url = f"{photos.url}/set"
    cachefs("warm", url, "--all-nodes").failed(2, "--scheduler")
    for more in (("--pin",), ("--size", "1G"), ("--list", "x")):
        cachefs("warm", url, "--all-nodes", "--scheduler", "tcp://127.0.0.1:1", *more).failed(2, more[0])


# --- whoever dies: a cluster in memory, whose machines come and go when the test says ---


class Simulated:
    """Machines that warm at once, unless they hang or are gone."""

    slots = 100

    def __init__(self, names: str, nodes: dict[str, str] | None = None) -> None:
        self.there = set(names)
        self.hangs: set[str] = set()
        self.nodes = nodes or {}
        self.warmed: dict[str, str] = {}
        self.tasks: Counter[str] = Counter()

    @property
    def workers(self) -> int:
        return len(self.there)

    def hosts(self) -> frozenset[str]:
        return frozenset(self.there)

    async def run(self, parcel: Parcel, workers: tuple[str, ...] = ()) -> Answer:
        (host,) = workers
        task = unpack(parcel.data)
        if not isinstance(task, WarmObjects):
            return Met(self.nodes.get(host, ""), [(name, 1) for name in self.nodes.values()], f"/{host}")
        self.tasks[host] += 1
        while host in self.hangs or host not in self.there:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        self.warmed.update((path, host) for path, _, _ in task.objects)
        return Warmed(len(task.objects), sum(size for *_, size in task.objects), [])


SHARE = Share(Reach("s3", "s3", {}, {}), "b", [], "")
MANY = [(f"b/{number}", "v", 10) for number in range(30_000)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everywhere, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(everywhere, "LOOK_SECONDS", 0.01)


async def test_a_machine_that_goes_is_replaced():
    machines = Simulated("abc")
    machines.hangs = {"b"}
    task = asyncio.create_task(warm_everywhere(machines, SHARE, MANY, len(MANY)))
    async with asyncio.timeout(30):
        while not machines.tasks["b"]:
            await asyncio.sleep(0.01)
        machines.there.discard("b")
        done = await task
    assert (done.objects, done.failures) == (len(MANY), 0)
    assert set(machines.warmed.values()) == {"a", "c"}
    assert len(machines.warmed) == len(MANY)
    assert [host.host for host in done.hosts if host.gone] == ["b"]


async def test_when_all_are_gone_the_rest_is_named():
    machines = Simulated("ab")
    machines.hangs = {"a", "b"}
    task = asyncio.create_task(warm_everywhere(machines, SHARE, MANY, len(MANY)))
    async with asyncio.timeout(30):
        while not machines.tasks:
            await asyncio.sleep(0.01)
        machines.there.clear()
        done = await task
    assert (done.objects, done.failures) == (0, len(MANY))
    assert "no machine is left" in done.failed[0][2]


async def test_a_machine_whose_worker_is_restarted_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(everywhere, "GONE_SECONDS", 3600)
    machines = Simulated("ab")
    machines.hangs = {"a"}
    task = asyncio.create_task(warm_everywhere(machines, SHARE, MANY, len(MANY)))
    async with asyncio.timeout(30):
        while not machines.tasks["a"]:
            await asyncio.sleep(0.01)
        machines.there.discard("a")
        machines.hangs.clear()
        await asyncio.sleep(0.05)  # long enough to be seen missing
        machines.there.add("a")
        done = await task
    assert done.failures == 0
    assert not any(host.gone for host in done.hosts)
    assert set(machines.warmed.values()) == {"a", "b"}


async def test_owners_are_those_of_the_cluster_that_all_are_nodes_of():
    from cachefs.cluster.nodes import Node
    from cachefs.cluster.placement import Placement, object_key

    nodes = {"a": "gpu1", "b": "gpu2"}
    machines = Simulated("ab", nodes)
    done = await warm_everywhere(machines, SHARE, MANY[:3000], 3000)
    assert [host.node for host in done.hosts] == ["gpu1", "gpu2"]
    placement = Placement(Node(name, "", 0) for name in nodes.values())
    for path, version, _ in MANY[:3000]:
        assert nodes[machines.warmed[path]] == placement.owner(object_key("s3", path, version)).name


async def test_a_failure_of_one_task_is_named_and_the_rest_goes_on():
    class Failing(Simulated):
        async def run(self, parcel: Parcel, workers: tuple[str, ...] = ()) -> Answer:
            if "objects 1 to" in parcel.label:
                raise FetcherError("the workers that had it died")
            return await super().run(parcel, workers)

    done = await warm_everywhere(Failing("ab"), SHARE, MANY, len(MANY))
    assert done.failures == 1000
    assert done.objects == len(MANY) - 1000

"""Who is there, asked of the real thing: Debian's etcd and dnsmasq, lightkube over HTTP, files, Slurm's notation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from etcd3gw.watch import Watcher
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cluster import membership as membership_module
from cachefs.cluster import settling as settling_module
from cachefs.cluster.membership import Membership, open_members
from cachefs.cluster.nodes import Node
from cachefs.cluster.sources import dns as dns_module
from cachefs.cluster.sources import etcd as etcd_module
from cachefs.cluster.sources import kubernetes as kubernetes_module
from cachefs.cluster.sources import open_source
from cachefs.cluster.sources import static as static_module
from cachefs.cluster.sources.slurm import MOST, expand
from cachefs.errors import ConfigError
from cachefs_sidecar.testbed.ports import reserved_ports
from tests.cluster_servers import Dnsmasq, Etcd, KubernetesAPI, endpoint

ME = Node("me", "192.0.2.250", 7070, 1 << 30)

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="needs etcd (Debian: etcd-server)")
needs_dnsmasq = pytest.mark.skipif(
    shutil.which("dnsmasq", path=os.environ.get("PATH", "") + ":/usr/sbin") is None,
    reason="needs dnsmasq (Debian: dnsmasq-base)",
)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAVE", "JOIN", "APART"):
        monkeypatch.setattr(settling_module, name, 0.0)
    monkeypatch.setattr(membership_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(membership_module, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(static_module, "LOOK", 0.02)
    monkeypatch.setattr(dns_module, "LOOK", 0.05)
    monkeypatch.setattr(dns_module, "DEADLINE", 1.0)


@contextlib.asynccontextmanager
async def following(url: str, me: Node = ME) -> AsyncIterator[Membership]:
    members = open_members(url, me)
    assert isinstance(members, Membership)
    async with members:
        yield members


async def until(members: Membership, *names: str) -> None:
    assert await members.heard(40), members.trouble
    try:
        async with asyncio.timeout(40), contextlib.aclosing(members.changes()) as changes:
            async for view in changes:
                if {node.name for node in view} == set(names):
                    return
    except TimeoutError:
        pytest.fail(f"the view stays at {members.view}, trouble {members.trouble!r}; expected {names}")


async def until_true(what: Any) -> None:
    async with asyncio.timeout(40):
        while not what():
            await asyncio.sleep(0.02)


# --- the URL


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("statik:a:1", "did you mean static:"),
        ("gossip://a", "no such source"),
        ("static", "did you mean|no such source|names no node"),
        ("static:", "names no node"),
        ("static:a:7070,b:0", "not a port"),
        ("static:a:7070=1T,b:7070", "every node, or to none"),
        ("static:a:7070=1T,a:7070=2T", "named twice"),
        ("static:a:7070=large", "size"),
        ("dns:svc", "write dns://"),
        ("dns://svc/x", "write dns://"),
        ("dns://svc:7070?sever=1.1.1.1", "sever is no option"),
        ("k8s://namespace", "write k8s://"),
        ("k8s://namespace/service?name=x", "write k8s://"),
        ("etcd:host", "write etcd://"),
        ("etcd://host:2379/p?cert=x", "write etcd://"),
        ("etcd://host:2379/p?ttl=0", "write etcd://"),
        ("slurm:x", "write host:port"),
    ],
)
def test_a_url_that_cannot_be_used_says_how_it_is_written(url: str, says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a")
    with pytest.raises(ConfigError, match=says):
        open_source(url, ME)


def test_a_missing_extra_is_named():
    program = (
        "import sys; sys.modules['etcd3gw'] = None\n"
        "from cachefs.cluster.nodes import Node\n"
        "from cachefs.cluster.sources import open_source\n"
        "try: open_source('etcd://h:1/p', Node('n', 'h', 1))\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "cachefs-sidecar[etcd]" in said


# --- static


async def test_a_list_is_who_is_there():
    async with following("static:a:7070,b:7071=2T,[::1]:7070=1.5T".replace("a:7070", "a:7070=1T")) as members:
        await until(members, "a:7070", "b:7071", "::1:7070")
        weights = {node.host: node.weight for node in members.view}
        assert weights == {"a": 1 << 40, "b": 2 << 40, "::1": 3 << 39}


async def test_a_file_is_read_again_when_it_changes_and_a_bad_one_leaves_the_last(tmp_path: Path):
    file = tmp_path / "nodes"
    file.write_text("# the rack\na:7070\n\nb:7070  # new\n")
    async with following(f"static:{file}") as members:
        await until(members, "a:7070", "b:7070")
        for broken in ("a:7070\nb:what\n", "\xff", ""):
            file.write_bytes(broken.encode("latin-1"))
            await until_true(lambda: members.trouble)
            assert {node.name for node in members.view} == {"a:7070", "b:7070"}
            file.write_text("b:7070\na:7070\n")
            await until_true(lambda: not members.trouble)
        file.unlink()
        await until_true(lambda: "nodes" in members.trouble)
        replacement = tmp_path / "new"
        replacement.write_text("c:7070\n")
        replacement.rename(file)
        await until(members, "c:7070")
        assert members.trouble == ""


# --- Slurm


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", "login"),
        ("gpu[001-003,07],login", "gpu001 gpu002 gpu003 gpu07 login"),
        ("rack[1-2]n[0-1]", "rack1n0 rack1n1 rack2n0 rack2n1"),
        ("n[09-11]-ib", "n09-ib n10-ib n11-ib"),
        ("a,b,a", "a b"),
        ("n[1]", "n1"),
        ("dgx-[98-101]", "dgx-98 dgx-99 dgx-100 dgx-101"),
        ("", ""),
    ],
)
def test_a_node_list_is_expanded_as_slurm_does(text: str, hosts: str):
    assert expand(text) == hosts.split()


@pytest.mark.parametrize(
    "text",
    ["a[", "a]", "a[]", "a[1-]", "a[3-1]", "a[x]", "a,,b", "a,", ",a", "a b", "a[1,]", "n[0-999999999]", "a[[1]]"],
)
def test_what_is_no_node_list_is_refused(text: str):
    with pytest.raises(ConfigError, match="Slurm"):
        expand(text)


def test_a_short_list_of_very_many_is_refused_before_it_is_made():
    for text in ("n" + "[0-9999]" * 5, ",".join(["n[0-9999]"] * 7)):
        with pytest.raises(ConfigError, match=str(MOST)):
            expand(text)


numbers = st.tuples(st.integers(0, 5000), st.integers(0, 40), st.integers(1, 6))
pieces = st.one_of(st.from_regex(r"[a-z][a-z0-9.\-]{0,5}", fullmatch=True), st.lists(numbers, min_size=1, max_size=3))


@given(st.lists(st.lists(pieces, min_size=1, max_size=3), max_size=4))
def test_every_list_that_can_be_written_means_what_it_says(items: list[list[str | list[tuple[int, int, int]]]]):
    written, meant = [], []
    for item in items:
        text, hosts = "", [""]
        for piece in item:
            if isinstance(piece, str):
                text, hosts = text + piece, [host + piece for host in hosts]
                continue
            ranges = [(str(first).zfill(width), str(first + more).zfill(width)) for first, more, width in piece]
            text += f"[{','.join(low if low == high else f'{low}-{high}' for low, high in ranges)}]"
            many = [str(n).zfill(len(low)) for low, high in ranges for n in range(int(low), int(high) + 1)]
            hosts = [host + number for host in hosts for number in many]
        written.append(text)
        meant += hosts
    if len(meant) > MOST:
        with pytest.raises(ConfigError):
            expand(",".join(written))
        return
    assert expand(",".join(written)) == list(dict.fromkeys(meant))


@given(st.text(alphabet="ab019[]-, ", max_size=25) | st.text(max_size=25))
def test_no_text_makes_the_expansion_fail_in_another_way(text: str):
    with contextlib.suppress(ConfigError):
        assert all(isinstance(host, str) and host for host in expand(text))


async def test_a_job_knows_its_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    monkeypatch.setenv("PATH", "/nonexistent")
    async with following("slurm:9090") as members:
        await until(members, "gpu1", "gpu2")
        assert {node.address for node in members.view} == {"gpu1:9090", "gpu2:9090"}


async def test_scontrol_is_asked_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[1-2]" ] && printf "gpu1\\ngpu2\\nfrom-scontrol\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with following("slurm:") as members:
        await until(members, "gpu1", "gpu2", "from-scontrol")


async def test_a_scontrol_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho garbage\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with following("slurm:") as members:
        await until(members, "gpu1", "gpu2")


def test_outside_a_job_slurm_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.delenv("SLURM_NODELIST", raising=False)
    with pytest.raises(ConfigError, match="not inside a job"):
        open_source("slurm:", ME)


# --- DNS


@pytest.fixture
def dnsmasq(tmp_path: Path) -> Iterator[Dnsmasq]:
    server = Dnsmasq(tmp_path)
    yield server
    server.stop()


@needs_dnsmasq
async def test_addresses_of_a_headless_service_come_and_go(dnsmasq: Dnsmasq):
    dnsmasq.say(hosts=["192.0.2.1", "192.0.2.2"])
    async with following(f"dns://nodes.cluster.test:7070?server=127.0.0.1:{dnsmasq.port}") as members:
        await until(members, "192.0.2.1:7070", "192.0.2.2:7070")
        dnsmasq.say(hosts=["192.0.2.2", "192.0.2.3", "192.0.2.4"])
        await until(members, "192.0.2.2:7070", "192.0.2.3:7070", "192.0.2.4:7070")
        dnsmasq.say()  # NXDOMAIN: a service without endpoints, or a name server that has just started
        await until_true(lambda: "names none" in members.trouble)
        assert len(members.view) == 3
        dnsmasq.stop()
        await until_true(lambda: "DNS" in members.trouble)
        assert len(members.view) == 3
        dnsmasq.say(hosts=["192.0.2.3"])
        await until(members, "192.0.2.3:7070")
        await until_true(lambda: not members.trouble)  # it may have had no answer in time since


@needs_dnsmasq
async def test_a_name_server_that_hangs_leaves_the_view(dnsmasq: Dnsmasq):
    dnsmasq.say(hosts=["192.0.2.1", "192.0.2.2"])
    async with following(f"dns://nodes.cluster.test:7070?server=127.0.0.1:{dnsmasq.port}") as members:
        await until(members, "192.0.2.1:7070", "192.0.2.2:7070")
        dnsmasq.signal(signal.SIGSTOP)
        await until_true(lambda: "DNS" in members.trouble)
        assert len(members.view) == 2
        dnsmasq.signal(signal.SIGCONT)
        await until_true(lambda: not members.trouble)


@needs_dnsmasq
async def test_a_host_with_both_kinds_of_address_counts_once(dnsmasq: Dnsmasq):
    dnsmasq.say(hosts=["192.0.2.1,2001:db8::1"])
    async with following(f"dns://nodes.cluster.test?server=127.0.0.1:{dnsmasq.port}") as members:
        await until(members, "192.0.2.1:7070")
        dnsmasq.say(hosts=["2001:db8::1"])
        await until(members, "[2001:db8::1]:7070")


@needs_dnsmasq
async def test_more_nodes_than_a_datagram_holds(dnsmasq: Dnsmasq):
    hosts = [f"192.0.2.{number}" for number in range(1, 251)]
    dnsmasq.say(hosts=hosts)
    async with following(f"dns://nodes.cluster.test:7070?server=127.0.0.1:{dnsmasq.port}") as members:
        await until(members, *(f"{host}:7070" for host in hosts))


@needs_dnsmasq
async def test_service_records_say_names_and_ports(dnsmasq: Dnsmasq):
    dnsmasq.say(services=[("pod-0.cluster.test", 7071), ("pod-1.cluster.test", 7072)])
    async with following(f"dns+srv://_peers._tcp.cluster.test?server=127.0.0.1:{dnsmasq.port}") as members:
        await until(members, "pod-0.cluster.test", "pod-1.cluster.test")
        assert sorted(node.port for node in members.view) == [7071, 7072]


# --- Kubernetes


@pytest.fixture
async def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubernetesAPI]:
    config = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(config))
    async with KubernetesAPI("training", config) as api:
        yield api


async def test_ready_endpoints_of_a_service_come_and_go(kubernetes: KubernetesAPI):
    kubernetes.put("peers-1", [endpoint("p1", "10.0.0.1", machine="m1"), endpoint("p2", "10.0.0.2", machine="m2")])
    kubernetes.put("other-1", [endpoint("x", "10.0.0.9")], service="other")
    async with following("k8s://training/peers") as members:
        await until(members, "m1", "m2")
        kubernetes.put("peers-2", [endpoint("p3", "10.0.0.3", machine="m3", ready=None)])
        await until(members, "m1", "m2", "m3")
        not_ready = endpoint("p1", "10.0.0.1", machine="m1", ready=False)
        kubernetes.put("peers-1", [not_ready, endpoint("p2", "10.0.0.2", machine="m2")])
        await until(members, "m2", "m3")
        kubernetes.delete("peers-2")
        await until(members, "m2")
        kubernetes.put("peers-1", [endpoint("p9", "10.0.0.77", machine="m2")])  # a new pod on the same machine
        await until_true(lambda: {node.address for node in members.view} == {"10.0.0.77:7070"})
        assert {node.name for node in members.view} == {"m2"}
        assert kubernetes.lists == kubernetes.watches == 1


async def test_pods_and_ports_are_chosen_by_name_and_one_pod_counts_once(kubernetes: KubernetesAPI):
    ports = [{"name": "metrics", "port": 9}, {"name": "peers", "port": 7171}]
    kubernetes.put("six", [endpoint("p1", "2001:db8::1", machine="m1")], kind="IPv6", ports=ports)
    pods = [endpoint("p1", "10.0.0.1", machine="m1"), endpoint("p2", "10.0.0.2", machine="m1")]
    kubernetes.put("four", pods, ports=ports)
    async with following("k8s://training/peers?name=pod&port=peers") as members:
        await until(members, "p1", "p2")
        assert {node.address for node in members.view} == {"10.0.0.1:7171", "10.0.0.2:7171"}


async def test_a_watch_that_is_cut_or_too_old_is_begun_anew(kubernetes: KubernetesAPI):
    kubernetes.put("peers-1", [endpoint("p1", "10.0.0.1")])
    async with following("k8s://training/peers") as members:
        await until(members, "p1")
        await until_true(lambda: kubernetes.watches == 1)
        kubernetes.cut()
        await until_true(lambda: kubernetes.watches == 2)
        kubernetes.refuse = 410
        kubernetes.cut()
        await until_true(lambda: members.trouble)
        kubernetes.put("peers-1", [endpoint("p1", "10.0.0.1"), endpoint("p2", "10.0.0.2")])
        kubernetes.forget()
        kubernetes.refuse = 0
        await until(members, "p1", "p2")


async def test_a_watch_that_says_nothing_is_replaced_in_time(kubernetes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kubernetes_module, "RELIST", 0.3)
    kubernetes.put("peers-1", [endpoint("p1", "10.0.0.1")])
    async with following("k8s://training/peers") as members:
        await until_true(lambda: kubernetes.lists >= 3)
        assert members.trouble == ""


async def test_an_api_server_that_refuses_leaves_the_view(kubernetes: KubernetesAPI):
    kubernetes.put("peers-1", [endpoint("p1", "10.0.0.1")])
    async with following("k8s://training/peers") as members:
        await until(members, "p1")
        await until_true(lambda: kubernetes.watches)
        kubernetes.refuse = 403
        kubernetes.cut()
        await until_true(lambda: "training/peers" in members.trouble and "refused" in members.trouble)
        assert {node.name for node in members.view} == {"p1"}
        assert "secret-of-the-test" not in members.trouble
        kubernetes.refuse = 0
        await until_true(lambda: not members.trouble)


async def test_without_a_cluster_around_it_kubernetes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    async with following("k8s://training/peers") as members:
        await until_true(lambda: "Kubernetes" in members.trouble)
        assert members.view == {ME}


# --- etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with reserved_ports(2) as ports:
        server = Etcd(tmp_path / "etcd", *ports)
        try:
            server.start()
            yield server
        finally:
            server.stop()


MEMBER = """
import asyncio, sys
from cachefs.cluster.membership import open_members
from cachefs.cluster.nodes import Node

async def stay():
    async with open_members(sys.argv[1], Node(sys.argv[2], "127.0.0.1", 7070, 5)) as members:
        await asyncio.Event().wait()

asyncio.run(stay())
"""


def etcd_url(server: Etcd, ttl: int = 2) -> str:
    return f"etcd://127.0.0.1:{server.port}/nodes?ttl={ttl}"


@needs_etcd
async def test_members_come_and_go_and_one_that_is_killed_is_gone_with_its_lease(etcd: Etcd):
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        assert members.view == {ME}  # with its weight
        async with following(etcd_url(etcd), Node("second", "192.0.2.2", 7070, 7)) as other:
            await until(members, "me", "second")
            await until(other, "me", "second")
            third = subprocess.Popen([sys.executable, "-c", MEMBER, etcd_url(etcd), "third"])
            try:
                await until(members, "me", "second", "third")
            finally:
                third.send_signal(signal.SIGKILL)
                third.wait()
            await until(members, "me", "second")
            await until(other, "me", "second")
        await until(members, "me")  # the second left in order


@needs_etcd
async def test_a_node_that_leaves_in_order_is_gone_before_its_lease_is(etcd: Etcd):
    async with following(etcd_url(etcd, ttl=3600)) as members:
        async with following(etcd_url(etcd, ttl=3600), Node("second", "192.0.2.2", 7070)):
            await until(members, "me", "second")
        await until(members, "me")


@needs_etcd
async def test_a_lease_that_ran_out_is_made_again(etcd: Etcd):
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        [lease] = etcd.leases()
        etcd.revoke(lease)
        await until_true(lambda: "nodes/me" in etcd.all_keys())
        assert lease not in etcd.leases()
        assert len(etcd.leases()) == 1
        await until(members, "me")


@needs_etcd
async def test_a_key_that_somebody_deleted_is_put_there_again(etcd: Etcd):
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        etcd.delete("nodes/me")
        await until_true(lambda: "nodes/me" in etcd.all_keys())
        await until_true(lambda: not members.trouble)
        assert members.view == {ME}


@needs_etcd
async def test_an_etcd_that_is_away_leaves_the_view_and_is_joined_again(etcd: Etcd):
    async with (
        following(etcd_url(etcd)) as members,
        following(etcd_url(etcd), Node("second", "192.0.2.2", 7070)) as other,
    ):
        await until(members, "me", "second")
        etcd.stop()
        await until_true(lambda: members.trouble and other.trouble)
        assert {node.name for node in members.view} == {"me", "second"}
        etcd.start()
        await until_true(lambda: not members.trouble and not other.trouble)
        await until(members, "me", "second")


@needs_etcd
async def test_an_etcd_that_hangs_leaves_the_view(etcd: Etcd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(etcd_module, "DEADLINE", 0.5)
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        etcd.signal(signal.SIGSTOP)
        try:
            await until_true(lambda: "etcd" in members.trouble)
            assert members.view == {ME}
        finally:
            etcd.signal(signal.SIGCONT)
        await until_true(lambda: not members.trouble)


@needs_etcd
async def test_the_next_etcd_is_asked_when_one_fails(etcd: Etcd):
    with reserved_ports(1) as (nobodys,):
        async with following(f"etcd://127.0.0.1:{nobodys},127.0.0.1:{etcd.port}/nodes?ttl=2") as members:
            await until_true(lambda: "nodes/me" in etcd.all_keys())
            await until(members, "me")


@needs_etcd
async def test_a_watch_that_died_costs_seconds(etcd: Etcd, monkeypatch: pytest.MonkeyPatch):
    class Deaf:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def stop(self) -> None:
            pass

    monkeypatch.setattr("cachefs.cluster.sources.etcd.Watcher", Deaf)
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        async with following(etcd_url(etcd), Node("second", "192.0.2.2", 7070)):
            await until(members, "me", "second")


@needs_etcd
async def test_a_watch_is_replaced_in_time(etcd: Etcd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(etcd_module, "WATCH", 0.2)
    watches = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        watches.append(1)
        return Watcher(*args, **kwargs)

    monkeypatch.setattr("cachefs.cluster.sources.etcd.Watcher", counting)
    async with following(etcd_url(etcd)) as members:
        await until(members, "me")
        await until_true(lambda: len(watches) >= 3)
        async with following(etcd_url(etcd), Node("second", "192.0.2.2", 7070)):
            await until(members, "me", "second")
        assert members.trouble == ""


@needs_etcd
async def test_what_is_no_node_under_the_prefix_is_ignored(etcd: Etcd):
    other = '{"name":"other","host":"h","port":7070,"weight":1}'
    etcd.put("nodes/garbage", "not json")
    etcd.put("nodes/wrong-name", other)
    etcd.put("nodes/bad", '{"name":"bad","host":"h","port":0}')
    etcd.put("nodes0", other.replace("other", "nodes0"))
    etcd.put("nodes/other", other)
    async with following(etcd_url(etcd)) as members:
        await until(members, "me", "other")

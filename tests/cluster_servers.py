"""What runs clusters, run here on loopback: etcd and dnsmasq as Debian has them, and as much of a Kubernetes API server
as EndpointSlices need (list and watch, over HTTP).
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from aiohttp import web
from etcd3gw.client import Etcd3Client
from etcd3gw.lease import Lease

STARTING_SECONDS = 60


def own_port() -> int:
    """For TCP and UDP, and not one of those that connections of others are given meanwhile (ip_local_port_range)."""
    for port in random.sample(range(10_000, 30_000), 100):
        with socket.socket(type=socket.SOCK_STREAM) as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            try:
                stream.bind(("127.0.0.1", port))
                datagrams.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


class _Program:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        self._process = subprocess.Popen(self.arguments(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + STARTING_SECONDS
        while not self.answers():
            assert self._process.poll() is None, f"{self.arguments()[0]} ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"{self.arguments()[0]} does not answer"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Etcd(_Program):
    """Keeps its data over stop and start."""

    def __init__(self, folder: Path, port: int, peer_port: int) -> None:
        super().__init__()
        self._folder = folder
        self.port, self._peer_port = port, peer_port

    def arguments(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self._peer_port}"
        return [
            shutil.which("etcd") or "etcd",
            *("--data-dir", str(self._folder), "--name", "one", "--initial-cluster", f"one={peer}"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        ]

    def answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, ValueError):
            return False

    def all_keys(self) -> set[str]:
        return {about["key"].decode() for _, about in self._client().get_all()}

    def put(self, key: str, value: str) -> None:
        self._client().put(key, value)

    def delete(self, key: str) -> None:
        assert self._client().delete(key)

    def leases(self) -> set[int]:
        client = self._client()
        return {int(lease["ID"]) for lease in client.post(client.get_url("/lease/leases"), json={}).get("leases", [])}

    def revoke(self, lease: int) -> None:
        Lease(lease, self._client()).revoke()

    def _client(self) -> Etcd3Client:
        return Etcd3Client("127.0.0.1", self.port, timeout=5)


class Dnsmasq(_Program):
    """Answers for the zone `cluster.test` what it was given last, and refuses everything else."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._records = folder / "dnsmasq.conf"
        self.port = own_port()

    def say(self, *, hosts: Iterable[str] = (), services: Iterable[tuple[str, int]] = ()) -> None:
        """hosts: addresses of nodes.cluster.test. services: (host, port) of _peers._tcp.cluster.test."""
        lines = ["no-resolv", "no-hosts", "local=/cluster.test/", f"port={self.port}", "listen-address=127.0.0.1"]
        lines += ["bind-interfaces", "user=", "pid-file="]
        lines += [f"host-record=nodes.cluster.test,{address}" for address in hosts]
        lines += [f"srv-host=_peers._tcp.cluster.test,{host},{port}" for host, port in services]
        self._records.write_text("\n".join(lines) + "\n")
        self.stop()  # it reads its records when it starts
        self.start()

    def arguments(self) -> list[str]:
        return [
            shutil.which("dnsmasq") or "/usr/sbin/dnsmasq",
            "--keep-in-foreground",
            f"--conf-file={self._records}",
        ]

    def answers(self) -> bool:
        import dns.message
        import dns.query

        question = dns.message.make_query("cluster.test", "A")
        try:
            dns.query.udp(question, "127.0.0.1", timeout=0.5, port=self.port)
        except (dns.exception.DNSException, OSError):
            return False
        return True


class KubernetesAPI:
    """EndpointSlices of one namespace: list, and watch from a resource version. Enter it in the loop of the test."""

    def __init__(self, namespace: str, kubeconfig: Path) -> None:
        self._namespace = namespace
        self._kubeconfig = kubeconfig
        self._slices: dict[str, dict[str, Any]] = {}
        self._history: list[dict[str, Any]] = []
        self._version = 1000
        self._oldest = 1000  # watches from before are told 410
        self._changed = asyncio.Event()
        self.lists = self.watches = 0
        self.refuse = 0  # a status to answer every request with
        self._cut = asyncio.Event()

    async def __aenter__(self) -> KubernetesAPI:
        app = web.Application()
        base = f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        app.router.add_get(base, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = int(self._runner.addresses[0][1])
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [{"name": "u", "user": {"token": "secret-of-the-test"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        self._kubeconfig.write_text(json.dumps(config))  # YAML understands JSON
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        await self._runner.cleanup()

    def put(self, name: str, endpoints: list[dict[str, Any]], **more: Any) -> None:
        kind = "MODIFIED" if name in self._slices else "ADDED"
        piece = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": more.pop("service", "peers")}},
            "addressType": more.pop("kind", "IPv4"),
            "ports": more.pop("ports", [{"name": "peers", "port": 7070, "protocol": "TCP"}]),
            "endpoints": endpoints,
        }
        self._slices[name] = piece
        self._happened(kind, piece)

    def delete(self, name: str) -> None:
        self._happened("DELETED", self._slices.pop(name))

    def forget(self) -> None:
        """All that happened so far: watches that would begin there are told 410."""
        self._oldest = self._version
        self._history.clear()

    def cut(self) -> None:
        """End every watch in the middle."""
        before, self._cut = self._cut, asyncio.Event()
        before.set()

    def _happened(self, kind: str, piece: dict[str, Any]) -> None:
        self._version += 1
        piece["metadata"]["resourceVersion"] = str(self._version)
        self._history.append({"type": kind, "object": json.loads(json.dumps(piece)), "at": self._version})
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret-of-the-test"
        if self.refuse:
            status = {"kind": "Status", "message": "refused", "code": self.refuse}
            exactly = {"Content-Type": "application/json"}  # the real one says no charset, and lightkube compares
            return web.Response(body=json.dumps(status).encode(), status=self.refuse, headers=exactly)
        service = request.query["labelSelector"].removeprefix("kubernetes.io/service-name=")
        if request.query.get("watch") != "true":
            self.lists += 1
            chosen = [piece for piece in self._slices.values() if _service(piece) == service]
            return web.json_response({"metadata": {"resourceVersion": str(self._version)}, "items": chosen})
        self.watches += 1
        return await self._watch(request, service, int(request.query["resourceVersion"]))

    async def _watch(self, request: web.Request, service: str, at: int) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if at < self._oldest:
            gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
            await response.write(json.dumps(gone).encode() + b"\n")
            return response
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            while not cut.done():
                changed = self._changed
                for event in [event for event in self._history if event["at"] > at]:
                    at = event["at"]
                    if _service(event["object"]) == service:
                        line = {"type": event["type"], "object": event["object"]}
                        await response.write(json.dumps(line).encode() + b"\n")
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait({cut, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        finally:
            cut.cancel()
        assert request.transport is not None
        request.transport.abort()
        return response


def _service(piece: dict[str, Any]) -> str:
    return str(piece["metadata"]["labels"]["kubernetes.io/service-name"])


def endpoint(name: str, address: str, *, ready: bool | None = True, machine: str | None = None) -> dict[str, Any]:
    about: dict[str, Any] = {"addresses": [address], "targetRef": {"kind": "Pod", "name": name}}
    if ready is not None:
        about["conditions"] = {"ready": ready}
    return about | ({"nodeName": machine} if machine else {})

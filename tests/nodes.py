"""Nodes of a cluster for tests (testbed/nodes). Their reader is in the test's process: every byte is compared there."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from cachefs.client.located import Located
from cachefs.cluster.nodes import Node as Member
from cachefs.cluster.peers.health import LEAST_HEDGE
from cachefs.cluster.peers.pki import make_secret
from cachefs.cluster.placement import Placement, object_key
from cachefs.digest import BLOCK_SIZE
from cachefs.origin import OriginSpec
from cachefs_sidecar.testbed.network import Host
from cachefs_sidecar.testbed.nodes import PORT, ClusterNode, certificates, secret, together
from cachefs_sidecar.testbed.ports import reserved_ports
from tests.machine import Bucket


class Node(ClusterNode):
    """One node, reading one bucket."""

    def __init__(
        self,
        number: int,
        folder: Path,
        bucket: Bucket,
        port: int,
        *,
        size: int | None = None,
        host: Host | None = None,
        endpoint: str = "",
        clock: str = "",
        lie: str = "",
    ) -> None:
        """endpoint: how the origin is reached from there. clock: how far its own is off, such as "-1h".

        lie: what is wrong with its server (lying_node.py).
        """
        options = {**bucket.options, **({"endpoint_url": endpoint} if endpoint else {})}
        environ = {**os.environ, **shifted(clock)} if clock else None
        super().__init__(number, folder, bucket.name, options, port, size=size, host=host, environ=environ)
        self.slow: list[str] = []
        if lie:
            self.program = [str(Path(__file__).with_name("lying_node.py")), lie]

    def read(self, path: str, version: str, size: int) -> bytes:
        located = self._need(path, version=version, size=size)
        try:
            return os.pread(located.fd, size, 0 - located.base)
        finally:
            os.close(located.fd)

    def read_through(self, path: str, version: str, size: int) -> bytes:
        """A large object from end to end, as a reader of a mount asks for it."""
        data = b""
        while len(data) < size:
            located = self._need(path, version=version, size=size, offset=len(data), length=1 << 20)
            try:
                data += os.pread(located.fd, located.stop - len(data), len(data) - located.base)
            finally:
                os.close(located.fd)
        return data

    def read_part(self, path: str, version: str, size: int, block: int) -> None:
        """One block of a large object."""
        start = block * BLOCK_SIZE
        os.close(self._need(path, version=version, size=size, offset=start, length=min(BLOCK_SIZE, size)).fd)

    def _need(self, path: str, **need: Any) -> Located:
        began = time.monotonic()
        located = self.connection.need(path, **need)
        if time.monotonic() - began >= LEAST_HEDGE:
            self.slow.append(path)
        return located


def owner_of(nodes: Collection[Node], path: str, version: str) -> str:
    """Its name, where all nodes count the same."""
    placement = Placement([Member(node.name, node.address, node.port) for node in nodes])
    identity = OriginSpec("s3", next(iter(nodes)).options, {}).identity
    return placement.owner(object_key(identity, path, version)).name


def slow_reads(nodes: Collection[Node]) -> list[str]:
    """Paths of reads since this was asked last that took so long that the fetcher may have asked the origin, too, and
    the owner that it asked may have done the same: each may cost two reads of the origin that were not needed.
    """
    found = [path for node in nodes for path in node.slow]
    for node in nodes:
        node.slow.clear()
    return found


def why_no_other_clock() -> str:
    """Why no process can be given another time here; "" when one can."""
    return "" if _faketime() else "needs libfaketime (Debian package libfaketime)"


def shifted(by: str) -> dict[str, str]:
    """The environment of a process whose clock is off by so much, and of what it starts. Durations stay right."""
    return {"LD_PRELOAD": _faketime(), "FAKETIME": by, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}


def _faketime() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else ""


def fill(bucket: Bucket, count: int) -> dict[str, bytes]:
    """Objects of some 30 KB in the bucket: path -> content."""
    contents = {f"{bucket.name}/set/{n:04d}.jpg": random.Random(n).randbytes(30_000 + n) for n in range(count)}
    for path, data in contents.items():
        bucket.put(path.removeprefix(f"{bucket.name}/"), data)
    return contents


@contextlib.contextmanager
def cluster(
    folder: Path,
    bucket: Bucket,
    count: int,
    *,
    size: int | None = None,
    sizes: Sequence[int] | None = None,
    named: bool = True,
    tls: bool = False,
    sign: str = "all",
    hosts: Sequence[Host] = (),
    endpoint: str = "",
    clocks: Sequence[str] = (),
    lies: Sequence[str] = (),
) -> Iterator[list[Node]]:
    """So many nodes that know of each other, with a shared secret or certificates. sizes: of their caches, each.
    named: the list of members has these, too; else they have to tell each other. sign: what the secret signs.
    clocks: how far each one's is off. lies: what is wrong with the server of each.
    """
    trust = certificates(folder) if tls else [*secret(folder), "--sign", sign]
    with contextlib.nullcontext([PORT] * count) if hosts else reserved_ports(count) as ports:
        nodes = [
            Node(
                number,
                folder,
                bucket,
                port,
                size=sizes[number] if sizes else size,
                host=hosts[number] if hosts else None,
                endpoint=endpoint,
                clock=clocks[number] if clocks else "",
                lie=lies[number] if lies else "",
            )
            for number, port in enumerate(ports)
        ]
        with together(nodes, trust, weighed=bool(sizes) and named):
            yield nodes


@contextlib.contextmanager
def stranger(folder: Path, bucket: Bucket, nodes: list[Node]) -> Iterator[Node]:
    """A node that calls itself one of the cluster, and has another secret."""
    its_secret = folder / "another-secret"
    make_secret(its_secret)
    with reserved_ports(1) as (port,):
        node = Node(99, folder, bucket, port)
        try:
            node.serve("static:" + ",".join(each.name for each in (*nodes, node)), ["--secret", str(its_secret)])
            node.wait_until_it_serves()
            node.wait_for(len(nodes) + 1)
            yield node
        finally:
            node.close()

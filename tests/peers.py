"""What the tests of peers share: server processes, what they serve, and something in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.pki import issue, make_authority, make_secret
from cachefs.cluster.peers.trust import SecretTrust, TlsTrust, Trust
from cachefs.cluster.peers.wire import Item
from cachefs.config import CacheConfig


@dataclass
class Served:
    """A server process. node: as others know it."""

    node: Node
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def served(home: Path, trust: dict[str, str], *, name: str = "owner", prefix: tuple[str, ...] = (), **settings):
    """A server process of the cache at `home`, ended afterwards. trust: from `Credentials`."""
    log = home.parent / f"peers-{name}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cachefs.cluster.peers.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = {"dirs": [str(home)], "name": name, **trust, **settings}
        process.stdin.write(json.dumps(said).encode() + b"\n")
        process.stdin.flush()
        word, _, port = process.stdout.readline().partition(b" ")
        assert word == b"listening", log.read_text()
        host = str(settings.get("host", "127.0.0.1"))
        yield Served(Node(name, host, int(port), 1), process, log)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Credentials:
    """An authority and a secret, and how nodes use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_authority(folder)
        make_secret(folder / "secret")
        for name in ("owner", "reader"):
            issue(folder, name)

    def tls(self, name: str = "owner") -> dict[str, str]:
        files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
        return {field: str(self.folder / file) for field, file in files.items()}

    def secret(self) -> dict[str, str]:
        return {"secret": str(self.folder / "secret")}

    def server(self, kind: str) -> dict[str, str]:
        return self.tls() if kind == "tls" else self.secret()

    def client(self, kind: str, name: str = "reader") -> Trust:
        """kind: "tls", "all" or "headers"."""
        if kind == "tls":
            files = self.tls(name)
            return TlsTrust(name, files["ca"], files["certificate"], files["key"])
        return SecretTrust.load(name, self.folder / "secret", cover=kind)


KINDS = ("tls", "all", "headers")


@contextlib.asynccontextmanager
async def asking(trust: Trust) -> AsyncIterator[Peers]:
    peers = Peers(trust)
    try:
        yield peers
    finally:
        await peers.close()


class Stored:
    """A dataset that the real fetcher of a cache has stored from a real origin."""

    def __init__(self, bucket, home: Path, objects: dict[str, bytes], *, fetched: bool = True) -> None:
        self.home = home
        self.objects = objects
        # What a throttle holds back for long is not asked for again.
        self.options = {**bucket.options, "read_timeout": 100.0}
        self.session = Session("s3", self.options, {}, root=bucket.name)
        connection = Connection(CacheConfig.make(home, deadline=60.0), self.session)
        self.dataset = connection.attach().dataset
        self.versions = {path: connection.info(path).version for path in objects}
        for path, version in self.versions.items() if fetched else ():
            os.close(connection.need(path, version=version, size=len(objects[path])).fd)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """To the fetcher, which is asked for nothing but how it does."""
        connection = Connection(CacheConfig.make(self.home, deadline=60.0), self.session)
        try:
            yield connection
        finally:
            connection.close()

    def item(self, path: str, offset: int = 0, length: int = -1) -> Item:
        return Item(self.dataset, path, self.versions[path], len(self.objects[path]), offset, length)

    def settings(self, bucket) -> dict[str, Any]:
        """What a server is told so that peers may have its objects fetched."""
        return {"datasets": [{"protocol": "s3", "root": bucket.name, "options": self.options, "redacted": False}]}


Forward = Callable[[bytes], bytes]


@contextlib.asynccontextmanager
async def in_the_middle(
    node: Node, *, up: Forward | None = None, down: Forward | None = None, address: str = "127.0.0.1"
) -> AsyncIterator[Node]:
    """A proxy that changes what passes: `up` to the node, `down` from it. address: from which it calls the node."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Forward | None) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(change(data) if change else data)
                await writer.drain()
        writer.close()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(node.host, node.port, local_addr=(address, 0))
        tasks.add(asyncio.create_task(pump(reader, there[1], up)))
        tasks.add(asyncio.create_task(pump(there[0], writer, down)))

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        yield Node(node.name, "127.0.0.1", server.sockets[0].getsockname()[1], 1)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(waits: list[Awaitable[Any]]) -> list[Any]:
    """Results and errors, in order."""
    return list(await asyncio.gather(*waits, return_exceptions=True))


def corrupt(home: Path, size: int) -> int:
    """Change a byte of each blob of `size` bytes without anybody noticing; how many."""
    changed = 0
    for path in _files(home / "blobs"):
        info = path.stat()
        if info.st_size == size:
            with path.open("r+b") as file:
                file.seek(size // 2)
                byte = file.read(1)
                file.seek(size // 2)
                file.write(bytes([byte[0] ^ 1]))
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
            changed += 1
    return changed


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())

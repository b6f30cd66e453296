"""Nodes that say themselves that they are there: a key each, which etcd drops when its lease runs out.

    etcd://host:2379/prefix                        several as host1:2379,host2:2379: the next when one fails
    etcd://host:2379/prefix?ca=F&cert=F&key=F      over TLS, with these files
    ?ttl=9                                         seconds after which a node that died is gone

Each node keeps PREFIX/NAME under a lease and refreshes it three times in the lease's time. A node that dies is
gone when its lease is; one that could not reach etcd for longer takes a new lease. The value is the node, as JSON.

What the watch tells is taken as a hint that something changed, and then all is read: etcd3gw's thread ends without a
word when a message comes in two pieces, or the connection is cut. So all is read at each refresh anyhow, and the watch
is made anew every minute: a dead one costs seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease
from etcd3gw.watch import Watcher

from cachefs.cluster.addresses import host_port
from cachefs.cluster.nodes import Node
from cachefs.cluster.settling import View
from cachefs.errors import ConfigError, MembershipError

log = logging.getLogger("cachefs.cluster")

TTL = 9
DEADLINE = 3.0  # for one request
WATCH = 60.0  # the age at which a watch is replaced

_FAILURES = (Etcd3Exception, requests.RequestException, OSError, ValueError, KeyError)


class Leases:
    def __init__(self, rest: str, me: Node) -> None:
        parts = urlsplit(f"etcd:{rest}")
        options = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self._ttl = int(ttl) if (ttl := options.pop("ttl", str(TTL))).isdecimal() else 0
        wrong = options.keys() - {"ca", "cert", "key"} or ("cert" in options) != ("key" in options) or self._ttl < 1
        if wrong or not parts.netloc:
            raise ConfigError(f"cluster etcd:{rest}: write etcd://host:2379/prefix, with ?ttl=9, ?ca=F&cert=F&key=F")
        self._servers = [host_port(server, 2379) for server in parts.netloc.split(",")]
        self._prefix = f"{parts.path.strip('/') or 'cachefs'}/"
        self._tls = options
        self._me = me

    async def watch(self) -> AsyncGenerator[View, None]:
        self._servers.append(self._servers.pop(0))  # another one when it is tried again
        host, port = self._servers[-1]
        try:
            async with contextlib.AsyncExitStack() as stack:
                client = self._client(host, port)
                stack.callback(client.session.close)
                lease = await asyncio.to_thread(self._register, client)
                stack.push_async_callback(_revoke, client, lease)
                while True:
                    async with contextlib.aclosing(self._watch(client, lease)) as views:
                        async for view in views:
                            yield view
        except _FAILURES as error:
            reason = getattr(error, "detail_text", None) or error
            raise MembershipError(f"etcd at {host}:{port}: {type(error).__name__}: {reason}") from error

    async def _watch(self, client: Etcd3Client, lease: Lease) -> AsyncGenerator[View, None]:
        """Until the watch is old. Raises MembershipError when the lease is lost."""
        changed = asyncio.Event()
        end = time.monotonic() + WATCH
        watcher = await asyncio.to_thread(self._watcher, client, _from_thread(changed))
        try:
            while time.monotonic() < end:
                changed.clear()
                nodes = await asyncio.to_thread(self._read, client)
                if all(node.name != self._me.name for node in nodes):
                    raise MembershipError("etcd: the key of this node is gone; it is put there again")
                yield nodes
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._ttl / 3):
                        await changed.wait()
                if await asyncio.to_thread(lease.refresh) <= 0:
                    # It ran out while etcd or this node was away.
                    raise MembershipError("etcd: the lease of this node ran out; it takes a new one")
        finally:
            watcher.stop()

    def _client(self, host: str, port: int) -> Etcd3Client:
        session = _Session()
        if "ca" in self._tls:
            session.verify = self._tls["ca"]
        if "cert" in self._tls:
            session.cert = (self._tls["cert"], self._tls["key"])
        protocol = "https" if self._tls else "http"
        return Etcd3Client(host, port, protocol, timeout=DEADLINE, session=session)

    def _watcher(self, client: Etcd3Client, told: Callable[[Any], None]) -> Watcher:
        return Watcher(client, self._prefix, told, range_end=_after(self._prefix))

    def _register(self, client: Etcd3Client) -> Lease:
        lease = client.lease(self._ttl)
        client.put(self._prefix + self._me.name, msgspec.json.encode(self._me), lease)
        return lease

    def _read(self, client: Etcd3Client) -> View:
        nodes = set()
        for value, about in client.get_prefix(self._prefix):
            name = about["key"].decode(errors="replace").removeprefix(self._prefix)
            try:
                node = msgspec.json.decode(value, type=Node)
                if node.name == name and 0 < node.port < 65536 and node.weight >= 0:
                    nodes.add(node)
                    continue
            except msgspec.MsgspecError:
                pass
            log.warning("etcd: what stands under %s%s is no node of ours; ignored", self._prefix, name)
        return frozenset(nodes)


class _Session(requests.Session):
    """The client gives its watch no deadline: it would wait for a server that took the connection and went away."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = (DEADLINE, WATCH + 30)
        return super().request(*args, **kwargs)


def _from_thread(event: asyncio.Event) -> Callable[[Any], None]:
    loop = asyncio.get_running_loop()

    def tell(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended; the watch ends next
            loop.call_soon_threadsafe(event.set)

    return tell


async def _revoke(client: Etcd3Client, lease: Lease) -> None:
    """A node that leaves in order is gone at once, not when its lease is."""
    with contextlib.suppress(*_FAILURES):
        await asyncio.to_thread(lease.revoke)


def _after(prefix: str) -> str:
    """The end of the range of keys that begin with this prefix; it ends with "/", whose successor is "0"."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)

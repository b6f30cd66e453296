"""Nodes that a name server names: the addresses of a headless service, or its SRV records.

    dns://service.namespace:7070              every A record is a node; AAAA where there is none, since a host with both
                                              would count twice
    dns+srv://_peers._tcp.service.namespace   every SRV record is a node, with its own port and a name that stays when
                                              its address changes (StatefulSets); the first port in order per host
    ?server=10.0.0.10:53                      asks this one instead of those of resolv.conf

Asked again every few seconds, whatever the records' time to live says: that is for caches, and here is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dns.asyncresolver
import dns.exception
import dns.resolver

from cachefs.cluster.addresses import DEFAULT_PORT, host_port
from cachefs.cluster.nodes import Node
from cachefs.cluster.settling import View
from cachefs.errors import ConfigError, MembershipError

LOOK = 3.0

# For one answer, with all retries and all servers.
DEADLINE = 5.0


class _Lookup:
    """A name that is looked up again and again. No thread: a lookup that hangs holds nothing but itself."""

    def __init__(self, rest: str, me: Node) -> None:
        parts = urlsplit(f"dns:{rest}")
        if not rest.startswith("//") or not parts.netloc or parts.path.strip("/"):
            raise ConfigError(f"cluster dns:{rest}: write dns://service.namespace:{DEFAULT_PORT}")
        self.name, self.port = host_port(parts.netloc)
        options = parse_qs(parts.query)
        server = options.pop("server", [""])[0]
        if options:
            raise ConfigError(f"cluster dns:{rest}: {', '.join(sorted(options))} is no option; there is server=")
        self._server = host_port(server, 53) if server else None

    async def watch(self) -> AsyncGenerator[View, None]:
        resolver = self._resolver()
        while True:
            yield await self._nodes(resolver)
            await asyncio.sleep(LOOK)

    async def _nodes(self, resolver: dns.asyncresolver.Resolver) -> View:
        raise NotImplementedError

    def _resolver(self) -> dns.asyncresolver.Resolver:
        try:
            resolver = dns.asyncresolver.Resolver(configure=self._server is None)
            if self._server is not None:
                resolver.nameservers, resolver.port = [self._server[0]], self._server[1]
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise MembershipError(f"DNS: {error}") from error
        return resolver

    async def _records(self, resolver: dns.asyncresolver.Resolver, kind: str) -> list[Any]:
        """None is an answer too. Raises MembershipError when there was no answer."""
        try:
            return list(await resolver.resolve(self.name, kind, search=True, lifetime=DEADLINE))
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except (dns.exception.DNSException, OSError) as error:
            raise MembershipError(f"DNS, {kind} of {self.name}: {error}") from error


class Addresses(_Lookup):
    async def _nodes(self, resolver: dns.asyncresolver.Resolver) -> View:
        records = await self._records(resolver, "A") or await self._records(resolver, "AAAA")
        nodes = (Node("", str(record.address), self.port) for record in records)
        return frozenset(Node(node.address, node.host, node.port) for node in nodes)


class Services(_Lookup):
    async def _nodes(self, resolver: dns.asyncresolver.Resolver) -> View:
        nodes: dict[str, Node] = {}
        for record in sorted(await self._records(resolver, "SRV"), key=lambda record: int(record.port)):
            host = record.target.to_text(omit_final_dot=True)
            nodes.setdefault(host, Node(host, host, int(record.port)))
        return frozenset(nodes.values())

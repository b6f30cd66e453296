"""Nodes that Kubernetes names: the ready endpoints of a service, as its EndpointSlices say them.

    k8s://namespace/service               the first port in order, or ?port=NAME
    k8s://namespace/service?name=pod      a node is called as its pod is; else as the machine that the pod is on

In a DaemonSet pods come and go under new names while the cache stays on its machine, so the machine's name counts.
Where several pods of one machine are members, each with a cache of its own (a StatefulSet), it must be the pod's.
The account needs `list` and `watch` on endpointslices.discovery.k8s.io in the namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import httpx2
from lightkube import AsyncClient
from lightkube.core.exceptions import ConfigError as KubeConfigError
from lightkube.models.discovery_v1 import Endpoint
from lightkube.resources.discovery_v1 import EndpointSlice

from cachefs.cluster.nodes import Node
from cachefs.cluster.settling import View
from cachefs.errors import ConfigError, MembershipError

# A watch is ended and everything listed again after so long: a connection that is cut in the middle says nothing.
RELIST = 120.0

DEADLINE = 10.0


class EndpointSlices:
    def __init__(self, rest: str, me: Node) -> None:
        parts = urlsplit(f"k8s:{rest}")
        self._namespace, self._service = parts.netloc, parts.path.strip("/")
        options = parse_qs(parts.query)
        self._port = options.pop("port", [""])[0]
        self._by_pod = (by := options.pop("name", ["node"])[0]) == "pod"
        wrong = options or by not in ("node", "pod")
        if wrong or not self._namespace or not self._service or "/" in self._service:
            raise ConfigError(f"cluster k8s:{rest}: write k8s://namespace/service, with ?port=NAME or ?name=pod")

    async def watch(self) -> AsyncGenerator[View, None]:
        try:
            while True:  # with a client each, so that no connection of a watch that was left stays
                # In a thread: it reads files and certificates.
                client = await asyncio.to_thread(self._client)
                async with client, contextlib.aclosing(self._until_relist(client)) as views:
                    async for view in views:
                        yield view
        except (httpx2.HTTPError, KubeConfigError, OSError) as error:
            raise MembershipError(
                f"Kubernetes, endpoints of {self._namespace}/{self._service}: {type(error).__name__}: {error}"
            ) from error

    def _client(self) -> AsyncClient:
        return AsyncClient(namespace=self._namespace, timeout=httpx2.Timeout(DEADLINE))

    async def _until_relist(self, client: AsyncClient) -> AsyncGenerator[View, None]:
        labels: dict[str, Any] = {"kubernetes.io/service-name": self._service}
        listed = client.list(EndpointSlice, labels=labels)
        slices = {_name(piece): piece async for piece in listed}
        yield self._nodes(slices.values())
        version = listed.resourceVersion
        end = asyncio.get_running_loop().time() + RELIST
        watch = client.watch(EndpointSlice, labels=labels, resource_version=version, server_timeout=int(RELIST))
        changes = cast("AsyncGenerator[tuple[str, EndpointSlice], None]", watch)
        try:
            while True:
                async with asyncio.timeout_at(end):
                    event, piece = await anext(changes)
                if event == "DELETED":
                    slices.pop(_name(piece), None)
                else:
                    slices[_name(piece)] = piece
                yield self._nodes(slices.values())
        except (TimeoutError, StopAsyncIteration):
            return
        finally:
            await changes.aclose()

    def _nodes(self, slices: Iterable[EndpointSlice]) -> View:
        nodes: dict[str, Node] = {}
        # In an order that is the same for every node: IPv4 before IPv6, where a pod has both.
        for piece in sorted(slices, key=lambda piece: (piece.addressType, _name(piece))):
            ports = sorted((port.name or "", port.port or 0) for port in piece.ports or [])
            port = next((number for name, number in ports if number and self._port in ("", name)), None)
            if port is None or piece.addressType not in ("IPv4", "IPv6"):
                continue
            for endpoint in sorted(piece.endpoints or [], key=lambda endpoint: endpoint.addresses):
                if endpoint.conditions is None or endpoint.conditions.ready is not False:
                    name = self._name_of(endpoint)
                    nodes.setdefault(name, Node(name, endpoint.addresses[0], port))
        return frozenset(nodes.values())

    def _name_of(self, endpoint: Endpoint) -> str:
        pod = endpoint.targetRef.name if endpoint.targetRef is not None else None
        return (pod if self._by_pod else endpoint.nodeName) or pod or endpoint.addresses[0]


def _name(piece: EndpointSlice) -> str:
    return (piece.metadata and piece.metadata.name) or ""

"""What a node can store, where the source does not say: only lists with sizes and etcd do. The node itself knows, and
tells whoever connects to it (peers/trust), which all do as soon as they hear of it (fetcher/greeting).

It is what its cache may grow to, not what is free now: objects would move with every byte that anybody stores. Until a
node has told, it counts as the typical one of those that have: never as one byte beside their terabytes. Two
nodes that have heard different things disagree about some owners until both have heard all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median_low

import msgspec

from cachefs.cluster.nodes import DEFAULT_WEIGHT, Node


def weighed(nodes: Iterable[Node], told: Mapping[str, int]) -> frozenset[Node]:
    """The nodes with what each has told, by name. A weight that the source gave stays."""
    seen = frozenset(nodes)
    known = [told[node.name] for node in seen if node.weight == DEFAULT_WEIGHT and node.name in told]
    if not known:
        return seen
    typical = median_low(known)
    return frozenset(
        msgspec.structs.replace(node, weight=told.get(node.name, typical)) if node.weight == DEFAULT_WEIGHT else node
        for node in seen
    )

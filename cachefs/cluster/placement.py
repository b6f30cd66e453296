"""Who owns an object: weighted rendezvous hashing, so that every node finds the same answer by itself.

An owner is found before anything is known of the content: what is hashed is the object (identity of its origin,
path, version). Each node throws a number for each object, and the best throw owns it. Taking a node out therefore
moves its own objects and no others, each to the node that was next; a new one takes from each what it wins.

Version 1 of the definition, with test vectors in tests/placement_v1.json:
  * key = BLAKE2b-128 of "o" identity NUL version NUL path (UTF-8, surrogateescape): names come from outside;
  * seed of a node = BLAKE2b-64 of its name, big-endian; h = XXH3-64 of key with that seed;
  * u = (the upper 52 bits of h + 1/2) / 2^52, which lies in (0, 1), ends excluded, and is exact in a double;
  * cost = -ln(u) / weight. The least cost owns; then the greater h, then the name that sorts first.
-ln(u) / w is exponentially distributed with rate w, and the least of several such is node i's with probability
w_i / sum(w): the share of each is exactly its weight's, and a change of one weight moves only what that node gains or
loses. (The logarithmic method of Schindelhauer and Schomaker, "Weighted distributed hash tables", SPAA 2005, over the
highest random weight of Thaler and Ravishankar, 1998; mostly written as the greatest of -w / ln(u).)

Two C libraries may differ in the last digit of ln. That two costs are so near is a matter of one object in 10^15, and
costs one read more: nodes that disagree about an owner lose efficiency, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from math import log

from xxhash import xxh3_64_intdigest

from cachefs.cluster.nodes import Node

# Told when nodes meet: those of another version must not ask each other for what they take for one another's.
PLACEMENT_VERSION = 1

_UNIT = 2.0**-52


def object_key(identity: str, path: str, version: str) -> bytes:
    """16 bytes that name a version of an object of an origin to the whole cluster."""
    data = f"o{identity}\0{version}\0{path}".encode("utf-8", "surrogateescape")
    return blake2b(data, digest_size=16).digest()


def catalog_key(identity: str, root: str) -> bytes:
    """16 bytes that name the catalog of a dataset: its owner lists for the whole cluster."""
    return blake2b(f"c{identity}\0{root}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _seed(name: str) -> int:
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def shares(nodes: Iterable[Node]) -> dict[str, float]:
    """By name, the part of all objects that each owns. See Placement for nodes of weight 0."""
    everyone = list(nodes)
    weights = {node.name: node.weight for node in everyone if node.weight > 0} or {n.name: 1 for n in everyone}
    total = sum(weights.values())
    return {node.name: weights.get(node.name, 0) / total for node in everyone}


class Placement:
    """The owners under one view. Immutable: a new view makes a new one, and whoever holds the old may go on with it."""

    __slots__ = ("_equal", "_seeds", "_weights", "nodes")

    def __init__(self, nodes: Iterable[Node]) -> None:
        """A node of weight 0 owns nothing (it has no cache), unless all are so. Raises ValueError without nodes."""
        everyone = sorted(nodes)
        self.nodes = tuple(node for node in everyone if node.weight > 0) or tuple(everyone)
        if not self.nodes:
            raise ValueError("placement over no nodes")
        self._seeds = [_seed(node.name) for node in self.nodes]
        self._weights = [max(1, node.weight) for node in self.nodes]
        self._equal = len(set(self._weights)) == 1

    def owner(self, key: bytes) -> Node:
        """The node that owns the object of this key."""
        thrown = [xxh3_64_intdigest(key, seed) for seed in self._seeds]
        if self._equal:  # no logarithm changes which is the greatest
            return self.nodes[thrown.index(max(thrown))]
        return self.nodes[min(self._costs(thrown))[2]]

    def ranking(self, key: bytes, count: int) -> tuple[Node, ...]:
        """The first `count` nodes for this object: its owner, and those who would own it if the ones before left."""
        thrown = [xxh3_64_intdigest(key, seed) for seed in self._seeds]
        return tuple(self.nodes[index] for _, _, index in sorted(self._costs(thrown))[:count])

    def owners(self, keys: Iterable[bytes]) -> Iterator[Node]:
        """The owner of each key, in order."""
        return map(self.owner, keys)

    def _costs(self, thrown: list[int]) -> Iterator[tuple[float, int, int]]:
        """Per node what decides, in the order in which it decides. Nodes are sorted by name, so indexes are too."""
        for index, (h, weight) in enumerate(zip(thrown, self._weights, strict=True)):
            yield -log(((h >> 12) + 0.5) * _UNIT) / weight, -h, index

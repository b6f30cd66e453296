"""What a member of a cluster is: the words in which membership, placement and the peers speak of one another.

The name says who a node is and decides what it owns; the address says where it is reached now. A node that comes
back under its old name with another address owns what it owned before.
"""

from __future__ import annotations

import msgspec

# Where a source does not say what a node has (a list of names, DNS), all count the same.
DEFAULT_WEIGHT = 1

# What a node is believed to be able to store at most: 1 EiB.
MOST_CAPACITY = 2**60


class Node(msgspec.Struct, frozen=True, order=True):
    """One member. name: unique in the cluster, the same for all who speak of it. weight: its capacity in bytes."""

    name: str
    host: str
    port: int
    weight: int = DEFAULT_WEIGHT

    @property
    def address(self) -> str:
        """`host:port` as in a URL: an IPv6 address stands in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def certified(self) -> str:
        """The name that its certificate must have: a source that lists addresses names nodes `host:port`."""
        return self.host if self.name == self.address else self.name

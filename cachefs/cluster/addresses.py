"""Which node is meant, and is it this one? Addresses as people write them, and as this machine has them."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from cachefs.cluster.nodes import Node
from cachefs.errors import ConfigError

# Where a source says no port (a Slurm node list).
DEFAULT_PORT = 7070

# The colons of an IPv6 address are its own, so a port after it needs the brackets.
_ADDRESS = re.compile(
    r"\[(?P<bracketed>[0-9A-Fa-f:.%]+)\](?::(?P<port6>[0-9]{1,6}))?"
    r"|(?P<six>[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.%]*)"
    r"|(?P<host>[^\s:/@,\[\]]+)(?::(?P<port4>[0-9]{1,6}))?"
)


def host_port(text: str, port: int = DEFAULT_PORT) -> tuple[str, int]:
    """Of "host:port", "host", "[::1]:port" or "::1". Raises ConfigError for anything else."""
    found = _ADDRESS.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"cluster node {text!r}: write host:port, such as node-1:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}"
        )
    number = int(found["port6"] or found["port4"] or port)
    if not 0 < number < 65536:
        raise ConfigError(f"cluster node {text!r}: {number} is not a port")
    return found["bracketed"] or found["six"] or found["host"], number


def recognise(view: Iterable[Node], me: Node) -> Node:
    """The node of the view that is this one; `me` where none is, as while the others have not heard of it yet.

    By its name, else by its address: a source that lists addresses names its nodes after them.
    """
    nodes = sorted(view)
    by_name = [node for node in nodes if node.name == me.name]
    by_address = [node for node in nodes if node.port == me.port and (node.host == me.host or is_here(node.host))]
    return (by_name + by_address + [me])[0]


def is_here(host: str) -> bool:
    """Whether a host is this machine. Asks the kernel only: no name is looked up, so it cannot wait."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        own = socket.gethostname()
        short = "." not in host or "." not in own  # one may be known by its short name; two domains may each have one
        return host in (own, "localhost") or (short and host.partition(".")[0] == own.partition(".")[0])
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # only an own address can be bound
        except OSError:
            return False
    return True

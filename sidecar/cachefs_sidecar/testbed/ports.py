"""Ports for servers that are told theirs before they listen, and that stop and start again."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

# Below are those of well-known services.
_LOWEST = 10_000

_dice = random.SystemRandom()  # not that of a program which seeds its random numbers


def free_port() -> int:
    """A port of the loopback interface on which nobody listens.

    None of those that the kernel gives to connections and to whoever asks for any port: one of these would be
    somebody else's by the time that the server starts, or while it is stopped.
    """
    given = int(_RANGE.read_text().split()[0])
    for port in _dice.sample(range(_LOWEST, max(given, 2 * _LOWEST)), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Ports of loopback that nobody is given within the block, for programs that are told theirs, and may be started
    again: bound and not listened at, so connections are refused, and a server that sets SO_REUSEADDR may listen.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]

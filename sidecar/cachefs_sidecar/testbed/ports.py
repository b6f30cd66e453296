"""Ports for servers that are told theirs before they listen, and that stop and start again."""

from __future__ import annotations

import random
import socket
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

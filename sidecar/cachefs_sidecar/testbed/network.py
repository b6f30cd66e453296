"""Several hosts on one machine: network namespaces on a bridge, each with a link that can be slowed down or cut.

Each network has a block of addresses of its own, so that several programs may have one at the same time.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

# The first two bytes of 198.18.0.0/15, which is for benchmarks (RFC 2544): no real network of this machine has it.
_BLOCK = "198.18"
_RATE = "1gbit"

_dice = random.SystemRandom()  # not that of a program which seeds its random numbers

# Where `ip netns add` puts them (ip-netns(8)).
_NAMESPACES = "/run/netns"


def why_no_network() -> str:
    """Why hosts cannot be made here; "" when they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [name for name in ("ip", "tc", "nsenter") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)} (Debian packages iproute2, util-linux)" if missing else ""


@dataclass(frozen=True)
class Host:
    """prefix: of a command that is to run on it. link: the end of its cable on the bridge."""

    address: str
    namespace: str
    link: str

    @property
    def prefix(self) -> list[str]:
        # Not `ip netns exec`, which makes a mount namespace, too: where mounts are private, what runs on the host would
        # hold a copy of every mount that there is, and none of these could end.
        return [shutil.which("nsenter") or "nsenter", f"--net={_NAMESPACES}/{self.namespace}"]

    def cut(self) -> None:
        _ip("link", "set", self.link, "down")

    def slow(self, rate: str = _RATE) -> None:
        """Both ways, such as "10mbit"."""
        for prefix, device in self.ends:
            _tc(prefix, "class", "replace", "dev", device, "parent", "1:", "classid", "1:1", "htb", "rate", rate)

    def mend(self) -> None:
        """As it was at first."""
        _ip("link", "set", self.link, "up")
        self.slow()

    @property
    def ends(self) -> list[tuple[list[str], str]]:
        return [([], self.link), (self.prefix, "eth0")]


@contextlib.contextmanager
def network(hosts: int) -> Iterator[tuple[str, list[Host]]]:
    """(the address of this machine's end of the bridge, so many hosts)."""
    with _addresses() as block:
        tag = f"cf{block.rpartition('.')[2]}"
        bridge = f"{tag}b"
        made: list[Host] = []
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("address", "add", f"{block}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for number in range(hosts):
                host = Host(f"{block}.{number + 1}", f"{tag}n{number}", f"{tag}v{number}")
                made.append(host)  # before it is made: whoever is interrupted here takes it away, too
                _make(host, bridge)
            yield f"{block}.254", made
        finally:
            for host in made:
                # By name too: connections that were cut keep a namespace alive for minutes.
                subprocess.run(["ip", "link", "delete", host.link], check=False, capture_output=True)
                subprocess.run(["ip", "netns", "delete", host.namespace], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


def _make(host: Host, bridge: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", host.link, "master", bridge, "up")
    for words in (
        ("link", "set", "lo", "up"),
        ("address", "add", f"{host.address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
    ):
        _ip("-n", host.namespace, *words)
    for prefix, device in host.ends:
        _tc(prefix, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    host.slow()


@contextlib.contextmanager
def _addresses() -> Iterator[str]:
    """The first three bytes of a block of addresses that nobody else on this machine has while the block runs."""
    taken = _ip("-o", "address", "show")  # one that was killed leaves its bridge behind
    # In no order: whoever looks what a network left behind does not find the next one of somebody else.
    for number in _dice.sample(range(256), 256):
        block = f"{_BLOCK}.{number}"
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0cachefs-testbed-{block}")  # the kernel takes the name back when this process dies
            except OSError:
                continue
            if f" {block}." not in taken:
                yield block
                return
    raise RuntimeError(f"all networks of {_BLOCK}.0.0/16 are taken; `ip link` shows the bridges")


def _tc(prefix: list[str], *words: str) -> None:
    subprocess.run([*prefix, "tc", *words], check=True, capture_output=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

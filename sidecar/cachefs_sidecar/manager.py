"""The service manager that started this process (systemd), and its store of descriptors.

The manager keeps what it is given while processes come and go, and hands it to the next process that it starts for
the same unit: so a mount lives on even when every process of it is killed. Protocol: sd_notify(3) (one datagram per
message, lines of NAME=value, descriptors as SCM_RIGHTS), sd_listen_fds(3), and
https://systemd.io/FILE_DESCRIPTOR_STORE. No library is needed for it.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Sequence

log = logging.getLogger("cachefs.mount")

# The first descriptor that a manager passes (SD_LISTEN_FDS_START).
FIRST = 3

# How long the manager may take to say that it has read what it was told: it looks before anything else.
BARRIER_SECONDS = 5.0

# The names under which we store: this, and the pid of the keeper.
_PREFIX = "fuse-"


class Manager:
    """address: its socket; "@" in front stands for the NUL of an abstract one."""

    def __init__(self, address: str) -> None:
        self.address = address

    @classmethod
    def of_this_process(cls) -> Manager | None:
        """None without a manager that keeps descriptors. $FDSTORE says that it does, from systemd 254 on by itself."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        if os.environ.get("FDSTORE", "0") == "0" or address[:1] not in ("/", "@"):
            return None
        return cls(address)

    def tell(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Nobody hears: said in the log; a mount does not fail because its manager is away."""
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(BARRIER_SECONDS)
                sock.connect(address)
                data = "\n".join(lines).encode()
                socket.send_fds(sock, [data], list(fds)) if fds else sock.send(data)
        except OSError as error:
            log.warning("the service manager does not hear %s (%s)", lines[0], error.strerror)

    def ready(self, status: str) -> None:
        self.tell("READY=1", f"STATUS={status}")

    def main_is(self, pid: int) -> None:
        """Another process is the service from now on. This one may end when this returns."""
        self.tell(f"MAINPID={pid}")
        self.barrier()

    def store(self, keeper: int, fds: Sequence[int]) -> None:
        """Keep these of the process `keeper`, until `forget`.

        FDPOLL=0, because whoever polls a descriptor of FUSE is woken by each request: see fuse/session.
        """
        self.tell("FDSTORE=1", f"FDNAME={_PREFIX}{keeper}", "FDPOLL=0", fds=fds)

    def forget(self, keeper: int) -> None:
        self.tell("FDSTOREREMOVE=1", f"FDNAME={_PREFIX}{keeper}")

    def barrier(self) -> None:
        """Returns when the manager has read everything that was told."""
        ours, theirs = os.pipe()
        try:
            self.tell("BARRIER=1", fds=[theirs])
            os.close(theirs)
            theirs = -1
            select.select([ours], [], [], BARRIER_SECONDS)  # the manager closes its copy
        finally:
            for fd in (ours, theirs):
                if fd >= 0:
                    os.close(fd)


def stored() -> dict[int, list[int]]:
    """What the manager handed this process of what we had it store: pid of a keeper -> its descriptors.

    Nothing after `release`.
    """
    found: dict[int, list[int]] = {}
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return found  # they were meant for a process that started us, or there are none
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for fd, name in enumerate(names, FIRST):
        if name.startswith(_PREFIX):
            os.set_inheritable(fd, False)
            found.setdefault(int(name.removeprefix(_PREFIX)), []).append(fd)
    return found


def release() -> None:
    """Close what `stored` told, and have the manager forget it."""
    manager = Manager.of_this_process()
    for keeper, fds in stored().items():
        if manager is not None:
            manager.forget(keeper)
        for fd in fds:
            os.close(fd)
    if manager is not None:
        manager.barrier()
    os.environ.pop("LISTEN_PID", None)

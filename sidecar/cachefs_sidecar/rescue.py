"""A mount whose keeper was killed, and whose workers serve on: what a new keeper needs is still in them.

Each worker holds its descriptor of the connection, which pidfd_getfd(2) copies for whoever may trace the worker
(root, and the same user where ptrace is not restricted), and the settings, in a memory file that its keeper left
open in it. So `restart` stands in for the dead keeper and hands the mount to another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cachefs.errors import MountError
from cachefs_sidecar import registry
from cachefs_sidecar.device import DEVICE, branches
from cachefs_sidecar.handover import Estate
from cachefs_sidecar.launching import Installation
from cachefs_sidecar.registry import MountInfo, MountSettings
from cachefs_sidecar.succession import Succession

_PIDFD_GETFD = 438  # the same number on all architectures (since Linux 5.6)

# A killed process ends at once, but for one that waits for a disk that hangs.
KILL_SECONDS = 5.0


class Worker(NamedTuple):
    """settings, device: the numbers of these descriptors in it."""

    pid: int
    settings: int
    device: int


def _name(device: str) -> str:
    return f"cachefs-{device}"


def leave_settings(settings: MountSettings, device: str) -> int:
    """A descriptor to keep open in every worker. It tells whose worker it is, too."""
    # A name of the mount, not of its place: what was unmounted lazily from the same place may still be served.
    fd = os.memfd_create(_name(device), os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(registry.encode_settings(settings))
    return fd


def workers_of(device: str) -> list[Worker]:
    """The processes that serve the mount `device` (as mountinfo writes it), but for this one."""
    found = []
    wanted = f"/memfd:{_name(device)} (deleted)"
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        links = {target: fd for fd, target in _links(pid) if target in (wanted, DEVICE)}
        if pid != os.getpid() and len(links) == 2:
            found.append(Worker(pid, links[wanted], links[DEVICE]))
    return found


def _links(pid: int) -> list[tuple[int, str]]:
    links = []
    with contextlib.suppress(OSError):  # not ours to look into, or gone
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.append((int(fd), os.readlink(f"/proc/{pid}/fd/{fd}")))
    return links


def end(pids: Sequence[int]) -> None:
    """Kill processes and wait until they have ended: then they read no further request."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], KILL_SECONDS)
            finally:
                os.close(pidfd)


def restart(info: MountInfo, installation: Installation) -> int:
    """Have another keeper, a child of ours, look after a mount whose own is gone; its pid. Raises MountError."""
    workers = workers_of(info.device)
    if not workers:
        raise MountError(f"{info.mountpoint}: its keeper and its workers are gone; unmount it and mount it again")
    try:
        settings = _settings(workers[0])
        held = [_descriptor(worker) for worker in workers]
    except OSError as error:
        raise MountError(
            f"{info.mountpoint}: its keeper was killed, and its workers cannot be asked for what they hold "
            f"({error.strerror}; may this user trace processes?): do it as root, or unmount it and mount it again"
        ) from error
    (fd,), _ = branches(held[0], 1)
    devices, shared = branches(fd, info.workers)
    if not info.log:
        info = replace(info, log="wherever it can be written")  # its terminal is lost, and ours is not its
    outcome: list[tuple[int, str]] = []
    selector = selectors.DefaultSelector()
    succession = Succession(
        installation,
        Estate(settings, info, fd, devices, held, shared),
        _Orphans([worker.pid for worker in workers]),
        selector,
        lambda pid, why: outcome.append((pid, why)),
        finish_seconds=KILL_SECONDS,
    )
    while not outcome:
        for key, _ in selector.select(succession.timeout()):
            if not outcome:  # else an event before has ended what this one is about
                key.data()
        if not outcome:
            succession.look_at_clock()
    pid, why = outcome[0]
    if not pid:
        raise MountError(f"{info.mountpoint}: its new keeper came to nothing: {why}")
    return pid


def _settings(worker: Worker) -> MountSettings:
    return registry.decode_settings(Path(f"/proc/{worker.pid}/fd/{worker.settings}").read_bytes())


def _descriptor(worker: Worker) -> int:
    """A copy of the worker's descriptor of the connection. Raises OSError."""
    pidfd = os.pidfd_open(worker.pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(_PIDFD_GETFD, pidfd, worker.device, 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


class _Orphans:
    """Workers without a keeper. They hear nothing; what they have in hand is delivered to the next."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def close(self) -> list[int]:
        return self._pids

    def finish(self, seconds: float, finished: Callable[[], None]) -> None:
        end(self._pids)
        finished()

    def go_on(self) -> None:
        """They never stopped, unless `finish` ended them: then there is nobody who could."""

"""What commands do with mounts: start, stop, list, ask, refresh, restart.

A mount is a keeper process of its own. It gets its settings through a pipe, because they may hold credentials and
arguments and environments can be read by others; it says "ready" or the error through another. Afterwards one talks
to it over its Unix socket (SOCK_SEQPACKET, one JSON packet each way).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cachefs.errors import MountError, from_wire
from cachefs.mountinfo import mounted_at
from cachefs_sidecar import mounts, registry, rescue
from cachefs_sidecar.fuse.modes import OPEN_FREE
from cachefs_sidecar.launching import Installation, launch, this_installation
from cachefs_sidecar.registry import MountInfo, MountSettings, list_mounts

__all__ = [
    "MountInfo",
    "MountSettings",
    "list_mounts",
    "mount_status",
    "refresh_mount",
    "restart_mount",
    "run_foreground",
    "start_mount",
    "stop_mount",
]

# A mount takes some tenths of a second; this is for a machine that is starving.
START_SECONDS = 30.0

# A refresh of a dataset in which all of ten million names changed takes about a minute.
REFRESH_SECONDS = 600.0
STATUS_SECONDS = 5.0

# A restart takes a second. A new keeper may need half a minute on a machine that is starving, and on kernels that
# cannot deliver requests again every read that is waiting is waited for, up to its deadline.
RESTART_SECONDS = 240.0

# How often a process that is to end is looked at.
POLL_SECONDS = 0.02

MAX_PACKET = 64 * 1024


def start_mount(settings: MountSettings) -> MountInfo:
    """Mount, and return when the mount is usable. The keeper is nobody's child: it outlives the caller.

    Raises MountError (the mount point, the rights), CatalogError, ConfigError.
    """
    settings_bytes = registry.encode_settings(settings)
    ready, announce = os.pipe()
    try:
        with registry.starting(START_SECONDS):
            starter = launch(
                this_installation(),
                ["--announce", str(announce)],
                settings,
                announce,
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            os.close(announce)
            announce = -1
            answer = _await_ready(starter, settings_bytes, ready)
    finally:
        os.close(ready)
        if announce >= 0:
            os.close(announce)
    _raise_error(answer)
    info = registry.load(mounts.resolve(settings.mountpoint))
    if info is None:
        raise MountError(f"{settings.mountpoint}: was unmounted as soon as it was mounted")
    return info


def run_foreground(settings: MountSettings, on_ready: Callable[[MountInfo], None] | None = None) -> int:
    """The same with the keeper in this process, messages on stderr, until it is unmounted or Ctrl-C is pressed.

    Returns the exit status. The process must have no other threads: the keeper forks. Raises as `start_mount`.
    """
    from cachefs_sidecar import logs, starting

    logs.set_up_logging()
    with registry.starting(START_SECONDS):
        run, info = starting.foreground(settings)
    if on_ready is not None:
        on_ready(info)
    return run()


def _await_ready(starter: subprocess.Popen[bytes], settings: bytes, ready: int) -> bytes:
    """What the keeper announced. The starter forks the keeper and exits, so it is reaped here: no zombie."""
    assert starter.stdin is not None
    assert starter.stderr is not None
    with starter.stderr:
        with contextlib.suppress(BrokenPipeError), starter.stdin:  # it ended at once: its complaint is read below
            starter.stdin.write(settings)
        readable, _, _ = select.select([ready], [], [], START_SECONDS)
        if not readable:
            starter.kill()
            starter.wait()
            raise MountError(f"the mount was not ready within {START_SECONDS:g} s; is the machine overloaded?")
        answer = os.read(ready, MAX_PACKET)
        complaint = b"" if answer else starter.stderr.read()
    starter.wait()
    if not answer:
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise MountError("the keeper ended while it started: " + (lines[-1] if lines else "no output"))
    return answer


def _raise_error(answer: bytes) -> None:
    reply = json.loads(answer)
    if "error" in reply:
        name, message, path = reply["error"]
        raise from_wire((name, message, path))


def stop_mount(mountpoint: str | os.PathLike[str], *, lazy: bool = False, timeout: float = 10.0) -> None:
    """Unmount, and return when the keeper and its workers have ended (with `lazy`: when it is out of the tree).

    Raises MountError: not a cachefs mount; in use (by whom); still ending after `timeout` seconds.
    """
    path = mounts.resolve(mountpoint)
    present = mounted_at(path)
    info = registry.load(path)
    if present is None:
        if info is not None and info.alive:
            _await_end(info, timeout)  # it is on its way out
            return
        raise MountError(f"{path}: nothing is mounted there")
    if present.fstype != mounts.FSTYPE:
        raise MountError(f"{path}: is a mount of {present.source} ({present.fstype}), not one of cachefs")
    dead = mounts.is_dead(path)
    mounts.unmount(path, lazy=lazy or dead)
    if info is not None and not lazy:
        _await_end(info, timeout)
    if info is not None and not info.alive:
        registry.remove(info)


def _await_end(info: MountInfo, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while info.alive:
        if time.monotonic() > deadline:
            raise MountError(
                f"{info.mountpoint}: is unmounted, but its keeper (pid {info.pid}) has not ended; see {info.log}"
            )
        time.sleep(POLL_SECONDS)


def mount_status(info: MountInfo) -> dict[str, Any]:
    """How a mount is: its catalog, workers (pid, restarts, whether they answer), their counts, and how bytes get to
    readers ("io", and why: "io_why"). Raises MountError."""
    status = _ask(info, {"op": "status"}, STATUS_SECONDS)
    refused = status.pop("refused", "")
    io, why = (OPEN_FREE, f"no passthrough any more: {refused}") if refused else (info.io, info.io_why)
    return status | {"io": io, "io_why": why}


def refresh_mount(info: MountInfo, catalog: str | os.PathLike[str]) -> int:
    """Serve another catalog of the same dataset; the number of names that changed.

    Open files go on as they are. Returns when every worker answers from it and the kernel has forgotten what
    changed. Raises MountError, CatalogError.
    """
    reply = _ask(info, {"op": "refresh", "catalog": os.path.abspath(catalog)}, REFRESH_SECONDS)
    return int(reply["changed"])


def restart_mount(info: MountInfo, installation: Installation | None = None) -> MountInfo:
    """Have a new keeper, of `installation` (default: the one that runs this), look after a mount; its record.

    Open files and running readers notice nothing. When the new keeper comes to nothing, the one before goes on.
    Raises MountError.
    """
    installation = installation or this_installation()
    if info.alive:
        request = {"op": "restart", "python": installation.python, "path": installation.path}
        pid = int(_ask(info, request, RESTART_SECONDS)["pid"])
    else:
        pid = rescue.restart(info, installation)
    found = registry.load(Path(info.mountpoint))
    if found is None or found.pid != pid:
        raise MountError(f"{info.mountpoint}: was unmounted, or restarted once more, meanwhile")
    return found


def _ask(info: MountInfo, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What the keeper answers; when it has just been followed by another, what that one answers."""
    try:
        return _ask_once(info, request, timeout)
    except _Gone as gone:
        present = registry.load(Path(info.mountpoint))
        if present is None or not present.alive or present.pid == info.pid:
            raise MountError(gone.message) from gone
        return _ask_once(present, request, timeout)


class _Gone(MountError):
    """The keeper does not run, or not any more."""


def _ask_once(info: MountInfo, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(timeout)
            with registry.short_address(Path(info.control)) as address:
                sock.connect(address)
            sock.send(json.dumps(request).encode())
            answer = sock.recv(MAX_PACKET)
    except TimeoutError:
        raise MountError(
            f"{info.mountpoint}: its keeper (pid {info.pid}) does not answer within {timeout:g} s"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise _Gone(f"{info.mountpoint}: its keeper is gone; `cachefs restart` gives it another") from None
        raise MountError(f"{info.mountpoint}: its keeper cannot be asked ({error.strerror})") from error
    if not answer:
        raise _Gone(f"{info.mountpoint}: its keeper ended while it was asked")
    _raise_error(answer)
    reply: dict[str, Any] = json.loads(answer)
    return reply

"""What commands do with mounts: start, stop, list, ask, refresh.

A mount is a keeper process of its own. It gets its settings through a pipe, because they may hold credentials and
arguments and environments can be read by others; it says "ready" or the error through another. Afterwards one talks
to it over its Unix socket (SOCK_SEQPACKET, one JSON packet each way).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cachefs.errors import MountError, from_wire
from cachefs_sidecar import mounts, registry
from cachefs_sidecar.registry import MountInfo, MountSettings, list_mounts

__all__ = [
    "MountInfo",
    "MountSettings",
    "list_mounts",
    "mount_status",
    "refresh_mount",
    "run_foreground",
    "start_mount",
    "stop_mount",
]

# A mount takes some tenths of a second; this is for a machine that is starving.
START_SECONDS = 30.0

# A refresh of a dataset in which all of ten million names changed takes about a minute.
REFRESH_SECONDS = 600.0
STATUS_SECONDS = 5.0

# How often a process that is to end is looked at.
POLL_SECONDS = 0.02

MAX_PACKET = 64 * 1024

_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def start_mount(settings: MountSettings) -> MountInfo:
    """Mount, and return when the mount is usable. The keeper is nobody's child: it outlives the caller.

    Raises MountError (the mount point, the rights), CatalogError, ConfigError.
    """
    settings_bytes = registry.encode_settings(settings)
    ready, announce = os.pipe()
    try:
        with registry.starting(START_SECONDS):
            starter = _launch(announce, _environ(settings))
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
    from cachefs_sidecar import keeper

    keeper.set_up_logging()
    with registry.starting(START_SECONDS):
        mount = keeper.Keeper(settings, log_file="")
        info = mount.start()
    if on_ready is not None:
        on_ready(info)
    return mount.run()


def _launch(announce: int, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            # -P: the current directory is not a place to import from.
            [sys.executable, "-P", "-m", "cachefs_sidecar.keeper", "--announce", str(announce)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(announce,),
            env=environ,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise MountError(f"the keeper cannot be started with {sys.executable} ({error.strerror})") from error


def _environ(settings: MountSettings) -> dict[str, str]:
    """The keeper's environment: ours without what may be a credential, and with the way to this package."""
    captured = set(settings.session.environ)
    environ = {k: v for k, v in os.environ.items() if k not in captured and not _SECRET.search(k)}
    roots = [str(Path(__file__).resolve().parents[1]), _root_of_cachefs()]
    environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, [*roots, environ.get("PYTHONPATH")])))
    return environ


def _root_of_cachefs() -> str:
    import cachefs

    return str(Path(cachefs.__file__).resolve().parents[1])


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
    present = mounts.mounted_at(path)
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
    """How a mount is: its catalog, workers (pid, restarts, whether they answer) and their counts. Raises MountError."""
    return _ask(info, {"op": "status"}, STATUS_SECONDS)


def refresh_mount(info: MountInfo, catalog: str | os.PathLike[str]) -> int:
    """Serve another catalog of the same dataset; the number of names that changed.

    Open files go on as they are. Returns when every worker answers from it and the kernel has forgotten what
    changed. Raises MountError, CatalogError.
    """
    reply = _ask(info, {"op": "refresh", "catalog": os.path.abspath(catalog)}, REFRESH_SECONDS)
    return int(reply["changed"])


def _ask(info: MountInfo, request: dict[str, Any], timeout: float) -> dict[str, Any]:
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
            raise MountError(f"{info.mountpoint}: its keeper is gone; unmount it and mount it again") from None
        raise MountError(f"{info.mountpoint}: its keeper cannot be asked ({error.strerror})") from error
    if not answer:
        raise MountError(f"{info.mountpoint}: its keeper ended while it was asked")
    _raise_error(answer)
    reply: dict[str, Any] = json.loads(answer)
    return reply
